"""Functions denoiser -> denoiser: conditions, classifier-free guidance and thresholds, for every solver alike."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff.preconditioning import Denoiser
from jaxdiff.schedules import Node, expand

ConditionalDenoiser = Callable[[jax.Array, Node, Any], jax.Array]
"""denoise(x_t, node, cond) -> x0_hat, as `make_denoiser` makes it."""


def condition(denoise: ConditionalDenoiser, cond: Any) -> Denoiser:
    """Hold the condition fixed: what guidance with scale 1 is, at one evaluation and not two."""
    return lambda x, node: denoise(x, node, cond)


def classifier_free_guidance(
    denoise: ConditionalDenoiser, cond: Any, null_cond: Any, guidance_scale: jax.Array | float
) -> Denoiser:
    """Guided by eps_uncond + w (eps_cond - eps_uncond) (Ho & Salimans 2022; their w is ours less one).

    x_0 is affine in eps at a given x_t, so that the same sum over predicted x_0 is meant. Both evaluations go in one
    batch. cond, null_cond: equal pytrees of arrays [B, ...]; guidance_scale: a scalar or [B].
    """
    both = jax.tree.map(lambda null, given: jnp.concatenate([null, given]), null_cond, cond)

    def guided(x: jax.Array, node: Node) -> jax.Array:
        twice = Node(*(field if jnp.ndim(field) == 0 else jnp.concatenate([field, field]) for field in node))
        unconditional, conditional = jnp.split(denoise(jnp.concatenate([x, x]), twice, both), 2)
        scale = expand(jnp.asarray(guidance_scale, x.dtype), x.ndim)
        return unconditional + scale * (conditional - unconditional)

    return guided


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


THRESHOLDS: dict[str, Callable[[Denoiser], Denoiser]] = {
    "none": lambda denoise: denoise,
    "clip": clip_x0,
    "dynamic": dynamic_threshold,
}
