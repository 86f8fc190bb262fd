"""Where a solver puts its nodes: grids of times from noise to data, float64 on the host."""

from collections.abc import Callable

import numpy as np

from jaxdiff.errors import JaxdiffError
from jaxdiff.schedules import Node, Process, logsnr, node_at


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
    """Noise levels sigma / alpha whose rho-th roots go in equal steps (Karras et al. 2022, equation 5)."""
    ends = node_at(process, np.array([process.t_max, process.t_min]))
    if ends.alpha[0] == 0:
        raise JaxdiffError("The grid 'karras' needs a finite noise level to start from: not a zero terminal SNR.")
    high, low = np.exp(-0.5 * logsnr(ends.alpha, ends.sigma)) ** (1 / rho)
    levels = np.linspace(high, low, num_steps) ** rho
    return process.time_at(-2 * np.log(levels))


GRIDS: dict[str, Callable[[Process, int], np.ndarray]] = {
    "trailing": trailing,
    "leading": leading,
    "linspace": linspace,
    "karras": karras,
}


def make_grid(process: Process, num_steps: int, grid: str = "trailing") -> Node:
    """num_steps nodes [num_steps + 1] by the name of their spacing, and after them clean data (alpha 1, sigma 0).

    Raises JaxdiffError for an unknown name, and unless 1 <= num_steps (<= T where the process is discrete).
    """
    if grid not in GRIDS:
        raise JaxdiffError(f"There is no grid {grid!r}; there are {', '.join(GRIDS)}.")
    most = process.timesteps or np.inf
    if not 1 <= num_steps <= most:
        limit = f"between 1 and the process's {most} timesteps" if process.timesteps else "at least 1"
        raise JaxdiffError(f"num_steps must be {limit}, and {num_steps} is not.")
    node = node_at(process, np.asarray(GRIDS[grid](process, num_steps), np.float64))
    clean = Node(t=-1.0 if process.timesteps is not None else 0.0, alpha=1.0, sigma=0.0)
    return Node(*(np.append(field, last) for field, last in zip(node, clean, strict=True)))
