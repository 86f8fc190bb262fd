"""What README.md and docs/ show: the Python runs, and the links, files and options exist."""

import contextlib
import functools
import io
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

import sample
import train
from jaxdiff import evaluate
from jaxdiff.cli import EvaluateOptions, SampleOptions, parse_train_options
from jaxdiff.config import override, validate

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, info: str) -> list[tuple[int, str]]:
    """The fenced blocks of a kind: the number of lines before each, and its text."""
    text = page.read_text()
    found = [match for match in FENCE.finditer(text) if match["info"].strip() == info]
    return [(text.count("\n", 0, match.start("text")), match["text"]) for match in found]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def commands(page: Path) -> list[list[str]]:
    """The words of each command: of bash blocks, where && stands between two, and of `python ...` in the prose."""
    lines = [line for _, text in blocks(page, "bash") for line in text.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(python [^`\n]+)`", prose(page))
    parts = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [words for words in parts if words]


@functools.cache
def names(script) -> set[str]:
    """The options that a script's --help names."""
    text = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(text):
        patch.chdir(ROOT)
        patch.setenv("COLUMNS", "500")
        with pytest.raises(SystemExit):
            script.main(["--help"])
    return set(re.findall(r"--[a-z][\w.-]*", text.getvalue()))


@pytest.mark.slow
@every_page
def test_python_runs_from_top_to_bottom(page):
    namespace = {"__name__": page.stem}
    for lines_before, code in blocks(page, "python"):
        # With as many empty lines before it, a traceback shows the page's own lines.
        exec(compile("\n" * lines_before + code, str(page), "exec"), namespace)


@every_page
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path = target.partition("#")[0]
        assert "://" in target or not path or (page.parent / path).exists(), target


@every_page
def test_files_that_are_named_exist(page):
    for path in re.findall(r"\b(?:benchmarks|configs|docs|jaxdiff|tests)/[\w/]+\.\w+", page.read_text()):
        assert (ROOT / path).is_file(), path


@every_page
def test_commands_parse(page, monkeypatch):
    """Those of train.py and sample.py, as they would themselves, but for the run that sample.py reads."""
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        try:
            match words:
                case ["python", _, *args] if "--help" in args:
                    pass
                case ["python", "train.py", *args]:
                    parse_train_options(args, "")
                case ["python", "sample.py", *args]:
                    validate(override(SampleOptions(), args, "sample.py"))
                case ["python", "-m", "jaxdiff.evaluate", *args]:
                    validate(override(EvaluateOptions(), args, "jaxdiff.evaluate"))
                case ["python", script, *_] if script.endswith(".py"):
                    assert (ROOT / script).is_file(), script
        except SystemExit:
            pytest.fail(f"Not understood: {shlex.join(words)}")


@every_page
def test_options_in_the_prose_exist(page):
    for option in re.findall(r"`(--[a-z][\w.-]*)", prose(page)):
        assert option in names(train) | names(sample) | names(evaluate), option


def test_there_is_something_to_test():
    """The patterns above find what they look for."""
    readme, sampling = ROOT / "README.md", ROOT / "docs" / "sampling.md"
    assert len(blocks(readme, "python")) >= 2
    assert len(blocks(sampling, "python")) > 10
    assert ["python", "train.py", "--help"] in commands(readme)
    assert sum("sample.py" in words for words in commands(sampling)) > 5
    assert {"--solver", "--guidance-interval", "--num"} <= names(sample)
    assert {"--config", "--data.image-size"} <= names(train)
