"""DPM-Solver and DPM-Solver++ (Lu et al. 2022a, 2022b): exponential integrators in lambda, and their SDE forms."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxdiff.errors import JaxdiffError
from jaxdiff.solvers.grids import Grid, Point
from jaxdiff.solvers.steps import check_eta, check_order, noise_of, weighted_sum
from jaxdiff.solvers.table import Image, SolverTable, Tape

RULES = ("midpoint", "heun")


class Known(NamedTuple):
    """What was predicted at a lambda: x_0, or the noise."""

    lam: float
    value: Image


def dpm_multistep(
    grid: Grid,
    order: int = 2,
    *,
    eta: float = 0.0,
    predict: str = "x0",
    rule: str = "midpoint",
    lower_order_final: bool = True,
) -> SolverTable:
    """One row a step, with a polynomial through the last `order` (1 to 3) predictions (Lu et al. 2022b, algorithm 2).

    predict: "x0" is DPM-Solver++, "eps" DPM-Solver. eta in [0, 1] adds the noise of the reverse SDE. rule: how order 2
    weighs its difference, "midpoint" as the paper or "heun" as the polynomial's exact integral, which orders 3 and up
    always take. lower_order_final: come down to order 1 in the last steps, as all do before clean data.
    Order 3 is of order 3 here: the codes of diffusers and k-diffusion give its second difference half its weight.
    Raises JaxdiffError for values outside the ranges, and an order of more than the steps.
    """
    check_order(order, 3, grid)
    _check(grid, eta, predict, rule)
    tape = Tape()
    x, known = tape.start, []
    for i in range(grid.num_steps):
        s, t = grid[i], grid[i + 1]
        now, D = _predicted(tape, x, s, predict, keep=order > 1)
        known = [now, *known[: order - 1]]
        left = grid.num_steps - i if lower_order_final else order
        if t.sigma == 0:
            x = t.alpha * D
        else:
            x = exponential_step(x, known[: min(order, left)], s, t, tape, eta, predict, rule)
    return tape.table(x)


def dpm_singlestep(
    grid: Grid, order: int = 2, *, eta: float = 0.0, predict: str = "x0", rule: str = "midpoint"
) -> SolverTable:
    """Steps over `order` (1 to 3) nodes of the grid at a time, whose inner ones are its stages: one row a node.

    The steps that remain at the end, and always the last to clean data, are of lower order (Lu et al. 2022a, appendix
    D.3: DPM-Solver-fast). Options as in `dpm_multistep`; the rule "midpoint" of order 3 leaves its first stage out of
    the last formula, which keeps the order where the second stage is two thirds of the way.
    """
    check_order(order, 3, grid)
    _check(grid, eta, predict, rule)
    tape = Tape()
    x, first = tape.start, 0
    clean = int(grid.sigma[-1] == 0)
    while (left := grid.num_steps - first) > 0:
        stages = 1 if math.isinf(grid[first].lam) else min(order, max(left - clean, 1))
        s, base, known = grid[first], x, []
        for i in range(first, first + stages):
            t = grid[i + 1]
            now, D = _predicted(tape, x, grid[i], predict, keep=stages > 1)
            known = [*known, now]
            if t.sigma == 0:
                x = t.alpha * D
            elif len(known) == 3 and rule == "midpoint":
                x = exponential_step(base, [known[0], known[-1]], s, t, tape, eta, predict, "heun")
            else:
                x = exponential_step(base, known, s, t, tape, eta, predict, rule)
        first += stages
    return tape.table(x)


def exponential_step(
    x: Image, known: Sequence[Known], s: Point, t: Point, tape: Tape, eta: float, predict: str, rule: str
) -> Image:
    """From x at s to t, exact for predictions that are a polynomial in lambda through what is known, that at s first.

    In terms of H, the step in lambda with the sign of what is integrated, the polynomial's k-th Taylor coefficient c_k
    at s has the weight k! psi_{k+1}(H) (Lu et al. 2022a, equation 3.4 and appendix B).
    """
    h = t.lam - s.lam
    if predict == "x0":
        kept, gain, H = t.sigma / s.sigma * (math.exp(-eta * h) if eta else 1.0), -t.alpha, -(1 + eta) * h
        fresh = t.sigma * math.sqrt(-math.expm1(-2 * eta * h)) if eta else 0.0
    else:
        kept, gain, H = t.alpha / s.alpha if s.alpha else math.inf, -t.sigma * (1 + eta), h
        fresh = t.sigma * math.sqrt(eta * math.expm1(2 * h)) if eta else 0.0
    weights = integral_weights([(past.lam - s.lam) / h if past.lam != s.lam else 0.0 for past in known], H, rule)
    moved = kept * x + weighted_sum(gain * weights, [past.value for past in known])
    return moved + fresh * tape.noise() if fresh else moved


def integral_weights(nodes: Sequence[float], H: float, rule: str) -> np.ndarray:
    """Weights of values at `nodes` (0 the start of a step, 1 its end) in the integral of H e^{H (1 - tau)} over it.

    Of the polynomial through all of them; with two nodes the rules "midpoint" and "bh1" take half of psi_1 = e^H - 1
    and half of H instead of psi_2, which is the same to their order.
    """
    psi = [_psi(k, H) for k in range(1, len(nodes) + 1)]
    if len(nodes) == 2 and rule != "heun":
        psi[1] = 0.5 * (psi[0] if rule == "midpoint" else H)
    moments = [math.factorial(k) * value for k, value in enumerate(psi)]
    if len(nodes) == 1:
        return np.array(moments)
    nodes = np.array(nodes)
    if np.isinf(nodes).any():  # a prediction from infinitely far away, at no signal, says nothing of the slope
        return np.concatenate([integral_weights(nodes[~np.isinf(nodes)], H, rule), np.zeros(np.isinf(nodes).sum())])
    return np.linalg.solve(np.vander(nodes, increasing=True).T, moments)


def _psi(k: int, H: float) -> float:
    """The exponential's series from its k-th term on, over H^{k - 1}: e^H - 1, (e^H - 1 - H) / H, ..."""
    if math.isinf(H):
        return -1.0 / math.factorial(k - 1)
    if abs(H) < 1:  # free of cancellation
        return sum(H ** (j + 1) / math.factorial(k + j) for j in range(20))
    return (math.exp(H) - sum(H**j / math.factorial(j) for j in range(k))) / H ** (k - 1)


def _predicted(tape: Tape, x: Image, s: Point, predict: str, keep: bool) -> tuple[Known, Image]:
    D = tape.denoise(x, s)
    value = D if predict == "x0" else noise_of(x, D, s)
    return Known(s.lam, tape.keep(value) if keep and predict == "eps" else value), D


def _check(grid: Grid, eta: float, predict: str, rule: str) -> None:
    check_eta(eta, grid)
    if predict == "eps":
        grid.must_start_finite("noise")
    if predict not in ("x0", "eps"):
        raise JaxdiffError(f"What a DPM solver integrates is 'x0' or 'eps', not {predict!r}.")
    if rule not in RULES:
        raise JaxdiffError(f"The rule of a DPM solver is one of {', '.join(RULES)}, not {rule!r}.")
