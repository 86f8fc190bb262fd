"""What the host costs in training: python benchmarks/steps_per_call.py --config configs/digits.py --counts 1 4 16

For each number of steps a call, the compiled step of a recipe takes turns with the others over the same batches: once
fed by the host as in training, once with batches that already lie on the devices. A JSON line each: milliseconds a
step, and the share of them that the host takes.
"""

import argparse
import json
import sys
import time

import jax
import numpy as np

from jaxdiff.cli import told_in_a_sentence
from jaxdiff.config import load_recipe
from jaxdiff.data import batches, open_dataset, prefetched
from jaxdiff.devices import put
from jaxdiff.pipelines import make_diffuser
from jaxdiff.training import diffusion_learner, init_state
from jaxdiff.training.layout import make_layout


@told_in_a_sentence
def main(argv):
    """Measure and tell; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/digits.py")
    parser.add_argument("--data-dir")
    parser.add_argument("--batch-size", type=int, help="of the recipe where left out")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--steps", type=int, default=48, help="in each turn")
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args(argv)
    config = load_recipe(args.config)
    data = open_dataset(config.data.name, config.data.split, data_dir=args.data_dir or config.data.data_dir)
    learner = diffusion_learner(make_diffuser(config, data.image_shape, data.class_names))
    layout, size = make_layout(learner), args.batch_size or config.train.batch_size
    read = learner.prepare(data, cache=True)
    took = {(count, fed): [] for count in args.counts for fed in (True, False)}
    steps = {}
    for turn in range(args.turns + 1):  # the first compiles and warms up
        for count in args.counts:
            state = init_state(learner)
            state = layout.enter(put(state, layout.place(state)))
            reader = prefetched(batches(read, size))
            feed = lambda: layout.feed([next(reader) for _ in range(count)])  # noqa: B023, E731
            still = feed()
            steps[count] = steps.get(count) or layout.compile(count, state, still, {})
            for fed in (True, False):
                began = time.perf_counter()
                for _ in range(max(args.steps // count, 1)):
                    state = steps[count](state, feed() if fed else still, {})
                jax.block_until_ready(state.step)
                if turn:
                    took[count, fed].append((time.perf_counter() - began) / (max(args.steps // count, 1) * count))
            reader.close()
    for count in args.counts:
        fed, still = (1e3 * float(np.min(took[count, kind])) for kind in (True, False))
        told = {"benchmark": "steps_per_call", "config": args.config, "batch_size": size, "steps_per_call": count}
        told |= {"ms_per_step": round(fed, 3), "ms_without_feeding": round(still, 3)}
        print(json.dumps(told | {"host_share": round(1 - still / fed, 4)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
