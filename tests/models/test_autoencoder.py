"""The autoencoder computes what diffusers' computes from the same weights, and its Gaussians are Gaussians."""

import json
import math
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_diffusers_layout import from_diffusers, nhwc

from jaxdiff.errors import JaxdiffError
from jaxdiff.models import AutoencoderKL, DiagonalGaussian

FIXTURES = Path(__file__).parent.parent / "fixtures"
RNG = np.random.default_rng(0)
TINY = {"channels": (4, 8), "layers_per_block": 1, "num_groups": 2, "latent_channels": 3, "out_channels": 1}


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def network(config: dict) -> AutoencoderKL:
    """Our autoencoder for a diffusers configuration."""
    return AutoencoderKL(
        latent_channels=config["latent_channels"],
        out_channels=config.get("out_channels", 3),
        channels=tuple(config["block_out_channels"]),
        layers_per_block=config["layers_per_block"],
        mid_attention=config.get("mid_block_add_attention", True),
        num_groups=config["norm_num_groups"],
    )


def parameters(model: AutoencoderKL, x: jax.Array) -> dict:
    """The shapes of a model's parameters, by path."""
    return flax.traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0), x)["params"])


def prepared(model: AutoencoderKL, x: jax.Array) -> dict:
    """Parameters without the zeros that networks begin with."""
    drawn = {k: 0.3 * normal(*s.shape) + (k[-1] == "scale") for k, s in parameters(model, x).items()}
    return {"params": flax.traverse_util.unflatten_dict(drawn)}


def gaussian(*shape: int) -> DiagonalGaussian:
    return DiagonalGaussian(normal(*shape), 0.5 * normal(*shape))


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("autoencoder_*.npz")), ids=lambda p: p.stem)
def test_output_equals_diffusers(path):
    reference = np.load(path)
    model = network(json.loads(str(reference["@config"])))
    x, z = nhwc(reference["@x"]), nhwc(reference["@z"])
    wanted = parameters(model, x)
    given = from_diffusers({k: reference[k] for k in reference.files if not k.startswith("@")}, wanted)
    assert {k: v.shape for k, v in given.items()} == {k: v.shape for k, v in wanted.items()}
    params = {"params": flax.traverse_util.unflatten_dict(given)}

    mean, logvar = jax.jit(lambda x: model.apply(params, x, method="encode"))(x)
    output = jax.jit(lambda z: model.apply(params, z, method="decode"))(z)

    for name, got in {"@mean": mean, "@logvar": logvar, "@output": output}.items():
        expected = reference[name].transpose(0, 2, 3, 1)
        assert np.std(expected) > 0.1
        np.testing.assert_allclose(got, expected, atol=3e-5 * np.abs(expected).max(), rtol=0, err_msg=name)


def test_stable_diffusion_s_has_the_same_parameters():
    layout = json.loads((FIXTURES / "autoencoder_layouts.json").read_text())["stable-diffusion-v1-5"]
    assert sum(math.prod(shape) for shape in layout["parameters"].values()) == 83_653_863
    assert network(layout["config"]) == AutoencoderKL()  # the defaults
    wanted = parameters(AutoencoderKL(), jnp.zeros((1, 512, 512, 3)))
    given = from_diffusers({k: np.empty(v, np.bool_) for k, v in layout["parameters"].items()}, wanted)
    assert {k: v.shape for k, v in given.items()} == {k: v.shape for k, v in wanted.items()}


@pytest.mark.parametrize(
    ("options", "side"), [({}, 14), ({"channels": (4, 8, 8)}, 7), ({"patch_size": 2, "dtype": jnp.bfloat16}, 7)]
)
def test_shapes_and_dtypes(options, side):
    model, x = AutoencoderKL(**TINY | options), jnp.zeros((2, 28, 28, 1))
    assert 28 // model.downsampling == side
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    apply = lambda method, x: jax.eval_shape(lambda p: model.apply(p, x, method=method), params)  # noqa: E731
    latents = apply("encode", x)
    assert {(y.shape, y.dtype) for y in latents} == {((2, side, side, 3), jnp.dtype("float32"))}
    images = apply("decode", jnp.zeros(latents.mean.shape))
    assert (images.shape, images.dtype) == (x.shape, jnp.float32)


def test_a_call_reconstructs_from_the_mode_or_from_a_draw():
    model, x, key = AutoencoderKL(**TINY), normal(2, 8, 4, 1), jax.random.key(1)
    params = prepared(model, x)
    apply = jax.jit(model.apply, static_argnames="method")
    posterior = apply(params, x, method="encode")
    calls = apply(params, x), apply(params, x, key)
    for latents, called in zip((posterior.mode, posterior.sample(key)), calls, strict=True):
        np.testing.assert_allclose(called, apply(params, latents, method="decode"), rtol=1e-4, atol=1e-5)
    assert np.abs(calls[0] - calls[1]).max() > 1e-3


def test_pixels_of_a_patch_come_back_in_place():
    model, x = AutoencoderKL(**TINY, patch_size=2), normal(1, 8, 8, 1)
    params = prepared(model, x)
    head = params["params"]["decoder"]["conv_out"]
    head["kernel"], head["bias"] = jnp.zeros_like(head["kernel"]), jnp.arange(4.0)
    output = jax.jit(model.apply)(params, x)
    np.testing.assert_array_equal(output[0, :, :, 0], np.tile([[0, 1], [2, 3]], (4, 4)))


