"""What an autoencoder is trained on: each term by itself, and the discriminator's game."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, split_over
from flax import jax_utils

from jaxdiff import config as c
from jaxdiff.data import open_dataset
from jaxdiff.errors import JaxdiffError
from jaxdiff.images import to_float
from jaxdiff.latents import make_autoencoder, measure_scaling, posterior
from jaxdiff.models import LPIPS, DiagonalGaussian, PatchDiscriminator
from jaxdiff.sampling import example_keys
from jaxdiff.training import Place, autoencoder_learner, init_state, make_train_step
from jaxdiff.training.autoencoder import example_losses
from jaxdiff.training.loop import make_evaluation

CONFIG = c.load_recipe(ROOT / "tests" / "fixtures" / "tiny_vae_recipe.py")
SHAPE = (16, 16, 1)  # of a size that the discriminator's convolutions leave something of
RNG = np.random.default_rng(0)
BATCH = {"image": RNG.integers(0, 256, (8, *SHAPE), dtype=np.uint8), "label": np.zeros(8, np.int32)}
PLACE = Place(jax.random.key(3), jnp.arange(8), 8)
SMALL = PatchDiscriminator(channels=8, num_layers=1, num_groups=4)


def make(**reconstruction):
    optimizer = replace(CONFIG.optimizer, eps=1e-3)  # as in test_step.py: small gradients are not blown up
    config = replace(CONFIG, optimizer=optimizer, reconstruction=c.Reconstruction(**reconstruction))
    return make_autoencoder(config, SHAPE)


@pytest.fixture(scope="module")
def params():
    learner = autoencoder_learner(make())
    judge = SMALL.init(jax.random.key(1), jnp.zeros((1, *SHAPE)))["params"]
    return learner.init(jax.random.key(0)) | {"discriminator": judge}


def test_the_loss_is_the_sum_of_its_parts(params):
    autoencoder = make(error="l2", kl_weight=0.3)
    told = example_losses(autoencoder, None, params, BATCH, PLACE)
    x = to_float(BATCH["image"])
    gaussian = posterior(autoencoder.model, params, x)
    latents = jnp.stack(
        [
            DiagonalGaussian(mean, logvar).sample(key)
            for mean, logvar, key in zip(*gaussian, example_keys(PLACE.key, PLACE.index), strict=True)
        ]
    )
    rebuilt = autoencoder.model.apply({"params": params["autoencoder"]}, latents, method="decode")
    mse = np.mean((rebuilt - x) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(told["mse"], mse, rtol=1e-4)
    np.testing.assert_allclose(told["loss"], mse + 0.3 * gaussian.kl() / 256, rtol=1e-4)
    absolute = example_losses(make(error="l1", kl_weight=0.0), None, params, BATCH, PLACE)
    np.testing.assert_allclose(absolute["loss"], np.mean(np.abs(rebuilt - x), axis=(1, 2, 3)), rtol=1e-4)
    assert set(told) == {"loss", "mse", "kl"}


def test_the_perceptual_term_is_the_distance_of_lpips(params):
    autoencoder = make(kl_weight=0.0, perceptual_weight=0.5, vgg16="a.pth", lpips="b.pth")
    features = LPIPS().init(jax.random.key(0), jnp.zeros((1, *SHAPE)), jnp.zeros((1, *SHAPE)))["params"]
    told = example_losses(autoencoder, None, params | {"lpips": features}, BATCH, PLACE)
    plain = example_losses(make(kl_weight=0.0), None, params, BATCH, PLACE)
    assert float(told["lpips"].min()) > 0
    np.testing.assert_allclose(told["loss"], plain["loss"] + 0.5 * told["lpips"], rtol=1e-4)


def test_the_autoencoder_and_the_discriminator_each_learn_from_their_own_loss(params):
    autoencoder = make(kl_weight=0.0, adversarial_weight=0.1)

    def gradients(name, of):
        total = lambda part: jnp.mean(  # noqa: E731
            example_losses(autoencoder, SMALL, params | {of: part}, BATCH, PLACE)[name]
        )
        return jax.grad(total)(params[of])

    size = lambda tree: max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert size(gradients("discriminator", "autoencoder")) == 0
    assert size(gradients("adversarial", "discriminator")) == 0
    both = jax.tree.map(
        lambda loss, judge: np.testing.assert_allclose(loss, judge, atol=1e-6),
        gradients("loss", "discriminator"),
        gradients("discriminator", "discriminator"),
    )
    assert jax.tree.leaves(both) == []
    assert min(size(gradients("adversarial", "autoencoder")), size(gradients("discriminator", "discriminator"))) > 1e-4


def test_the_discriminator_is_heeded_from_its_step_on_and_absent_from_an_evaluation(params):
    autoencoder = make(kl_weight=0.0, adversarial_weight=0.1, adversarial_start=5)
    plain = example_losses(make(kl_weight=0.0), None, params, BATCH, PLACE)["loss"]
    before, after = (
        example_losses(autoencoder, SMALL, params, BATCH, PLACE._replace(step=step))["loss"] for step in (4, 5)
    )
    np.testing.assert_allclose(before, plain, rtol=1e-6)
    assert float(jnp.abs(after - plain).min()) > 1e-3
    averaged = {"autoencoder": params["autoencoder"]}
    told = example_losses(autoencoder, SMALL, averaged, BATCH, PLACE._replace(step=9))
    np.testing.assert_allclose(told["loss"], plain, rtol=1e-6)
    assert float(told["discriminator"].max()) == 0


@pytest.mark.slow
def test_a_step_does_not_depend_on_the_number_of_devices(monkeypatch):
    monkeypatch.setattr("jaxdiff.training.autoencoder.PatchDiscriminator", lambda: SMALL)
    learner = autoencoder_learner(make(adversarial_weight=0.1))
    assert set(learner.metrics) == {"loss", "mse", "kl", "adversarial", "discriminator"}
    one = jax.jit(make_train_step(learner))(init_state(learner), BATCH, learner.frozen)
    devices = jax.devices()[:4]
    state, frozen = jax_utils.replicate((init_state(learner), learner.frozen), devices)
    step = jax.pmap(make_train_step(learner, "batch"), axis_name="batch", devices=devices)
    four = jax_utils.unreplicate(step(state, split_over(len(devices), BATCH), frozen))
    assert set(one.params) == {"autoencoder", "discriminator"}
    assert set(one.ema_params) == {"autoencoder"}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, jax.device_get(four))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), one.params, init_state(learner).params)
    for part in moved.values():
        assert max(jax.tree.leaves(part)) > 1e-4


def test_an_evaluation_tells_all_metrics():
    autoencoder = make_autoencoder(CONFIG, (8, 8, 1))
    learner = autoencoder_learner(autoencoder)
    digits = open_dataset("digits", "test")
    params = learner.init(jax.random.key(0))
    told = make_evaluation(learner, digits, most=24)(params)
    assert set(told) == {"eval_loss", "eval_mse", "eval_kl"}
    kl = posterior(autoencoder.model, params, to_float(digits.read(np.arange(24))["image"])).kl()
    np.testing.assert_allclose(told["eval_kl"], kl.mean(), rtol=1e-4)


def test_the_picture_has_rows_of_images_and_of_what_becomes_of_them():
    learner = autoencoder_learner(make_autoencoder(CONFIG, (8, 8, 1)))
    digits = open_dataset("digits")
    drawn = learner.make_preview(digits)(learner.init(jax.random.key(0)))
    images = digits.read(np.arange(32))["image"].reshape(4, 8, 8, 8, 1)
    rows = drawn.reshape(4, 2, 8, 8, 8, 1)
    np.testing.assert_array_equal(rows[:, 0], images)
    assert not np.array_equal(rows[:, 1], images)


def test_the_scaling_is_measured_channel_by_channel():
    """Latents of known means and spreads, a part of which is the encoder's own uncertainty."""
    means = np.random.default_rng(1).normal([3.0, -1.0], [2.0, 0.1], (1000, 2, 2, 2))
    logvar = np.broadcast_to(np.log([0.5, 0.01]), means.shape)
    factors = measure_scaling(lambda index: DiagonalGaussian(means[index], logvar[index]), 1000, block=100)
    np.testing.assert_allclose(factors["shift_factor"], means.mean((0, 1, 2)), rtol=1e-5)
    expected = (means.var((0, 1, 2)) + np.array([0.5, 0.01])) ** -0.5
    np.testing.assert_allclose(factors["scaling_factor"], expected, rtol=1e-5)
    still = DiagonalGaussian(np.ones((100, 2, 2, 2)), np.full((100, 2, 2, 2), -30.0))
    with pytest.raises(JaxdiffError, match="a channel that does not vary"):
        measure_scaling(lambda index: still, 1000, block=100)


@pytest.mark.parametrize(
    ("reconstruction", "said"),
    [
        ({"perceptual_weight": 1.0}, "needs the weights of LPIPS"),
        ({"kl_weight": -1.0}, "reconstruction.kl_weight"),
        ({"error": "l3"}, "reconstruction.error"),
    ],
)
def test_a_reconstruction_that_can_not_be_is_told_by_the_config(reconstruction, said):
    with pytest.raises(JaxdiffError, match=said):
        c.validate(replace(CONFIG, reconstruction=c.Reconstruction(**reconstruction)))


def test_files_that_are_missing_and_images_that_are_too_small_are_told():
    with pytest.raises(JaxdiffError, match=r"a\.pth"):
        autoencoder_learner(make(perceptual_weight=1.0, vgg16="a.pth", lpips="b.pth"))
    small = make_autoencoder(replace(CONFIG, reconstruction=c.Reconstruction(adversarial_weight=1.0)), (8, 8, 1))
    with pytest.raises(JaxdiffError, match="PatchDiscriminator"):
        autoencoder_learner(small)
    with pytest.raises(JaxdiffError, match="AutoencoderKL"):
        make_autoencoder(CONFIG, (9, 8, 1))
