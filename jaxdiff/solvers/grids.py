"""Where a solver puts its nodes: grids of times from noise to data, float64 on the host."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from scipy import stats

from jaxdiff.errors import JaxdiffError
from jaxdiff.schedules import FRAMES, Process, logsnr, node_at


class Point(NamedTuple):
    """One node of a grid, as Python floats, and what solvers measure there.

    In each of the `FRAMES`, y = x / scale, the probability-flow ODE is dy / d level = (y - D) / level, whatever the
    process, and straight where D is constant (Karras et al. 2022, section 3; Liu et al. 2023). What a Runge-Kutta or
    Adams method makes of it is not the same in both: "noise" is EDM's, and k-diffusion's for all; "flow" stays finite
    at pure noise and is much better there where a process begins at high noise levels, such as the cosine schedule.
    """

    t: float
    alpha: float
    sigma: float
    scale: float

    @property
    def level(self) -> float:
        """Noise over scale, sigma / alpha or from 0 to 1; infinite in the frame "noise" where there is no signal."""
        return self.sigma / self.scale if self.scale else math.inf

    @property
    def noise(self) -> float:
        """The noise level sigma / alpha."""
        return self.sigma / self.alpha if self.alpha else math.inf

    @property
    def lam(self) -> float:
        """Half of the log SNR, lambda = log(alpha / sigma) (Lu et al. 2022a); infinite on clean data."""
        if not self.alpha or not self.sigma:
            return math.inf if self.alpha else -math.inf
        return math.log(self.alpha / self.sigma)


@dataclass(frozen=True)
class Grid:
    """N + 1 nodes of a process in the order in which a solver visits them: it evaluates at all but the last.

    t, alpha, sigma: float64 [N + 1].
    """

    process: Process
    t: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray

    @property
    def num_steps(self) -> int:
        """N, the number of steps between the nodes."""
        return len(self.t) - 1

    def __getitem__(self, i: int) -> Point:
        """The i-th node."""
        return self._point(self.t[i], self.alpha[i], self.sigma[i])

    def at(self, lam: float) -> Point:
        """The node of the process at a lambda = log(alpha / sigma): where a stage may evaluate, between the grid's."""
        return self.at_time(self.process.time_at(np.asarray(2.0 * lam)))

    def at_time(self, t: float) -> Point:
        """The node of the process at a time."""
        t = np.asarray(t, np.float64)
        return self._point(t, *self.process.alpha_sigma(t))

    def at_level(self, level: float) -> Point:
        """The node of the process at a level, as `Point.level` measures it."""
        return self.at(math.log((1 - level) / level) if self.process.frame == "flow" else -math.log(level))

    def _point(self, t, alpha, sigma) -> Point:
        scale = FRAMES[self.process.frame](alpha, sigma)
        return Point(float(t), float(alpha), float(sigma), float(scale))

    def must_start_finite(self, measure: str) -> None:
        """Raise JaxdiffError where the first node's `measure`, "level" or "noise", is infinite: at no signal."""
        if math.isinf(getattr(self[0], measure)):
            raise JaxdiffError(
                "This solver needs some signal to start from, and a zero terminal SNR has none: choose the frame "
                "'flow', or ddim, ddpm, dpmpp_2m or unipc."
            )

    @property
    def ascending(self) -> bool:
        """Whether it leads from data to noise, as `invert` makes it."""
        return self.sigma[-1] * self.alpha[0] > self.sigma[0] * self.alpha[-1]

    def must_descend(self, what: str) -> None:
        """Raise JaxdiffError where the grid leads from data to noise, which no noise can be added on the way of."""
        if self.ascending:
            raise JaxdiffError(f"{what} adds noise, and only a deterministic solver can go from an image to its noise.")


# --- spacings: process, number of nodes -> times ---------------------------------------------------------------------


def trailing(process: Process, num_steps: int) -> np.ndarray:
    """From t_max on in equal steps, not down to t_min; discrete times are rounded (Lin et al. 2024, table 2)."""
    if process.timesteps is not None:
        return np.round(process.timesteps * (1 - np.arange(num_steps) / num_steps)) - 1
    return np.linspace(process.t_max, process.t_min, num_steps + 1)[:-1]


