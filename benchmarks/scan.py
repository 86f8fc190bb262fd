"""Time the sampling scan itself, with a network that costs nothing: python benchmarks/scan.py.

Against the simplest DDIM loop that one would write by hand in `lax.scan`, in the same process, in turns. One JSON line
a case: microseconds a row of each, and the ratio of DDIM's two.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import example_keys, make_grid, make_process, make_table, sample

SHAPES = [(1, 8, 8, 1), (64, 8, 8, 1), (64, 32, 32, 3), (8, 64, 64, 4)]


def network(x, alpha, sigma):
    """Hardly anything: so that the loop around it is what is timed."""
    return 0.5 * x + alpha - sigma


def by_hand(alpha, sigma, x):
    """DDIM without jaxdiff: alpha and sigma [N + 1]."""

    def step(x, row):
        alpha_t, sigma_t, alpha_s, sigma_s = row
        x_0 = network(x, alpha_t, sigma_t)
        noise = (x - alpha_t * x_0) / sigma_t
        return alpha_s * x_0 + sigma_s * noise, None

    return jax.lax.scan(step, x, (alpha[:-1], sigma[:-1], alpha[1:], sigma[1:]))[0]


def seconds(call, rounds):
    """The least time of a call, which other work on the machine can only have added to."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return min(times)


def main():
    """Time each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()

    grid = make_grid(make_process("linear"), args.rows)
    denoise = lambda x, node: network(x, node.alpha, node.sigma)  # noqa: E731
    draw = jax.jit(lambda table, x, keys: sample(denoise, table, x, keys))
    loop = jax.jit(by_hand)
    for shape in SHAPES:
        x = jax.random.normal(jax.random.key(0), shape)
        keys = example_keys(jax.random.key(1), jnp.arange(shape[0]))
        nodes = jnp.float32(grid.alpha), jnp.float32(grid.sigma)
        calls = {"by_hand": lambda: loop(*nodes, x)}  # noqa: B023
        for name in ("ddim", "dpmpp_2m", "unipc", "ddpm"):
            table = jax.tree.map(jnp.float32, make_table(name, grid))
            calls[name] = lambda table=table: draw(table, x, keys)  # noqa: B023
        np.testing.assert_allclose(calls["ddim"](), calls["by_hand"](), rtol=1e-3, atol=1e-4)
        for call in calls.values():
            jax.block_until_ready(call())
        best = {name: np.inf for name in calls}
        for _ in range(3):  # in turns, so that other work meets all alike
            for name, call in calls.items():
                best[name] = min(best[name], seconds(call, args.rounds))
        told = {
            "benchmark": "scan",
            "device": jax.devices()[0].device_kind,
            "shape": shape,
            "rows": args.rows,
            **{f"{name}_us_per_row": round(1e6 * best[name] / args.rows, 3) for name in calls},
            "ddim_over_by_hand": round(best["ddim"] / best["by_hand"], 2),
        }
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
