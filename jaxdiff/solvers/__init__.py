"""Table 3: solvers as pure functions from a grid of nodes to a table of small matrices, and their registry by name."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from jaxdiff.errors import JaxdiffError
from jaxdiff.solvers.adams import deis, ipndm, lms, plms, pndm
from jaxdiff.solvers.ancestral import dpm2_ancestral, dpmpp_2s_ancestral, dpmpp_sde
from jaxdiff.solvers.consistency import lcm
from jaxdiff.solvers.ddim import ddim
from jaxdiff.solvers.ddpm import ddpm
from jaxdiff.solvers.dpm import dpm_multistep, dpm_singlestep
from jaxdiff.solvers.grids import GRIDS, Grid, describe_grids, grid_at, invert, make_grid, tail
from jaxdiff.solvers.reverse_sde import euler_maruyama, predictor_corrector, reverse_diffusion
from jaxdiff.solvers.runge_kutta import dpm2, edm, euler, heun, rk4
from jaxdiff.solvers.table import SolverTable, Tape, pad_table, scale_noise, stack_tables
from jaxdiff.solvers.unipc import unipc


class Solver(NamedTuple):
    """An entry of the registry: grid -> table with its options as keywords, and what it is in a line."""

    make: Callable[..., SolverTable]
    about: str

    @property
    def options(self) -> tuple[str, ...]:
        """The names of its options."""
        return tuple(inspect.signature(self.make).parameters)[1:]


SOLVERS: dict[str, Solver] = {
    "ddpm": Solver(ddpm, "DDPM's ancestral sampling with the posterior's variance"),
    "ddpm_large": Solver(partial(ddpm, variance="large"), "DDPM with the larger variance, beta"),
    "ddim": Solver(ddim, "DDIM; eta 0 is deterministic, 1 is ddpm"),
    "euler": Solver(euler, "Euler's method, which is ddim, with EDM's churn where asked for"),
    "euler_ancestral": Solver(lambda grid, eta=1.0: ddim(grid, eta), "ancestral Euler, which is ddim with eta 1"),
    "heun": Solver(heun, "Heun's method of order 2, two evaluations a step"),
    "edm": Solver(edm, "EDM's stochastic sampler: Heun with churn"),
    "dpm2": Solver(dpm2, "DPM-2, a midpoint method of order 2, two evaluations a step"),
    "dpm2_ancestral": Solver(dpm2_ancestral, "DPM-2 with fresh noise after each step"),
    "rk4": Solver(rk4, "Runge and Kutta's method of order 4, four evaluations a step"),
    "dpm_2m": Solver(partial(dpm_multistep, predict="eps"), "DPM-Solver, multistep, of order 2 (1 to 3) in the noise"),
    "dpmpp_2m": Solver(dpm_multistep, "DPM-Solver++(2M): multistep of order 2, a good default from 10 steps on"),
    "dpmpp_3m": Solver(partial(dpm_multistep, order=3), "DPM-Solver++(3M): multistep of order 3"),
    "dpmpp_2m_sde": Solver(partial(dpm_multistep, eta=1.0), "DPM-Solver++(2M) of the reverse SDE"),
    "dpmpp_3m_sde": Solver(partial(dpm_multistep, order=3, eta=1.0), "DPM-Solver++(3M) of the reverse SDE"),
    "dpm_2s": Solver(
        partial(dpm_singlestep, predict="eps"), "DPM-Solver, singlestep, of order 2 (1 to 3) in the noise"
    ),
    "dpmpp_2s": Solver(dpm_singlestep, "DPM-Solver++(2S): singlestep of order 2, the grid's nodes in pairs"),
    "dpmpp_3s": Solver(partial(dpm_singlestep, order=3), "DPM-Solver++(3S): singlestep of order 3, nodes in threes"),
    "dpmpp_2s_ancestral": Solver(dpmpp_2s_ancestral, "DPM-Solver++(2S) with fresh noise, two evaluations a step"),
    "dpmpp_sde": Solver(dpmpp_sde, "DPM-Solver++ SDE: noise at the stage too, two evaluations a step"),
    "unipc": Solver(unipc, "UniPC: predictor of order 2 (1 to 3) and a corrector for nothing; good in few steps"),
    "deis": Solver(deis, "DEIS of order 3 (1 to 4): Adams's method in the log of the noise level"),
    "lms": Solver(lms, "linear multistep of order 4 (1 to 4) in the noise level"),
    "plms": Solver(plms, "PLMS: Adams-Bashforth of order 4 in equal weights, after one improved Euler step"),
    "pndm": Solver(pndm, "PNDM: three steps of RK4, then as plms"),
    "ipndm": Solver(ipndm, "improved PNDM: Adams-Bashforth from the first step on"),
    "euler_maruyama": Solver(euler_maruyama, "Euler and Maruyama's method on the reverse SDE, in hundreds of steps"),
    "reverse_diffusion": Solver(reverse_diffusion, "the reverse SDE in the steps that the forward process took"),
    "predictor_corrector": Solver(predictor_corrector, "reverse_diffusion with Langevin's steps after each of its own"),
    "lcm": Solver(lcm, "multistep consistency sampling, for distilled models"),
}
"""By name; what options each takes is in its function's signature."""


def make_table(solver: str, grid: Grid, **options) -> SolverTable:
    """The table of a solver by name on a grid, with its own options, such as eta or order.

    Raises JaxdiffError for an unknown name, an option that the solver does not have, and what the solver refuses.
    """
    if solver not in SOLVERS:
        raise JaxdiffError(f"There is no solver {solver!r}; there are {', '.join(SOLVERS)}.")
    known = SOLVERS[solver].options
    for name in options:
        if name not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise JaxdiffError(f"{name} is no option of the solver {solver!r}: {has}.")
    return SOLVERS[solver].make(grid, **options)


__all__ = [
    "GRIDS",
    "SOLVERS",
    "Grid",
    "Solver",
    "SolverTable",
    "Tape",
    "ddim",
    "ddpm",
    "deis",
    "describe_grids",
    "dpm2",
    "dpm2_ancestral",
    "dpm_multistep",
    "dpm_singlestep",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
    "edm",
    "euler",
    "euler_maruyama",
    "grid_at",
    "heun",
    "invert",
    "ipndm",
    "lcm",
    "lms",
    "make_grid",
    "make_table",
    "pad_table",
    "plms",
    "pndm",
    "predictor_corrector",
    "reverse_diffusion",
    "rk4",
    "scale_noise",
    "stack_tables",
    "tail",
    "unipc",
]
