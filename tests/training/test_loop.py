"""The loop on real data and devices: what it writes, and that stopping it anywhere changes nothing."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import ROOT, TINY
from PIL import Image

import train
from jaxdiff import checkpoints as ckpt
from jaxdiff.training import diffusion_learner, init_state
from jaxdiff.training.loop import parts_of


def lines_of(workdir, name="loss"):
    """What metrics.jsonl says of the training loss, or of another metric, without the speeds."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in ("images_per_second", "seconds")}
        for line in lines
        if name in line
    ]


def shapes_of(workdir):
    """The shapes of what a run saves."""
    learner = diffusion_learner(ckpt.read_run(workdir))
    return parts_of(jax.eval_shape(lambda: init_state(learner)))


def state_at(workdir, step):
    """The leaves by path of the state that was saved at a step."""
    parts = ckpt.restore(ckpt.folder_of(workdir), step, shapes_of(workdir))
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(parts)}


def steps_in(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def assert_same_run(one, other, step=60):
    a, b = state_at(one, step), state_at(other, step)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    for metric in ("loss", "eval_loss"):
        assert lines_of(one, metric) == lines_of(other, metric)


def start_and(workdir, when, number, *more):
    """Start the tiny run in a process of its own, send it a signal once `when()`; (its status, its stderr)."""
    command = [sys.executable, str(ROOT / "train.py"), *TINY, "--workdir", str(workdir), *more]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while not when() and process.poll() is None:
            time.sleep(0.005)
        os.kill(process.pid, number)
        _, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, err


def train_in(workdir, *more):
    return train.main([*TINY, "--workdir", str(workdir), *map(str, more)])


# --- what a run leaves ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_files_of_a_run(tiny_run):
    assert [line["step"] for line in lines_of(tiny_run)] == list(range(4, 61, 4))
    assert [line["step"] for line in lines_of(tiny_run, "eval_loss")] == [12, 24, 36, 48, 60]
    assert {line["learning_rate"] for line in lines_of(tiny_run)} == {1e-3}
    assert lines_of(tiny_run)[-1]["loss"] < lines_of(tiny_run)[0]["loss"]
    content = json.loads((tiny_run / "config.json").read_text())
    assert content["config"]["model"]["channels"] == [8]
    assert content["image_shape"] == [8, 8, 1]
    assert content["class_names"] == [str(i) for i in range(10)]
    assert sorted(path.name for path in (tiny_run / "samples").iterdir()) == ["step_0000040.png", "step_0000060.png"]
    for path in (tiny_run / "samples").iterdir():
        with Image.open(path) as picture:
            picture.load()
            assert picture.width / picture.height == 8 / 10
    assert not list(tiny_run.rglob("*.tmp"))


@pytest.mark.slow
def test_tensorboard_reads_the_events_of_a_run(tiny_run):
    from tensorboardX.proto.event_pb2 import Event

    scalars, pictures = {}, []
    for path in (tiny_run / "tensorboard").iterdir():
        content = path.read_bytes()
        while content:  # a length of 8 bytes and its checksum of 4, the event, and its checksum
            size = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + size])
            content = content[12 + size + 4 :]
            for value in event.summary.value:
                if value.HasField("image"):
                    pictures.append(event.step)
                else:
                    scalars.setdefault(value.tag, {})[event.step] = value.simple_value
    assert pictures == [40, 60]
    for name in ("loss", "grad_norm", "eval_loss"):
        told = {line["step"]: line[name] for line in lines_of(tiny_run, name)}
        assert scalars[name].keys() == told.keys()
        np.testing.assert_allclose(list(scalars[name].values()), list(told.values()), rtol=1e-6)


@pytest.mark.slow
def test_the_newest_and_the_best_checkpoints_stay(tiny_run):
    losses = {line["step"]: line["eval_loss"] for line in lines_of(tiny_run, "eval_loss")}
    assert steps_in(tiny_run) == sorted({48, 60, min(losses, key=losses.get)})