def leading(process: Process, num_steps: int) -> np.ndarray:
    """Down to t_min in equal steps, not from t_max on; discrete times are multiples of T // num_steps (DDIM)."""
    if process.timesteps is not None:
        return (np.arange(num_steps) * (process.timesteps // num_steps))[::-1].astype(np.float64)
    return np.linspace(process.t_max, process.t_min, num_steps + 1)[1:]


def linspace(process: Process, num_steps: int) -> np.ndarray:
    """From t_max to t_min in equal steps, both ends included; discrete times are rounded."""
    times = np.linspace(process.t_max, process.t_min, num_steps)
    return times if process.timesteps is None else np.round(times)


def karras(process: Process, num_steps: int, rho: float = 7.0) -> np.ndarray:
    """Levels whose rho-th roots go in equal steps (Karras et al. 2022, equation 5)."""
    high, low = _end_levels(process)
    return _times(process, np.linspace(high ** (1 / rho), low ** (1 / rho), num_steps) ** rho)


def exponential(process: Process, num_steps: int) -> np.ndarray:
    """Levels in equal ratios; in the frame "noise" this is uniform in log SNR (Lu et al. 2022a, section 4.1)."""
    return _times(process, np.geomspace(*_end_levels(process), num_steps))


def uniform_logsnr(process: Process, num_steps: int) -> np.ndarray:
    """Log SNR in equal steps, whatever the frame."""
    ends = node_at(process, np.array([process.t_max, process.t_min]))
    if ends.alpha[0] == 0:
        raise JaxdiffError("The grid 'logsnr' needs a finite log SNR to start from: not a zero terminal SNR.")
    return process.time_at(np.linspace(*logsnr(ends.alpha, ends.sigma), num_steps))


def beta(process: Process, num_steps: int, a: float = 0.6, b: float = 0.6) -> np.ndarray:
    """Levels at equal quantiles of a beta distribution, dense at both ends (Lee et al. 2024, Beta Sampling)."""
    high, low = _end_levels(process)
    return _times(process, low + (high - low) * stats.beta.ppf(np.linspace(1, 0, num_steps), a, b))


_ALIGNED = {
    "sd": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


def align_your_steps(process: Process, num_steps: int, table: str = "sd") -> np.ndarray:
    """Noise levels optimised for a model ("sd", "sdxl" or "svd"), between them log-linear (Sabour et al. 2024).

    Raises JaxdiffError where the process does not reach the table's levels.
    """
    levels = np.log(_ALIGNED[table])
    levels = np.interp(np.linspace(0, 1, num_steps + 1)[:-1], np.linspace(0, 1, len(levels)), levels)
    times = process.time_at(-2 * levels)
    reached = node_at(process, times)
    if not np.allclose(logsnr(reached.alpha, reached.sigma), -2 * levels, atol=1e-3):
        raise JaxdiffError(
            f"The grid of {table!r} goes from the noise level {_ALIGNED[table][0]} down to {np.exp(levels[-1]):.3g}, "
            "which is more than this process has."
        )
    return times


def _end_levels(process: Process) -> np.ndarray:
    """The levels at t_max and t_min; JaxdiffError where the first is infinite."""
    ends = node_at(process, np.array([process.t_max, process.t_min]))
    if ends.alpha[0] == 0 and process.frame == "noise":
        raise JaxdiffError("A grid over noise levels needs a finite one to start from: choose the frame 'flow'.")
    return ends.sigma / FRAMES[process.frame](ends.alpha, ends.sigma)


def _times(process: Process, levels: np.ndarray) -> np.ndarray:
    """The times of levels."""
    with np.errstate(divide="ignore"):  # where there is no signal
        return process.time_at(2 * np.log((1 - levels) / levels if process.frame == "flow" else 1 / levels))


GRIDS: dict[str, Callable[[Process, int], np.ndarray]] = {
    "trailing": trailing,
    "leading": leading,
    "linspace": linspace,
    "karras": karras,
    "exponential": exponential,
    "logsnr": uniform_logsnr,
    "beta": beta,
    "ays_sd": partial(align_your_steps, table="sd"),
    "ays_sdxl": partial(align_your_steps, table="sdxl"),
    "ays_svd": partial(align_your_steps, table="svd"),
}


def describe_grids() -> dict[str, str]:
    """Each grid's name and what it is, in a line."""
    return {name: inspect.getdoc(getattr(grid, "func", grid)).split("\n")[0] for name, grid in GRIDS.items()}


# --- grids -----------------------------------------------------------------------------------------------------------


def make_grid(
    process: Process,
    num_steps: int,
    grid: str = "trailing",
    *,
    final: str = "zero",
    shift: float = 1.0,
    frame: str | None = None,
) -> Grid:
    """num_steps steps by the name of their spacing, from noise to data.

    final: "zero" ends on clean data (alpha 1, sigma 0), "sigma_min" at the process's t_min. shift: of a flow's times,
    t -> shift t / (1 + (shift - 1) t), which spends more steps at high noise (Esser et al. 2024, equation 23).
    frame: one of the `FRAMES` instead of the process's own, for the grids over levels and for the solver.
    Raises JaxdiffError for an unknown name, unless 1 <= num_steps (<= T where the process is discrete), for a shift
    that is not positive, and for one of a process that is not a flow.
    """
    if grid not in GRIDS:
        raise JaxdiffError(f"There is no grid {grid!r}; there are {', '.join(GRIDS)}.")
    if final not in ("zero", "sigma_min"):
        raise JaxdiffError(f"The final noise level of a grid is 'zero' or 'sigma_min', not {final!r}.")
    if frame is not None and frame not in FRAMES:
        raise JaxdiffError(f"There is no frame {frame!r}; there are {', '.join(FRAMES)}.")
    process = process._replace(frame=frame or process.frame)
    most = process.timesteps or np.inf
    if not 1 <= num_steps <= most:
        limit = f"between 1 and the process's {most} timesteps" if process.timesteps else "at least 1"
        raise JaxdiffError(f"num_steps must be {limit}, and {num_steps} is not.")
    times = np.asarray(GRIDS[grid](process, num_steps), np.float64)
    if final == "sigma_min":
        if np.isclose(times[-1], process.t_min, rtol=1e-9):
            if num_steps == most:
                raise JaxdiffError(f"There are only {most} times, so that {num_steps} steps have to end on clean data.")
            times = np.asarray(GRIDS[grid](process, num_steps + 1), np.float64)
        else:
            times = np.append(times, process.t_min)
    if shift != 1:
        if not shift > 0 or not np.allclose(node_at(process, times)[1:], (1 - times, times)):
            raise JaxdiffError(f"shift must be above 0, and moves the times of the flow process alone; it is {shift}.")
        times = shift * times / (1 + (shift - 1) * times)
    return grid_at(process, times, final=final)


def grid_at(process: Process, times: Sequence[float] | np.ndarray, *, final: str = "zero") -> Grid:
    """A grid of one's own: times from noise to data, followed by clean data unless `final` is "sigma_min".

    Raises JaxdiffError unless the times are within the process and each has less noise than the one before.
    """
    times = np.asarray(times, np.float64)
    if times.ndim != 1 or not len(times) or not np.isfinite(times).all():
        raise JaxdiffError(f"The times of a grid must be a list of numbers, not {times}.")
    if process.timesteps is not None and (times.min() < 0 or times.max() > process.timesteps - 1):
        raise JaxdiffError(f"The times of this process go from 0 to {process.timesteps - 1}, not as {times}.")
    with np.errstate(invalid="ignore", divide="ignore"):
        nodes = [times, *process.alpha_sigma(times)]
        if final == "zero":
            clean = (-1.0 if process.timesteps is not None else 0.0, 1.0, 0.0)
            nodes = [np.append(field, last) for field, last in zip(nodes, clean, strict=True)]
        levels = nodes[2] / nodes[1]
    if len(levels) < 2 or not np.all(levels[1:] < levels[:-1]) or np.min(levels) < 0:
        raise JaxdiffError(f"The times of a grid must fall from noise to data, at least two nodes, and {times} do not.")
    return Grid(process, *nodes)


def tail(grid: Grid, strength: float) -> Grid:
    """The last part of a grid, for image-to-image: `strength` in (0, 1] is the share of its steps that are taken.

    Raises JaxdiffError outside that range, and where not one step would be left.
    """
    steps = round(strength * grid.num_steps)
    if not 0 < strength <= 1 or steps == 0:
        raise JaxdiffError(
            f"strength must lie in (0, 1] and leave at least one of the {grid.num_steps} steps; {strength} does not."
        )
    start = grid.num_steps - steps
    return Grid(grid.process, grid.t[start:], grid.alpha[start:], grid.sigma[start:])


def invert(grid: Grid) -> Grid:
    """The same nodes from data to noise: a deterministic solver on it encodes an image (Song et al. 2021a, 4.3).

    Raises JaxdiffError for a grid that ends on clean data, where nothing can be evaluated: make it with
    final="sigma_min".
    """
    if grid.sigma[-1] == 0:
        raise JaxdiffError("A grid that ends on clean data can not be inverted: make it with final='sigma_min'.")
    return Grid(grid.process, grid.t[::-1], grid.alpha[::-1], grid.sigma[::-1])
