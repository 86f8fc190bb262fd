"""Kill a run at random, a hundred times, and see that nothing is lost: python benchmarks/restarts.py --cycles 100

A tiny run of the digits is started again and again by the same command and ended by SIGKILL, now and then by SIGTERM,
at a time drawn at random; then it is let go to its end. A JSON line tells whether its parameters, and every line of its
training's metrics, are those of a run that nobody disturbed.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from jaxdiff.checkpoints import load_run

ROOT = Path(__file__).parents[1]
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)


def command(workdir, steps):
    """The run: a checkpoint every few steps, so that many are being written when it is killed."""
    recipe = ["--config", str(ROOT / "tests" / "fixtures" / "tiny_recipe.py"), "--train.steps", str(steps)]
    often = ["--run.log-every", "5", "--run.checkpoint-every", "7", "--run.sample-every", "0"]
    return [sys.executable, str(ROOT / "train.py"), *recipe, *often, "--workdir", str(workdir)]


def lines_of(workdir):
    """The metrics of training, without the times; a run that is asked to stop has no time to evaluate there."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines]


def main(argv):
    """Kill, compare and tell; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=100)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--longest", type=float, default=3.5, help="seconds after its first line that a run may have")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    chance = random.Random(args.seed)
    folder = Path(tempfile.mkdtemp(prefix="jaxdiff-restarts-"))
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    run = lambda workdir, **more: subprocess.Popen(  # noqa: E731
        command(workdir, args.steps), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **more
    )
    quiet, disturbed = folder / "quiet", folder / "disturbed"
    began = time.perf_counter()
    run(quiet).communicate()

    ends, starts = {}, []
    for _ in tqdm(range(args.cycles), unit="kill", disable=None):
        process = run(disturbed, text=True)
        process.stdout.readline()  # jaxdiff has begun: from here on anything may be under way
        number = chance.choice(SIGNALS)
        try:
            process.wait(chance.uniform(0, args.longest))
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        said, _ = process.communicate()
        ends[process.returncode] = ends.get(process.returncode, 0) + 1
        assert "error:" not in said, said
        starts += [int(line.split()[-1]) for line in said.splitlines() if line.startswith("going on from step")]
    run(disturbed).communicate()
    (_, a, step), (_, b, reached) = load_run(quiet), load_run(disturbed)
    equal = all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    result = {
        "benchmark": "restarts",
        "cycles": args.cycles,
        "exit_statuses": {str(status): count for status, count in sorted(ends.items())},
        "furthest_restart": max(starts, default=0),
        "steps": [step, reached],
        "parameters_equal": equal,
        "metrics_equal": lines_of(quiet) == lines_of(disturbed),
        "damaged": (disturbed / "damaged").exists(),
        "seconds": round(time.perf_counter() - began, 1),
    }
    print(json.dumps(result))
    return 0 if equal and result["metrics_equal"] and step == reached == args.steps else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