# --- stopping and going on --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_stopped_by_sigterm_goes_on_as_if_unbroken(tiny_run, tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    status, err = start_and(tmp_path, lambda: metrics.exists() and metrics.read_text().count("\n"), signal.SIGTERM)
    assert status == 75, err
    assert "Traceback" not in err
    (stopped,) = steps_in(tmp_path)[-1:]
    assert 4 <= stopped < 60
    assert train_in(tmp_path) == 0
    assert_same_run(tiny_run, tmp_path)


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_as_if_unbroken(tiny_run, tmp_path):
    status, _ = start_and(tmp_path, lambda: (tmp_path / "checkpoints" / "12").exists(), signal.SIGKILL)
    assert status == -signal.SIGKILL
    assert 12 in steps_in(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9')  # half a line, as a crash can leave it
    (tmp_path / "checkpoints" / "59.orbax-checkpoint-tmp").mkdir()  # as an unfinished save leaves it
    assert train_in(tmp_path) == 0
    assert_same_run(tiny_run, tmp_path)
    assert all(path.name.isdigit() for path in (tmp_path / "checkpoints").iterdir())


@pytest.mark.slow
def test_a_finished_run_is_left_alone_and_can_be_extended(tiny_run, tmp_path, capfd):
    # 10 lies between two reports and two evaluations
    assert train_in(tmp_path, "--train.steps", 10) == 0
    assert steps_in(tmp_path) == [10]
    before = (tmp_path / "metrics.jsonl").read_text()
    capfd.readouterr()
    assert train_in(tmp_path, "--train.steps", 10) == 0
    assert "nothing is left to train" in capfd.readouterr().out
    assert train_in(tmp_path, "--train.steps", 5) == 0
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert steps_in(tmp_path) == [10]

    assert train_in(tmp_path, "--run.log-every", 4) == 0
    ours, theirs = state_at(tmp_path, 60), state_at(tiny_run, 60)
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert lines_of(tmp_path) == lines_of(tiny_run)


# --- what is told in a sentence ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_another_config_in_the_workdir(tiny_copy, one_sentence):
    before = (tiny_copy / "config.json").read_text()
    said = one_sentence(train.main, [*TINY, "--workdir", tiny_copy, "--optimizer.learning-rate", 0.5])
    assert "optimizer.learning_rate: 0.001 and 0.5" in said
    assert str(tiny_copy) in said
    said = one_sentence(train.main, [*TINY, "--workdir", tiny_copy, "--model.channels", 16, "--train.seed", 7])
    assert "model.channels" in said
    assert "train.seed: 0 and 7" in said
    assert "learning_rate" not in said
    assert (tiny_copy / "config.json").read_text() == before


@pytest.mark.parametrize(("batch_size", "accumulate", "meant"), [(12, 1, "8 or 16"), (4, 1, "8"), (24, 2, "16 or 32")])
def test_a_batch_that_does_not_divide(batch_size, accumulate, meant, tmp_path, one_sentence):
    args = ("--train.batch-size", batch_size, "--train.accumulate", accumulate, "--workdir", tmp_path / "run")
    said = one_sentence(train.main, [*TINY, *args])
    assert said.endswith(f"take {meant}.")
    assert f"train.batch_size {batch_size}" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_that_diverges_ends_and_keeps_what_was_good(tiny_copy, one_sentence):
    # the same run, had it been given a learning rate that throws the parameters out of float32
    content = json.loads((tiny_copy / "config.json").read_text())
    content["config"]["optimizer"]["learning_rate"] = 1e30
    (tiny_copy / "config.json").write_text(json.dumps(content))
    args = ("--optimizer.learning-rate", "1e30", "--train.steps", 90, "--run.log-every", 7)
    said = one_sentence(train.main, [*TINY, "--workdir", tiny_copy, *args])
    assert "diverged" in said
    assert "the checkpoint of step 60 is kept" in said
    assert steps_in(tiny_copy)[-1] == 60
    for path, leaf in state_at(tiny_copy, 60).items():
        assert np.isfinite(leaf).all(), path


@pytest.mark.slow
def test_a_state_that_evaluates_to_nan_is_not_saved(tmp_path, one_sentence):
    # the loss of step 1 is taken before its update, and is finite
    args = ("--optimizer.learning-rate", "1e30", "--run.checkpoint-every", 1)
    said = one_sentence(train.main, [*TINY, "--workdir", tmp_path, *args])
    assert "By step 1 training has diverged (eval_loss" in said
    assert "nothing was saved yet" in said
    assert steps_in(tmp_path) == []
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_bad_updates_may_be_skipped_and_the_run_says_how_many(tiny_run, tmp_path):
    # every gradient of more than twice the mean norm is a spike here: some are, and the run goes on without them
    assert train_in(tmp_path, "--guard.spike", 2, "--guard.skips", 50, "--train.steps", 120) == 0
    skipped = sum(line.get("skipped", 0) for line in lines_of(tmp_path))
    state = state_at(tmp_path, 120)
    (good,) = (leaf for path, leaf in state.items() if "guarded" in path and path.endswith("good"))
    assert good + skipped == 120
    (updates,) = {int(leaf) for path, leaf in state.items() if "opt_state" in path and path.endswith("count")}
    assert updates == good  # Adam has seen the good ones alone


@pytest.mark.slow
def test_several_steps_a_call_end_in_the_same_run(tiny_run, tmp_path):
    args = ("--train.steps-per-call", 16, "--run.log-every", 16, "--run.checkpoint-every", 30, "--run.sample-every", 0)
    assert train_in(tmp_path, *args) == 0  # 16, then 14 of 1, twice
    ours, theirs = state_at(tmp_path, 60), state_at(tiny_run, 60)
    for path in theirs:
        if "sums" not in path and "guarded" not in path:
            np.testing.assert_allclose(ours[path], theirs[path], rtol=1e-5, atol=1e-6, err_msg=path)


# --- one process a workdir, and a full disk ---------------------------------------------------------------------------


@pytest.mark.slow
def test_a_second_process_in_a_workdir_is_refused(tmp_path, one_sentence):
    said = []

    def first_trains():
        if (tmp_path / "metrics.jsonl").exists() and (tmp_path / "metrics.jsonl").read_text() and not said:
            said.append(one_sentence(train.main, [*TINY, "--workdir", tmp_path]))
        return bool(said)

    status, err = start_and(tmp_path, first_trains, signal.SIGTERM, "--train.steps", "100000")
    assert status == 75, err
    assert "Another process trains in" in said[0]
    assert train_in(tmp_path, "--train.steps", 4) == 0  # the lock went with the process


@pytest.mark.slow
def test_a_full_disk_costs_nothing_that_was_saved(tiny_run, tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    status, err = start_and(tmp_path, lambda: (tmp_path / "checkpoints" / "24").exists(), signal.SIGTERM)
    assert status == 75, err
    before = steps_in(tmp_path)
    # files may grow to 4 kB and no further, as on a disk that is full
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); import sys, train; "
    code += "sys.exit(train.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *TINY, "--workdir", str(tmp_path), "--run.no-tensorboard"]
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "could not be written" in done.stderr or "can not be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert steps_in(tmp_path) == before
    assert metrics.exists()
    assert train_in(tmp_path) == 0
    ours, theirs = state_at(tmp_path, 60), state_at(tiny_run, 60)
    for path in theirs:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)
