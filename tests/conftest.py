"""Eight CPU devices for the whole suite, one compilation cache for it and the programs it starts, one tiny run."""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

# All of this is read when jax is imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The suite compiles much and computes little, so LLVM optimises nothing.
for flag in ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"):
    if flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxdiff-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax  # noqa: E402
import pytest  # noqa: E402

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for `import train` and `import sample`, which lie beside the package

TINY = ["--config", str(ROOT / "tests" / "fixtures" / "tiny_recipe.py")]
"""What train.py is told for a run of seconds."""


def split_over(count, batch):
    """A batch as a pmapped step takes it: [count x B, ...] to [count, B, ...]."""
    return {name: x.reshape(count, -1, *x.shape[1:]) for name, x in batch.items()}


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Let go of what a file compiled: no other uses it, and the whole suite's is many gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The workdir of a finished run with the options TINY: read it, and copy it to change it."""
    import train

    workdir = tmp_path_factory.mktemp("tiny") / "run"
    assert train.main([*TINY, "--workdir", str(workdir)]) == 0
    return workdir


@pytest.fixture
def tiny_copy(tiny_run, tmp_path):
    """A copy of the tiny run, to damage or to go on with."""
    return Path(shutil.copytree(tiny_run, tmp_path / "copy"))


@pytest.fixture
def one_sentence(capfd):
    """Run a script's main with arguments that are wrong; the one line that it says of that, without a traceback."""

    def run(main, args):
        capfd.readouterr()
        assert main([str(arg) for arg in args]) == 1
        err = capfd.readouterr().err
        lines = [line for line in err.splitlines() if not line.startswith("decoding ")]
        assert "Traceback" not in err
        assert len(lines) == 1, err
        assert lines[0].startswith("error: ")
        assert len(lines[0]) < 600
        return lines[0]

    return run
