"""What is done to a checkpoint on disk costs at most the steps since the one before, or is refused in a sentence."""

import json
import logging
import shutil

import jax
import numpy as np
import pytest
from conftest import TINY
from test_loop import shapes_of

import sample
import train
from jaxdiff import checkpoints as ckpt


def files(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def values(newest):
    """The files that hold the values of the state."""
    return [path for path in files(newest / "state") if path.parent.name == "d"]


def truncate(newest):
    for path in values(newest):
        path.write_bytes(path.read_bytes()[:100])


def truncate_everything(newest):
    for path in files(newest):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete_a_file(newest):
    (newest / "state" / "manifest.ocdbt").unlink()


def delete_a_part(newest):
    shutil.rmtree(newest / "ema_params")


def delete_the_checksums(newest):
    shutil.rmtree(newest / "checksums")


def flip_bytes(newest):
    for path in values(newest):
        content = bytearray(path.read_bytes())
        for place in range(len(content) // 3, len(content), max(len(content) // 7, 1)):
            content[place] ^= 0xFF
        path.write_bytes(content)


def flip_bytes_of_the_manifest(newest):
    path = newest / "state" / "manifest.ocdbt"
    path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))


def empty_the_folder(newest):
    shutil.rmtree(newest)
    newest.mkdir()


def empty_the_files(newest):
    for path in files(newest):
        path.write_bytes(b"")


def take_another_ones_parameters(newest):
    """Intact as files, and not what was saved."""
    shutil.rmtree(newest / "ema_params")
    shutil.copytree(newest.parent / "48" / "ema_params", newest / "ema_params")


def overwrite_the_loss(newest):
    (newest / "metrics" / "metrics").write_text("{not JSON")


def interrupt_the_rename(newest):
    newest.rename(newest.parent / "60.orbax-checkpoint-tmp")


FROM_BEFORE = [
    truncate, truncate_everything, delete_a_file, delete_a_part, delete_the_checksums, flip_bytes,
    flip_bytes_of_the_manifest, empty_the_folder, empty_the_files, take_another_ones_parameters, interrupt_the_rename,
]  # fmt: skip


@pytest.fixture(scope="module")
def like(tiny_run):
    return shapes_of(tiny_run)


@pytest.mark.parametrize("harm", FROM_BEFORE)
def test_a_damaged_newest_checkpoint_is_passed_over(harm, like, tiny_copy, caplog, capfd, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [caplog.handler])  # a script's, of another test, is closed
    folder = tiny_copy / "checkpoints"
    before = ckpt.restore(folder, 48, like)
    harm(folder / "60")
    step, found = ckpt.resume(tiny_copy, like)
    assert step == 48
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)
    assert "Traceback" not in caplog.text + capfd.readouterr().err  # asyncio logs those of tasks left behind
    if harm is not interrupt_the_rename:  # which no one takes for a checkpoint
        assert f"{folder / '60'} is damaged" in caplog.text
        assert "That of step 48 is taken." in caplog.text
        assert (tiny_copy / "damaged" / "60_0").is_dir()
    assert ckpt.newest_whole(folder) == 48


@pytest.mark.slow
def test_a_run_goes_on_from_the_one_before_the_damaged_one(tiny_run, tiny_copy, capfd):
    flip_bytes(tiny_copy / "checkpoints" / "60")
    (tiny_copy / "checkpoints" / "59.orbax-checkpoint-tmp").mkdir()  # and one more was never finished
    capfd.readouterr()
    assert train.main([*TINY, "--workdir", str(tiny_copy)]) == 0
    said = capfd.readouterr()
    assert "going on from step 48" in said.out
    assert "That of step 48 is taken." in said.err
    assert "Traceback" not in said.err
    assert sorted(path.name for path in (tiny_copy / "checkpoints").iterdir())[-2:] == ["48", "60"]
    ours, theirs = (ckpt.load_run(workdir)[1] for workdir in (tiny_copy, tiny_run))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (tiny_copy / "metrics.jsonl").read_text().count('"step": 60') == 2  # its loss and its evaluation, once each


@pytest.mark.slow
def test_a_loss_that_does_not_read_is_none(tiny_copy, capfd):
    overwrite_the_loss(tiny_copy / "checkpoints" / "60")
    assert train.main([*TINY, "--workdir", str(tiny_copy), "--train.steps", "64"]) == 0
    assert "going on from step 60" in capfd.readouterr().out
    assert sorted(int(path.name) for path in (tiny_copy / "checkpoints").iterdir())[-1] == 64
    assert not (tiny_copy / "damaged").exists()


@pytest.mark.slow
def test_where_all_are_damaged_the_run_is_refused_and_nothing_moves(tiny_copy, one_sentence):
    steps = sorted(path.name for path in (tiny_copy / "checkpoints").iterdir())
    for step in steps:
        truncate(tiny_copy / "checkpoints" / step)
    said = one_sentence(train.main, [*TINY, "--workdir", tiny_copy, "--train.steps", 70])
    assert f"{tiny_copy / 'checkpoints' / '60'} is damaged" in said
    assert sorted(path.name for path in (tiny_copy / "checkpoints").iterdir()) == steps
    assert not (tiny_copy / "damaged").exists()


def test_a_config_of_something_else_is_refused(tiny_copy, one_sentence):
    path = tiny_copy / "config.json"
    content = json.loads(path.read_text())
    content["config"]["model"]["channels"] = [16]
    path.write_text(json.dumps(content))
    said = one_sentence(train.main, [*TINY, "--workdir", tiny_copy, "--model.channels", "16", "--train.steps", "70"])
    assert f"{tiny_copy / 'checkpoints' / '60'} is damaged (state has float32 (11," in said
    path.write_text(path.read_text()[:100])
    said = one_sentence(train.main, [*TINY, "--workdir", tiny_copy])
    assert "config.json is damaged" in said


def test_samples_are_drawn_from_the_newest_that_is_whole(tiny_copy, tmp_path, capfd, one_sentence):
    delete_a_part(tiny_copy / "checkpoints" / "60")
    out = tmp_path / "drawn.npz"
    assert sample.main(["--workdir", str(tiny_copy), "--num", "8", "--out", str(out)]) == 0
    said = capfd.readouterr()
    assert json.loads(said.out.splitlines()[-1])["step"] == 48
    assert "That of step 48 is taken." in said.err
    assert (tiny_copy / "checkpoints" / "60").is_dir()  # reading changes nothing
    said = one_sentence(sample.main, ["--workdir", tiny_copy, "--checkpoint", "60", "--num", 8, "--out", out])
    assert "is damaged" in said