def test_all_parameters_learn():
    model, x = AutoencoderKL(**TINY), normal(2, 8, 8, 1)

    @jax.jit
    @jax.grad
    def gradient(params):
        posterior = model.apply(params, x, method="encode")
        output = model.apply(params, posterior.sample(jax.random.key(0)), method="decode")
        return jnp.mean((output - x) ** 2) + jnp.mean(posterior.kl())

    for path, leaf in flax.traverse_util.flatten_dict(gradient(prepared(model, x))).items():
        if path[-2:] != ("to_k", "bias"):  # it moves all of a query's logits alike, which a softmax does not see
            assert np.abs(leaf).max() > 1e-7, path


def test_a_fresh_autoencoder_sees_its_images():
    model = AutoencoderKL(**TINY)
    params = jax.jit(model.init)(jax.random.key(0), normal(1, 8, 8, 1))
    one, other = (jax.jit(model.apply)(params, normal(1, 8, 8, 1)) for _ in range(2))
    assert np.abs(one - other).max() > 1e-2


def test_kl_is_the_integral():
    posterior = gaussian(3, 2, 1, 2)
    y = np.linspace(-30, 30, 20_001).reshape(-1, 1, 1, 1, 1)
    mean, logvar = (np.asarray(part, float) for part in posterior)
    log_ratio = 0.5 * (y**2 - (y - mean) ** 2 / np.exp(logvar) - logvar)
    density = np.exp(-0.5 * (y - mean) ** 2 / np.exp(logvar)) / np.sqrt(2 * np.pi * np.exp(logvar))
    expected = np.trapezoid(density * log_ratio, y, axis=0).sum((1, 2, 3))
    assert posterior.kl().shape == (3,)
    np.testing.assert_allclose(posterior.kl(), expected, rtol=1e-5)


def test_kl_from_itself_is_zero_and_small_ones_are_exact():
    np.testing.assert_array_equal(DiagonalGaussian(jnp.zeros((2, 3)), jnp.zeros((2, 3))).kl(), 0)
    near = DiagonalGaussian(jnp.zeros((1, 1)), jnp.full((1, 1), 1e-2))
    np.testing.assert_allclose(near.kl(), (np.expm1(np.float64(1e-2)) - 1e-2) / 2, rtol=1e-4)


def test_samples_have_its_moments():
    posterior, num = gaussian(2, 3), 40_000
    drawn = np.asarray(jax.vmap(posterior.sample)(jax.random.split(jax.random.key(0), num)), float)
    std = np.exp(0.5 * np.asarray(posterior.logvar))
    np.testing.assert_allclose((drawn.mean(0) - posterior.mean) / std, 0, atol=5 / np.sqrt(num))
    np.testing.assert_allclose(drawn.std(0) / std, 1, atol=5 / np.sqrt(2 * num))
    flat = (drawn - drawn.mean(0)).reshape(num, -1)
    np.testing.assert_allclose(np.corrcoef(flat.T), np.eye(6), atol=5 / np.sqrt(num))


def test_a_key_for_each_example():
    posterior, keys = gaussian(3, 2, 2, 4), jax.random.split(jax.random.key(0), 3)
    together = jax.vmap(DiagonalGaussian.sample)(posterior, keys)
    alone = DiagonalGaussian(posterior.mean[1], posterior.logvar[1]).sample(keys[1])
    np.testing.assert_allclose(together[1], alone, rtol=1e-6)


def test_log_variances_are_clipped():
    moments = jnp.float32([[1, -2, -99, 99], [500, -500, -30, 20]])
    mean, logvar = DiagonalGaussian.from_moments(moments)
    np.testing.assert_array_equal(mean, moments[:, :2])
    np.testing.assert_array_equal(logvar, [[-30, 20], [-30, 20]])

    model, x = AutoencoderKL(**TINY), normal(1, 8, 8, 1)
    params = prepared(model, x)
    params["params"]["quant_conv"]["bias"] = jnp.float32([0, 0, 0, -1e3, 1e3, 0])
    logvar = jax.jit(model.apply, static_argnames="method")(params, x, method="encode").logvar
    np.testing.assert_array_equal(logvar[..., :2], np.broadcast_to([-30, 20], (1, 4, 4, 2)))
    assert np.std(logvar[..., 2]) > 0


@pytest.mark.parametrize(
    ("options", "shape", "said"),
    [
        ({"channels": (4, 4, 4, 4)}, (28, 28, 1), "An AutoencoderKL of 4 levels.*divide by 8, and these are 28x28"),
        ({"patch_size": 3}, (12, 8, 1), "with patch_size 3.*divide by 6, and these are 12x8"),
        ({}, (8, 8, 3), "images of 1 channels, and these have 3"),
        ({"channels": (4, 9)}, (8, 8, 1), "num_groups 2, and 9 does not"),
    ],
)
def test_mistakes_are_told(options, shape, said):
    model = AutoencoderKL(**TINY | options)
    with pytest.raises(JaxdiffError, match=said):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))


def test_other_latents_are_refused():
    model = AutoencoderKL(**TINY)
    with pytest.raises(JaxdiffError, match="latents of 3 channels, and these have 4"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 4)), method="decode"))
