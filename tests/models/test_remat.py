"""Blocks whose insides are worked out again in the backward pass: the same gradients, from fewer numbers kept."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import models
from jaxdiff.models.layers import Condition

X = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)
SIZES = {"channels": (8, 16), "layers_per_block": 2, "num_groups": 4}


def unet(remat, cond, **conditions):
    model = models.UNet(
        out_channels=1, attention_levels=(1,), num_heads=2, dropout=0.1, remat=remat, **SIZES, **conditions
    )
    args = (X, jnp.linspace(0, 1, 4), cond)
    return jax.jit(model.init)(jax.random.key(0), *args), lambda params: model.apply(
        params, *args, train=True, rngs={"dropout": jax.random.key(1)}
    )


def autoencoder(remat):
    model = models.AutoencoderKL(latent_channels=2, out_channels=1, remat=remat, **SIZES)
    return jax.jit(model.init)(jax.random.key(0), X), lambda params: model.apply(params, X)


CASES = {
    "classes": lambda remat: unet(remat, Condition(label=jnp.arange(4)), num_class_embeds=4),
    "context": lambda remat: unet(remat, Condition(context=jnp.ones((4, 5, 8))), context_dim=8),
    "autoencoder": autoencoder,
}


@pytest.mark.parametrize("case", CASES)
def test_the_gradients_are_the_same_and_less_is_kept(case):
    results = {}
    for remat in (False, True):
        params, apply = CASES[case](remat)
        params = jax.tree.map(lambda x: x + 0.1, params)  # so that no layer gives zero
        out, pull = jax.jit(partial(jax.vjp, apply))(params)
        kept = sum(x.nbytes for x in jax.tree.leaves(pull))
        (gradient,) = jax.jit(pull)(out)
        results[remat] = out, kept, jnp.concatenate([x.ravel() for x in jax.tree.leaves(gradient)])
    (a, kept, gradient), (b, kept_with_remat, gradient_with_remat) = results[False], results[True]
    np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5)
    assert float(jnp.linalg.norm(gradient_with_remat - gradient)) < 1e-4 * float(jnp.linalg.norm(gradient))
    assert kept_with_remat < 0.4 * kept
