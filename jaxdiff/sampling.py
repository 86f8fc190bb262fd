"""The sampler: one `jax.lax.scan` whose body never changes over a solver's table."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.guidance import clip_x0
from jaxdiff.preconditioning import Denoiser, make_denoiser
from jaxdiff.schedules import DiffusionSchedule, Node, discrete_process, expand
from jaxdiff.solvers import SolverTable, ddim, ddpm, make_grid


class Trajectory(NamedTuple):
    """What a sampler passed through, [N, B, ...] each: x after every row, and the x_0 predicted in it."""

    x: jax.Array
    x0: jax.Array


def example_keys(key: jax.Array, index: jax.Array) -> jax.Array:
    """One key per example, [B], by its index [B]: an example's noise does not depend on its batch or its device."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def _normal(keys: jax.Array, row: jax.Array | int, shape: tuple[int, ...], dtype) -> jax.Array:
    draw = lambda key: jax.random.normal(jax.random.fold_in(key, row), shape, dtype)  # noqa: E731
    return jax.vmap(draw)(keys)


def initial_noise(table: SolverTable, keys: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Pure noise [B, *shape] at the table's first node; keys: one per example, [B].

    Its standard deviation is sqrt(alpha^2 + sigma^2), that of x_t for data of unit variance: 1 wherever the process
    preserves the variance.
    """
    std = jnp.sqrt(table.alpha[0] ** 2 + table.sigma[0] ** 2).astype(dtype)
    return std * _normal(keys, 0, shape, dtype)


def noised(table: SolverTable, x_0: jax.Array, keys: jax.Array) -> jax.Array:
    """Images [B, ...] with the noise of the table's first node: where image-to-image starts (Meng et al. 2022, SDEdit).

    Give it a table on the `tail` of a grid.
    """
    alpha, sigma = (jnp.asarray(c[0], x_0.dtype) for c in (table.alpha, table.sigma))
    return alpha * x_0 + sigma * _normal(keys, 0, x_0.shape[1:], x_0.dtype)


def slerp(a: jax.Array, b: jax.Array, weight: jax.Array | float) -> jax.Array:
    """Between two noises [B, ...], along the great circle and at its length (Song et al. 2021a, appendix D.5).

    weight: 0 is a, 1 is b; a scalar or [B]. Between them noise stays as likely as noise is, which a mean would not.
    """
    axes = tuple(range(1, a.ndim))
    norm = lambda x: jnp.sqrt(jnp.sum(x**2, axes, keepdims=True))  # noqa: E731
    cosine = jnp.sum(a * b, axes, keepdims=True) / (norm(a) * norm(b))
    parallel = jnp.abs(cosine) > 1 - 1e-6  # there the arc is a line, and arccos has no slope
    angle = jnp.arccos(jnp.where(parallel, 0.0, cosine))
    weight = expand(jnp.asarray(weight, a.dtype), a.ndim)
    of_a = jnp.where(parallel, 1 - weight, jnp.sin((1 - weight) * angle) / jnp.sin(angle))
    of_b = jnp.where(parallel, weight, jnp.sin(weight * angle) / jnp.sin(angle))
    return of_a * a + of_b * b


def row_noise(keys: jax.Array, row: jax.Array | int, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """The z [B, *shape] that `sample` draws in row `row` under these keys [B]."""
    return _normal(keys, row + 1, shape, dtype)  # row 0 of the stream is the initial noise


def sample(
    denoise: Denoiser, table: SolverTable, x: jax.Array, keys: jax.Array, *, trajectory: bool = False
) -> jax.Array | tuple[jax.Array, Trajectory]:
    """Follow a table from x [B, ...] at its first node; keys: one per example, [B]. Returns x at its last [B, ...].

    With `trajectory`, also all that was passed through. Pure: put it under jit with the table as an argument, and one
    compiled program serves every solver, grid, eta and guidance scale with as many rows and images. A row without
    noise draws none, and has no gradient by it.
    """
    rows, m = table.v.shape
    table = jax.tree.map(lambda field: jnp.asarray(field, x.dtype), table)

    def step(S, row):
        i, noisy, (t, alpha, sigma, M, v, n) = row
        D = denoise(S[0], Node(t, alpha, sigma))

        def with_noise(S):
            z = row_noise(keys, i, x.shape[1:], x.dtype)
            return tuple(image + n[j] * z for j, image in enumerate(S))

        # Written out, and not as a product of matrices: an accelerator would round its factors to bfloat16.
        S = tuple(sum(M[j, k] * S[k] for k in range(m)) + v[j] * D for j in range(m))
        S = jax.lax.cond(noisy, with_noise, lambda S: S, S)
        return S, Trajectory(S[0], D) if trajectory else None

    S = (x, *[jnp.zeros_like(x)] * (m - 1))
    S, passed = jax.lax.scan(step, S, (jnp.arange(rows), jnp.any(table.n != 0, axis=1), table))
    return (S[0], passed) if trajectory else S[0]


def _draw(model, schedule, table, shape, key, clip):
    denoise = make_denoiser(lambda x, t, _: model(x, t), discrete_process(schedule), "eps")
    keys = example_keys(key, jnp.arange(shape[0]))
    return sample(clip_x0(denoise) if clip else denoise, table, initial_noise(table, keys, shape[1:]), keys)


def sample_ddpm(
    model: Callable[[jax.Array, jax.Array], jax.Array],
    schedule: DiffusionSchedule,
    shape: tuple[int, ...],
    key: jax.Array,
    *,
    variance: str = "small",
    clip: bool = True,
) -> jax.Array:
    """Draw [B, H, W, C] = shape by DDPM over all T steps (Ho et al. 2020, algorithm 2).

    model(x [B, ...], t [B]) -> the predicted noise [B, ...]. variance: "small" or "large". clip: hold x_0 to [-1, 1].
    """
    table = ddpm(make_grid(discrete_process(schedule), len(schedule.betas)), variance)
    return _draw(model, schedule, table, shape, key, clip)


def sample_ddim(
    model: Callable[[jax.Array, jax.Array], jax.Array],
    schedule: DiffusionSchedule,
    shape: tuple[int, ...],
    key: jax.Array,
    *,
    num_steps: int = 50,
    eta: float = 0.0,
    clip: bool = True,
) -> jax.Array:
    """Draw [B, H, W, C] = shape by DDIM in num_steps of the T steps (Song et al. 2021a); eta 0 is deterministic.

    model(x [B, ...], t [B]) -> the predicted noise [B, ...]. clip: hold the predicted x_0 to [-1, 1].
    """
    table = ddim(make_grid(discrete_process(schedule), num_steps), eta)
    return _draw(model, schedule, table, shape, key, clip)
