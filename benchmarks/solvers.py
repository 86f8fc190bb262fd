"""Measure what each solver leaves of the error in a trained model: python benchmarks/solvers.py --workdir runs/digits.

From one noise per image each deterministic solver draws with a number of evaluations of the network, and is compared
with the probability-flow ODE solved adaptively from the same noise (root mean square over all pixels, of a range of 2).
One JSON line a solver, grid and number of evaluations; with --markdown a table of the best grid for each, too.
"""

import argparse
import itertools
import json
from collections import defaultdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import condition, example_keys, initial_noise, make_grid, make_table, pad_table, sample
from jaxdiff.checkpoints import load_run
from jaxdiff.errors import JaxdiffError
from jaxdiff.ode import solve_ode
from jaxdiff.pipelines import condition_on, conditional_denoiser
from jaxdiff.schedules import Node, node_at

SOLVERS = {
    "ddim": {},
    "heun": {},
    "dpm2": {},
    "rk4": {},
    "dpm_2m": {"final": "sigma_min"},
    "dpmpp_2m": {},
    "dpmpp_3m": {},
    "dpmpp_2s": {},
    "dpmpp_3s": {},
    "unipc": {},
    "unipc, order 3": {"order": 3},
    "deis": {},
    "lms": {},
    "ipndm": {},
    "plms": {},
    "pndm": {},
}
PLACES = {  # a letter in the table: the grid, and the frame that levels and slopes are measured in
    "t": ("trailing", "noise"),
    "l": ("logsnr", "noise"),
    "k": ("karras", "noise"),
    "T": ("trailing", "flow"),
    "K": ("karras", "flow"),
}
EVALUATIONS = (4, 6, 8, 10, 15, 20, 30, 50)


def table_of(process, name, evaluations, grid, frame):
    """The table of at most so many rows with the most steps; None where the solver needs more."""
    options = dict(SOLVERS[name])
    final = options.pop("final", "zero")
    for num_steps in range(evaluations, 0, -1):
        try:
            table = make_table(
                name.split(",")[0], make_grid(process, num_steps, grid, final=final, frame=frame), **options
            )
        except JaxdiffError:  # fewer steps than the solver's order
            return None
        if len(table.t) <= evaluations:
            return pad_table(table, 6)
    return None


def markdown(errors, evaluations):
    """Errors {(solver, evaluations): {place: error}} as a table of the least, and the letter of where it was."""
    lines = [f"| solver | {' | '.join(map(str, evaluations))} |", "| --- |" + " ---: |" * len(evaluations)]
    for solver in SOLVERS:
        cells = []
        for n in evaluations:
            by_place = errors.get((solver, n))
            place = min(by_place, key=by_place.get) if by_place else None
            cells.append(f"{by_place[place]:.4f} {place}" if place else "")
        lines.append(f"| {solver} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main():
    """Measure one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs/digits")
    parser.add_argument("--num", type=int, default=40, help="images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rtol", type=float, default=1e-5, help="of the adaptive solution")
    parser.add_argument("--markdown", type=Path, help="file for the table")
    args = parser.parse_args()

    diffuser, params, step = load_run(args.workdir, "latest")
    process = diffuser.process
    keys = example_keys(jax.random.key(args.seed), jnp.arange(args.num))
    labels = jnp.arange(args.num) % max(len(diffuser.class_names), 1)

    def denoiser(params):
        return condition(conditional_denoiser(diffuser, params), condition_on(diffuser, params, labels))

    start = initial_noise(make_table("ddim", make_grid(process, 1)), keys, diffuser.shape)

    @jax.jit
    def reference(params, x):
        denoise = denoiser(params)
        solved = solve_ode(denoise, process, x, process.t_max, process.t_min, rtol=args.rtol, atol=args.rtol)
        last = Node(*map(jnp.float32, node_at(process, np.asarray(process.t_min))))
        return denoise(solved.x, last), solved

    @jax.jit
    def draw(params, table, x):
        return sample(denoiser(params), table, x, keys)

    right, solved = reference(params, start)
    about = {"benchmark": "solvers", "workdir": args.workdir, "step": step, "images": args.num, "seed": args.seed}
    told = {"solver": "ode", "evaluations": int(solved.num_evaluations), "converged": bool(solved.converged)}
    print(json.dumps(about | told | {"rtol": args.rtol}), flush=True)
    errors = defaultdict(dict)
    for evaluations, name, place in itertools.product(EVALUATIONS, SOLVERS, PLACES):
        grid, frame = PLACES[place]
        table = table_of(process, name, evaluations, grid, frame)
        if table is None:
            continue
        drawn = draw(params, table, start)
        error = float(jnp.sqrt(jnp.mean((drawn - right) ** 2)))
        errors[name, evaluations][place] = error
        told = {"solver": name, "grid": grid, "frame": frame, "evaluations": len(table.t), "rms_error": round(error, 6)}
        print(json.dumps(about | told), flush=True)
    if args.markdown:
        args.markdown.write_text(markdown(errors, EVALUATIONS))


if __name__ == "__main__":
    main()
