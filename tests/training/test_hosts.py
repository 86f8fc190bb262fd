"""Several processes as the hosts of one run: it is the same run, and what becomes of it when one of them ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, TINY
from test_loop import lines_of, state_at, steps_in

STEPS = 28
TIMEOUT = 10  # seconds until a host that gives no sign is taken for lost


def start(program, hosts, devices, *args):
    """The processes of a program on so many hosts, with so many devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    flags += f" --xla_force_host_platform_device_count={devices}"
    processes = []
    for index in range(hosts):
        place = ["--hosts.coordinator", f"localhost:{port}", "--hosts.count", hosts, "--hosts.index", index]
        place += ["--hosts.timeout", TIMEOUT]
        command = [sys.executable, *program, *map(str, args), *(map(str, place) if hosts > 1 else ())]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": flags}, **pipes))
    return processes


def finish(processes, timeout=300):
    """(status, stdout, stderr) of each; none is left running."""
    try:
        told = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, told, strict=True)]


def train(workdir, hosts, devices, *more):
    return start(["train.py"], hosts, devices, *TINY, "--train.steps", STEPS, "--workdir", workdir, *more)


def finish_well(processes):
    ends = finish(processes)
    assert [status for status, _, _ in ends] == [0] * len(processes), ends
    return ends


def assert_same(one, other, step=STEPS):
    """The same parameters, up to the order in which float32 numbers are added."""
    a, b = state_at(one, step), state_at(other, step)
    for path in b:
        np.testing.assert_allclose(a[path], b[path], rtol=1e-4, atol=1e-5, err_msg=path)
    ours, theirs = lines_of(one), lines_of(other)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    np.testing.assert_allclose([line["loss"] for line in ours], [line["loss"] for line in theirs], rtol=1e-5)


def wait_for(path, processes, seconds=200):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end
        assert all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.005)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run on two hosts of two devices."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    ends = finish_well(train(workdir, 2, 2))
    assert "4 cpu device(s) on 2 hosts" in ends[0][1]
    assert ends[1][1].replace("[Gloo]", "").count("step") == 0  # the second says nothing
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize(("hosts", "devices"), [(1, 4), (4, 1)])
def test_the_same_run_however_devices_are_spread_over_hosts(hosts, devices, unbroken, tmp_path):
    finish_well(train(tmp_path, hosts, devices))
    assert_same(tmp_path, unbroken)
    assert [line["step"] for line in lines_of(unbroken)] == list(range(4, STEPS + 1, 4))  # each written once


@pytest.mark.slow
def test_a_host_that_is_killed_ends_the_others_and_both_go_on(unbroken, tmp_path):
    processes = train(tmp_path, 2, 2)
    wait_for(tmp_path / "checkpoints" / "12", processes)
    os.kill(processes[1].pid, signal.SIGKILL)
    began = time.monotonic()
    (status, _, err), (killed, _, _) = finish(processes)
    assert time.monotonic() - began < 6 * TIMEOUT
    assert killed == -signal.SIGKILL
    assert status != 0
    assert "another task died" in err or "run the same command again on all of them" in err
    assert STEPS not in steps_in(tmp_path)
    finish_well(train(tmp_path, 2, 2, "--train.parameters", "sharded"))
    assert_same(tmp_path, unbroken)


@pytest.mark.slow
def test_a_preempted_host_has_all_save_and_leave_and_others_go_on(unbroken, tmp_path):
    processes = train(tmp_path, 2, 2, "--train.steps-per-call", 2)
    wait_for(tmp_path / "checkpoints" / "12", processes)
    os.kill(processes[1].pid, signal.SIGTERM)
    ends = finish(processes)
    assert [status for status, _, _ in ends] == [75, 75], ends
    (stopped,) = steps_in(tmp_path)[-1:]
    assert f"stopped and saved at step {stopped}" in ends[0][1]
    finish_well(train(tmp_path, 1, 4))  # on another number of hosts and devices
    assert_same(tmp_path, unbroken)


@pytest.mark.slow
def test_two_hosts_draw_what_one_draws(unbroken, tmp_path):
    args = ("--workdir", unbroken, "--num", 21, "--batch-size", 8)
    one = finish_well(start(["sample.py"], 1, 4, *args, "--out", tmp_path / "one.npz"))
    two = finish_well(start(["sample.py"], 2, 2, *args, "--out", tmp_path / "two.npz"))
    a, b = (np.load(tmp_path / f"{name}.npz") for name in ("one", "two"))
    assert a["images"].shape == b["images"].shape == (21, 8, 8, 1)
    assert np.abs(a["images"].astype(int) - b["images"]).max() <= 1
    np.testing.assert_array_equal(a["labels"], b["labels"])
    assert json.loads(one[0][1].splitlines()[-1])["images"] == 21
    assert sum("images_per_second" in out for _, out, _ in two) == 1  # one host alone tells


@pytest.mark.slow
def test_two_hosts_measure_what_one_measures(unbroken):
    args = ("--workdir", unbroken, "--num", 80, "--bits-images", 9, "--rtol", 1e-2, "--batch-size", 8)
    (end,) = finish_well(start(["-m", "jaxdiff.evaluate"], 1, 4, *args))
    ends = finish_well(start(["-m", "jaxdiff.evaluate"], 2, 2, *args))
    one, two = (json.loads(next(line for line in out.splitlines() if line[0] == "{")) for _, out, _ in (end, ends[0]))
    assert one["pixels"]["frechet"] == pytest.approx(two["pixels"]["frechet"], rel=1e-3)
    for name in ("bound_bits", "flow_bits_uniform", "flow_bits_gaussian"):
        assert one[name] == pytest.approx(two[name], rel=1e-2)
    assert "bound_bits" not in ends[1][1]


@pytest.mark.slow
def test_what_is_wrong_on_all_hosts_is_said_in_a_sentence_and_ends_them(unbroken):
    ends = finish(train(unbroken, 2, 2, "--optimizer.learning-rate", 0.5))
    assert [status for status, _, _ in ends] == [1, 1], ends
    for _, _, err in ends:
        assert "holds a run of another config" in err
        assert "Traceback" not in err


def test_hosts_that_are_half_told_are_refused(tmp_path, one_sentence):
    import train

    said = one_sentence(train.main, [*TINY, "--workdir", tmp_path / "run", "--hosts.count", 2])
    assert "--hosts.coordinator" in said
    assert not (tmp_path / "run").exists()
