"""Table 1, the forward process: t -> (alpha, sigma) of x_t = alpha_t x_0 + sigma_t eps.

Everything here is computed in NumPy float64 on the host; the same functions take JAX arrays inside jit.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.errors import JaxdiffError

# --- betas: the discrete schedules -----------------------------------------------------------------------------------


def linear_beta_schedule(timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """Betas [timesteps] in equal steps (Ho et al. 2020, section 4)."""
    return np.linspace(beta_start, beta_end, timesteps)


def scaled_linear_beta_schedule(timesteps: int, beta_start: float = 0.00085, beta_end: float = 0.012) -> np.ndarray:
    """Betas [timesteps] whose square roots go in equal steps (Rombach et al. 2022; the ends are Stable Diffusion's)."""
    return np.linspace(beta_start**0.5, beta_end**0.5, timesteps) ** 2


def cosine_beta_schedule(timesteps: int, s: float = 0.008) -> np.ndarray:
    """Betas [timesteps] under which sqrt(alpha_bar) is a quarter of a cosine (Nichol & Dhariwal 2021, equation 17).

    Clipped to [1e-4, 0.9999]: the upper bound keeps the last step from destroying all signal at once.
    """
    f = np.cos((np.linspace(0, 1, timesteps + 1) + s) / (1 + s) * np.pi / 2) ** 2
    return np.clip(1 - f[1:] / f[:-1], 1e-4, 0.9999)


def sigmoid_beta_schedule(timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """Betas [timesteps] along a logistic curve over [-6, 6] (Xu et al. 2022, GeoDiff)."""
    return beta_start + (beta_end - beta_start) / (1 + np.exp(-np.linspace(-6, 6, timesteps)))


def rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Shift and scale sqrt(alpha_bar) so that it ends at 0 and begins as it did (Lin et al. 2024, algorithm 1).

    The last beta is then 1: the model must predict v, flow, x0 or edm, since eps tells nothing of x_0 at alpha = 0.
    """
    root = np.sqrt(np.cumprod(1 - betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alphas_cumprod = root**2
    return 1 - np.concatenate([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])


BETA_SCHEDULES: dict[str, Callable[[int], np.ndarray]] = {
    "linear": linear_beta_schedule,
    "cosine": cosine_beta_schedule,
    "scaled_linear": scaled_linear_beta_schedule,
    "sigmoid": sigmoid_beta_schedule,
}


class DiffusionSchedule(NamedTuple):
    """The tables of a discrete process, each [T], float64 on the host and float32 once they enter jit.

    Row t is the state after t + 1 noisings; clean data is one row before row 0 (`alphas_cumprod_prev[0] = 1`).
    """

    betas: np.ndarray
    alphas: np.ndarray
    alphas_cumprod: np.ndarray
    alphas_cumprod_prev: np.ndarray
    sqrt_alphas_cumprod: np.ndarray
    sqrt_one_minus_alphas_cumprod: np.ndarray
    sqrt_recip_alphas: np.ndarray
    posterior_variance: np.ndarray

    @classmethod
    def from_betas(cls, betas: np.ndarray) -> "DiffusionSchedule":
        """All tables from betas [T] in (0, 1]; raises JaxdiffError outside that range."""
        betas = np.asarray(betas, np.float64)
        if betas.ndim != 1 or not len(betas) or not np.all((betas > 0) & (betas <= 1)):
            raise JaxdiffError(f"betas must be a non-empty vector of numbers in (0, 1], not {betas}.")
        alphas = 1 - betas
        alphas_cumprod = np.cumprod(alphas)
        alphas_cumprod_prev = np.concatenate([[1.0], alphas_cumprod[:-1]])
        with np.errstate(divide="ignore"):  # a zero terminal SNR has alpha = 0 in its last row
            return cls(
                betas=betas,
                alphas=alphas,
                alphas_cumprod=alphas_cumprod,
                alphas_cumprod_prev=alphas_cumprod_prev,
                sqrt_alphas_cumprod=np.sqrt(alphas_cumprod),
                sqrt_one_minus_alphas_cumprod=np.sqrt(1 - alphas_cumprod),
                sqrt_recip_alphas=1 / np.sqrt(alphas),
                posterior_variance=betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod),
            )


def at(table: np.ndarray | jax.Array, t: jax.Array, ndim: int) -> jax.Array:
    """Rows t [B] of a table [T], as [B, 1, ..., 1] with `ndim` axes; a t of T or more gives NaN and not a wrong row."""
    return expand(jnp.asarray(table).at[t].get(mode="fill", fill_value=jnp.nan), ndim)


def expand(coefficient: jax.Array, ndim: int) -> jax.Array:
    """A coefficient [B] as [B, 1, ..., 1] with `ndim` axes; a scalar stays as it is."""
    return jnp.reshape(coefficient, coefficient.shape + (1,) * (ndim - 1)) if coefficient.ndim else coefficient


def q_sample(schedule: DiffusionSchedule, x_0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
    """Draw x_t ~ q(x_t | x_0) by its closed form (Ho et al. 2020, equation 4).

    x_0, noise: [B, ...]; t: integers [B] in [0, T). Returns [B, ...].
    """
    return (
        at(schedule.sqrt_alphas_cumprod, t, x_0.ndim) * x_0
        + at(schedule.sqrt_one_minus_alphas_cumprod, t, x_0.ndim) * noise
    )


def posterior_mean_variance(
    schedule: DiffusionSchedule, x_0: jax.Array, x_t: jax.Array, t: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mean [B, ...] and variance [B, 1, ...] of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, equations 6 and 7)."""
    s = schedule
    of_x_0 = np.sqrt(s.alphas_cumprod_prev) * s.betas / (1 - s.alphas_cumprod)
    of_x_t = np.sqrt(s.alphas) * (1 - s.alphas_cumprod_prev) / (1 - s.alphas_cumprod)
    mean = at(of_x_0, t, x_0.ndim) * x_0 + at(of_x_t, t, x_0.ndim) * x_t
    return mean, at(s.posterior_variance, t, x_0.ndim)


# --- the process: discrete or continuous, one interface --------------------------------------------------------------


FRAMES: dict[str, Callable] = {
    "noise": lambda alpha, sigma: alpha,
    "flow": lambda alpha, sigma: alpha + sigma,
}
"""What x is divided by, so that a path to a fixed x_0 is a straight line y = (alpha x_0 + sigma eps) / scale over its
level sigma / scale: by "noise" (Karras et al. 2022) up to infinity, by "flow" from 0 to 1."""


class Process(NamedTuple):
    """A Gaussian forward process. The four functions take NumPy arrays (float64) and JAX arrays alike.

    alpha_sigma: t -> (alpha, sigma), each of t's shape.
    time_at: log SNR -> t, the inverse of `logsnr`; not clipped to [t_min, t_max] where a formula goes on.
    c_noise: t -> what the network is told of the time.
    t_min, t_max: the ends of training; sampling starts at t_max and leaves for clean data from t_min or above.
    timesteps: number of rows of a discrete process, whose training times are integers; None if continuous.
    frame: in which solvers measure noise levels and take straight steps, a name in `FRAMES`.
    """

    alpha_sigma: Callable
    time_at: Callable
    c_noise: Callable
    t_min: float
    t_max: float
    timesteps: int | None = None
    frame: str = "noise"


class Node(NamedTuple):
    """One or several points of a process: t, alpha and sigma of equal shape."""

    t: jax.Array | np.ndarray
    alpha: jax.Array | np.ndarray
    sigma: jax.Array | np.ndarray


def node_at(process: Process, t: jax.Array | np.ndarray | float) -> Node:
    """The node of a process at times t."""
    t = np.asarray(t, np.float64) if isinstance(t, int | float) else t
    return Node(t, *process.alpha_sigma(t))


def logsnr(alpha: jax.Array | np.ndarray, sigma: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """log(alpha^2 / sigma^2): +inf on clean data, -inf on pure noise."""
    xp = sigma.__array_namespace__()
    return 2 * (xp.log(alpha) - xp.log(sigma))


def snr(alpha: jax.Array | np.ndarray, sigma: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """Signal to noise ratio alpha^2 / sigma^2 (Kingma et al. 2021, equation 1)."""
    return (alpha / sigma) ** 2


def score_from_noise(noise: jax.Array, sigma: jax.Array) -> jax.Array:
    """The score of q(x_t | x_0) from its noise: -eps / sigma, where sigma = sqrt(1 - alpha_bar) in DDPM's terms."""
    return -noise / expand(jnp.asarray(sigma), noise.ndim)


def noise_from_score(score: jax.Array, sigma: jax.Array) -> jax.Array:
    """The noise from the score: eps = -sigma * score."""
    return -expand(jnp.asarray(sigma), score.ndim) * score


def discrete_process(schedule: DiffusionSchedule) -> Process:
    """A DDPM schedule as a process over t in [0, T - 1]; between rows log alpha_bar is interpolated linearly.

    Its frame is "noise", as in other libraries, but for schedules that end beyond noise levels of 200, such as cosine
    and those of zero terminal SNR: over sigma / alpha such levels are what errors of slopes are multiplied with.
    """
    with np.errstate(divide="ignore"):
        log_alphas_cumprod = np.cumsum(np.log1p(-schedule.betas))
    last = len(log_alphas_cumprod) - 1

    def alpha_sigma(t):
        xp = t.__array_namespace__()
        table = xp.asarray(log_alphas_cumprod)
        # Row t has the slope of what led to it, log(1 - beta_t): and 0 * -inf, before a zero terminal SNR, is not met.
        low = xp.clip(xp.ceil(t) - 1, 0, max(last - 1, 0)).astype(int)
        part = t - low
        log_alpha_bar = (1 - part) * table[low] + part * table[xp.minimum(low + 1, last)]
        return xp.exp(0.5 * log_alpha_bar), xp.sqrt(-xp.expm1(log_alpha_bar))

    def time_at(logsnr):
        xp = logsnr.__array_namespace__()
        log_alpha_bar = -xp.logaddexp(xp.zeros_like(logsnr), -logsnr)
        return xp.interp(-log_alpha_bar, xp.asarray(-log_alphas_cumprod), xp.arange(last + 1.0))

    alpha, sigma = alpha_sigma(np.asarray(float(last)))
    frame = "noise" if sigma < 200 * alpha else "flow"
    return Process(alpha_sigma, time_at, lambda t: t, 0.0, float(last), timesteps=last + 1, frame=frame)


def vp_process(beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3) -> Process:
    """The variance preserving SDE with linear beta(t) over t in [t_min, 1] (Song et al. 2021, equation 33)."""
    log_alpha_bar, time_of_depth = _linear_beta(beta_min, beta_max)

    def alpha_sigma(t):
        xp = t.__array_namespace__()
        return xp.exp(0.5 * log_alpha_bar(t)), xp.sqrt(-xp.expm1(log_alpha_bar(t)))

    def time_at(logsnr):
        xp = logsnr.__array_namespace__()
        return time_of_depth(xp.logaddexp(xp.zeros_like(logsnr), -logsnr))  # -log alpha_bar

    return Process(alpha_sigma, time_at, lambda t: 999 * t, t_min, 1.0)


def subvp_process(beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3) -> Process:
    """The sub-VP SDE: `vp_process`'s signal under less noise, sigma = 1 - alpha^2 (Song et al. 2021, equation 12)."""
    log_alpha_bar, time_of_depth = _linear_beta(beta_min, beta_max)

    def alpha_sigma(t):
        xp = t.__array_namespace__()
        return xp.exp(0.5 * log_alpha_bar(t)), -xp.expm1(log_alpha_bar(t))

    def time_at(logsnr):
        xp = logsnr.__array_namespace__()
        return time_of_depth(2 * xp.arcsinh(0.5 * xp.exp(-0.5 * logsnr)))  # alpha solves alpha^2 + alpha r - 1 = 0

    return Process(alpha_sigma, time_at, lambda t: 999 * t, t_min, 1.0)


def _linear_beta(beta_min: float, beta_max: float) -> tuple[Callable, Callable]:
    """Where beta(t) goes linearly over [0, 1]: t -> log alpha_bar, and -log alpha_bar -> t."""
    slope = beta_max - beta_min
    log_alpha_bar = lambda t: -0.5 * slope * t**2 - beta_min * t  # noqa: E731

    def time_of_depth(depth):
        xp = depth.__array_namespace__()
        return 2 * depth / (beta_min + xp.sqrt(beta_min**2 + 2 * slope * depth))

    return log_alpha_bar, time_of_depth


def ve_process(sigma_min: float = 0.01, sigma_max: float = 50.0) -> Process:
    """The variance exploding SDE over t in [0, 1]: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t.

    Song et al. 2021, equation 31; the network is told of log sigma by way of t, as theirs is. Noise levels are
    `edm_process`'s, at other times and to other ends.
    """
    log_ratio = float(np.log(sigma_max / sigma_min))

    def alpha_sigma(t):
        xp = t.__array_namespace__()
        return xp.ones_like(t), sigma_min * xp.exp(log_ratio * t)

    def time_at(logsnr):
        return (-0.5 * logsnr - float(np.log(sigma_min))) / log_ratio

    return Process(alpha_sigma, time_at, lambda t: 999 * t, 0.0, 1.0)


def edm_process(sigma_min: float = 0.002, sigma_max: float = 80.0) -> Process:
    """The variance exploding process in which time is the noise level: alpha = 1, sigma = t (Karras et al. 2022)."""

    def alpha_sigma(t):
        return t.__array_namespace__().ones_like(t), t

    def time_at(logsnr):
        return logsnr.__array_namespace__().exp(-0.5 * logsnr)

    def c_noise(t):
        return 0.25 * t.__array_namespace__().log(t)

    return Process(alpha_sigma, time_at, c_noise, sigma_min, sigma_max)


def flow_process(t_min: float = 1e-3, t_max: float = 1 - 1e-3) -> Process:
    """The straight path between data and noise: alpha = 1 - t, sigma = t (Liu et al. 2023; Lipman et al. 2023).

    The ends stay a thousandth inside [0, 1] so that every prediction and every log SNR is finite; the signal that
    is left at t_max is smaller than half a step of an 8-bit image.
    """

    def alpha_sigma(t):
        return 1 - t, t

    def time_at(logsnr):
        xp = logsnr.__array_namespace__()
        return 1 / (1 + xp.exp(0.5 * logsnr))

    return Process(alpha_sigma, time_at, lambda t: 1000 * t, t_min, t_max, frame="flow")


CONTINUOUS_PROCESSES: dict[str, Callable[[], Process]] = {
    "vp": vp_process,
    "subvp": subvp_process,
    "ve": ve_process,
    "edm": edm_process,
    "flow": flow_process,
}


def make_process(schedule: str, timesteps: int = 1000, zero_terminal_snr: bool = False) -> Process:
    """A process by the name of its schedule; `timesteps` and `zero_terminal_snr` concern the discrete ones.

    Raises JaxdiffError for an unknown name and for a zero terminal SNR of a continuous process.
    """
    if schedule in BETA_SCHEDULES:
        betas = BETA_SCHEDULES[schedule](timesteps)
        return discrete_process(
            DiffusionSchedule.from_betas(rescale_zero_terminal_snr(betas) if zero_terminal_snr else betas)
        )
    if schedule not in CONTINUOUS_PROCESSES:
        raise JaxdiffError(
            f"There is no schedule {schedule!r}; there are {', '.join([*BETA_SCHEDULES, *CONTINUOUS_PROCESSES])}."
        )
    if zero_terminal_snr:
        raise JaxdiffError(f"zero_terminal_snr rescales betas, and the {schedule!r} process has none.")
    return CONTINUOUS_PROCESSES[schedule]()
