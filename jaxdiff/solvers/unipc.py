"""UniPC (Zhao et al. 2023): the multistep predictor of DPM-Solver++, and a corrector that costs no evaluation."""

import math

from jaxdiff.errors import JaxdiffError
from jaxdiff.solvers.dpm import Known, exponential_step
from jaxdiff.solvers.grids import Grid
from jaxdiff.solvers.steps import check_order, noise_of
from jaxdiff.solvers.table import SolverTable, Tape

_RULES = {"bh1": "bh1", "bh2": "midpoint"}


def unipc(
    grid: Grid,
    order: int = 2,
    *,
    variant: str = "bh2",
    predict: str = "x0",
    corrector: bool = True,
    lower_order_final: bool = True,
) -> SolverTable:
    """Predict x at the next node, evaluate there, and take the step again with what was found (algorithms 5 to 8).

    order: 1 to 3, of the predictor; the corrector is one higher. variant: the paper's B(h), "bh1" or "bh2": it matters
    where a single difference is weighed, by a predictor of order 2 and a corrector of order 1. predict: "x0" or "eps".
    Clean data, the end, is reached by the prediction itself and not corrected.
    Raises JaxdiffError for values outside the ranges, and an order of more than the steps.
    """
    check_order(order, 3, grid)
    if variant not in _RULES:
        raise JaxdiffError(f"The variant of unipc is one of {', '.join(_RULES)}, not {variant!r}.")
    if predict not in ("x0", "eps"):
        raise JaxdiffError(f"What unipc integrates is 'x0' or 'eps', not {predict!r}.")
    if predict == "eps":
        grid.must_start_finite("noise")
    rule = _RULES[variant]
    tape = Tape()
    x = base = tape.start
    known, used = [], 0
    for i in range(grid.num_steps):
        s, t = grid[i], grid[i + 1]
        D = tape.denoise(x, s)
        now = Known(s.lam, D if predict == "x0" else tape.keep(noise_of(x, D, s)))
        if corrector and known and not math.isinf(known[0].lam):
            x = exponential_step(base, [*known[:used], now], grid[i - 1], s, tape, 0.0, predict, rule)
        base = tape.keep(x) if corrector else x
        known = [now, *known[: order - 1]]
        used = min(len(known), grid.num_steps - i if lower_order_final else order)
        x = t.alpha * D if t.sigma == 0 else exponential_step(base, known[:used], s, t, tape, 0.0, predict, rule)
    return tape.table(x)
