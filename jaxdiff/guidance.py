"""Functions denoiser -> denoiser: conditions, guidance, thresholds and inpainting, for every solver alike."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff.preconditioning import Denoiser
from jaxdiff.schedules import Node, expand

ConditionalDenoiser = Callable[[jax.Array, Node, Any], jax.Array]
"""denoise(x_t, node, cond) -> x0_hat, as `make_denoiser` makes it."""

GuidanceScale = jax.Array | float | Callable[[Node], jax.Array | float]
"""How strongly to guide: 1 is not at all. A scalar, one per example [B], or a function node -> either."""


def condition(denoise: ConditionalDenoiser, cond: Any) -> Denoiser:
    """Hold the condition fixed: what guidance with scale 1 is, at one evaluation and not two."""
    return lambda x, node: denoise(x, node, cond)


def _value_at(guidance_scale: GuidanceScale, node: Node) -> jax.Array | float:
    return guidance_scale(node) if callable(guidance_scale) else guidance_scale


def guidance_interval(
    guidance_scale: GuidanceScale, low: jax.Array | float, high: jax.Array | float
) -> Callable[[Node], jax.Array]:
    """The scale where low < sigma / alpha <= high, and 1 outside: node -> scale (Kynkäänniemi et al. 2024).

    low, high: noise levels from 0 to infinity, scalars or [B]. Guidance costs variety at high noise and does nothing at
    low noise.
    """

    def scale_at(node: Node) -> jax.Array:
        level = jnp.divide(node.sigma, node.alpha)  # infinite where no signal is left: inside only if `high` is, too
        return jnp.where((low < level) & (level <= high), _value_at(guidance_scale, node), 1.0)

    return scale_at


def _variance(x_0: jax.Array) -> jax.Array:
    """Variance of each image, [B, 1, ...], above that of any flat one's rounding: free to divide by."""
    return jnp.var(x_0, axis=tuple(range(1, x_0.ndim)), keepdims=True) + 1e-8


def _guide(
    weak: jax.Array, strong: jax.Array, node: Node, guidance_scale: GuidanceScale, rescale: jax.Array | float
) -> jax.Array:
    """The sum weak + w (strong - weak), then rescaled to the contrast of strong; all [B, ...]."""
    scale = expand(jnp.asarray(_value_at(guidance_scale, node), strong.dtype), strong.ndim)
    guided = weak + scale * (strong - weak)
    ratio = jnp.sqrt(_variance(strong) / _variance(guided))
    phi = expand(jnp.asarray(rescale, guided.dtype), guided.ndim)
    return ((1 - phi) + phi * ratio) * guided


def classifier_free_guidance(
    denoise: ConditionalDenoiser,
    cond: Any,
    null_cond: Any,
    guidance_scale: GuidanceScale,
    rescale: jax.Array | float = 0.0,
) -> Denoiser:
    """Guided by eps_uncond + w (eps_cond - eps_uncond) (Ho & Salimans 2022; their w is ours less one).

    x_0 is affine in eps at a given x_t, so that the same sum over predicted x_0 is meant. Both evaluations go in one
    batch. cond, null_cond: equal pytrees of arrays [B, ...]. A negative condition is another condition in the place of
    null_cond: guidance then leads away from what it describes.

    guidance_scale: a scalar, [B], or a function node -> either, such as `guidance_interval` makes.
    rescale: phi in [0, 1], a scalar or [B]; by it the guided prediction is mixed with itself at the standard deviation
    of the conditional one, per example, against over-exposure (Lin et al. 2024, section 3.4, equations 15 and 16). They
    take the network's output; here it is the predicted x_0, which means the same for every prediction.
    """
    both = jax.tree.map(lambda null, given: jnp.concatenate([null, given]), null_cond, cond)

    def guided(x: jax.Array, node: Node) -> jax.Array:
        twice = Node(*(field if jnp.ndim(field) == 0 else jnp.concatenate([field, field]) for field in node))
        unconditional, conditional = jnp.split(denoise(jnp.concatenate([x, x]), twice, both), 2)
        return _guide(unconditional, conditional, node, guidance_scale, rescale)

    return guided


def autoguidance(
    denoise: Denoiser, weak: Denoiser, guidance_scale: GuidanceScale, rescale: jax.Array | float = 0.0
) -> Denoiser:
    """Guided away from a weaker model's errors by D_weak + w (D - D_weak) (Karras et al. 2024, equation 3).

    weak: a smaller or less trained model of the same data and, unlike the null of classifier-free guidance, under the
    same condition, as `condition` holds it. guidance_scale and rescale: those of `classifier_free_guidance`.
    """
    return lambda x, node: _guide(weak(x, node), denoise(x, node), node, guidance_scale, rescale)


def clip_x0(denoise: Denoiser) -> Denoiser:
    """Hold the predicted x_0 to the images' range [-1, 1] (Ho et al. 2020's sampler)."""
    return lambda x, node: jnp.clip(denoise(x, node), -1.0, 1.0)


def dynamic_threshold(denoise: Denoiser, percentile: float = 99.5) -> Denoiser:
    """Bring the predicted x_0 back to [-1, 1] by a percentile of its own magnitude (Saharia et al. 2022, section 2.3).

    Per example: s is the percentile of |x_0|, at least 1; x_0 is clipped to [-s, s] and divided by s. Keeps contrast
    from saturating under strong guidance, where `clip_x0` would flatten all that lies outside.
    """

    def thresholded(x: jax.Array, node: Node) -> jax.Array:
        x_0 = denoise(x, node)
        s = jnp.percentile(jnp.abs(x_0), percentile, axis=tuple(range(1, x_0.ndim)), keepdims=True)
        s = jnp.maximum(s, 1.0)
        return jnp.clip(x_0, -s, s) / s

    return thresholded


def inpaint(denoise: Denoiser, known: jax.Array, mask: jax.Array) -> Denoiser:
    """Hold the predicted x_0 to `known` [B, H, W, C] where mask is 1, and leave it to the network where it is 0.

    mask: [B, H, W, 1], or what broadcasts, in [0, 1]; mixed in between. This is imputation by replacement (Song et al.
    2021b, appendix I.2) in the prediction: they replace the known part of x_t by noised data, and here it is x_0 from
    which a solver derives all else, so that each brings the known part along its own forward path (DDPM draws it from
    q(x_s | x_t, known), DDIM keeps its noise) and ends on it.

    Wrap it around thresholds and guidance, which would change the known part: inpaint(clip_x0(guided), known, mask).
    """

    def inpainted(x: jax.Array, node: Node) -> jax.Array:
        x_0 = denoise(x, node)
        given = jnp.asarray(mask, x_0.dtype)
        return given * jnp.asarray(known, x_0.dtype) + (1 - given) * x_0  # this form is exact at both ends

    return inpainted


THRESHOLDS: dict[str, Callable[[Denoiser], Denoiser]] = {
    "none": lambda denoise: denoise,
    "clip": clip_x0,
    "dynamic": dynamic_threshold,
}
