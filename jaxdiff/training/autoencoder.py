"""What an autoencoder learns: images from few numbers, which stay near N(0, I) and are to look right as well."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.data import ImageDataset
from jaxdiff.data.captions import uncaptioned
from jaxdiff.images import to_float, to_uint8
from jaxdiff.latents import Autoencoder, init_autoencoder, posterior
from jaxdiff.models import LPIPS, DiagonalGaussian, PatchDiscriminator, load_lpips
from jaxdiff.sampling import example_keys
from jaxdiff.training.learner import COLUMNS, Learner, Params, Place


def autoencoder_learner(autoencoder: Autoencoder) -> Learner:
    """How an autoencoder is trained (Kingma & Welling 2014; Rombach et al. 2022, appendix G).

    The loss of an image is its mean error a pixel, the divergence of its latents from N(0, I), the LPIPS distance
    (Zhang et al. 2018) of its reconstruction and what a discriminator of patches (Isola et al. 2017) makes of that,
    each with its weight of the config; the discriminator learns in the same step.
    Raises JaxdiffError where the files of LPIPS can not be read, or images are too small for what is asked.
    """
    reconstruction = autoencoder.config.reconstruction
    discriminator = PatchDiscriminator() if reconstruction.adversarial_weight else None
    frozen = {}
    if reconstruction.perceptual_weight:
        frozen["lpips"] = load_lpips(Path(reconstruction.vgg16), Path(reconstruction.lpips))
    image = jnp.zeros((1, *autoencoder.image_shape))

    def init(key: jax.Array) -> Params:
        params = init_autoencoder(autoencoder.model, autoencoder.image_shape, key)
        if discriminator:
            params["discriminator"] = discriminator.init(jax.random.fold_in(key, 1), image)["params"]
        return params

    def losses(params: Params, batch: dict[str, jax.Array], place: Place) -> dict[str, jax.Array]:
        return example_losses(autoencoder, discriminator, params, batch, place)

    shapes = {"image": jax.ShapeDtypeStruct((1, *autoencoder.image_shape), np.uint8)}
    like = jax.eval_shape(init, jax.random.key(0)) | frozen
    told = jax.eval_shape(lambda p, b: losses(p, b, Place(jax.random.key(0), jnp.arange(1), 1)), like, shapes)
    return Learner(
        config=autoencoder.config,
        init=init,
        averaged=("autoencoder",),
        frozen=frozen,
        metrics=tuple(told),
        losses=losses,
        prepare=lambda dataset, cache: uncaptioned(dataset),
        make_preview=lambda dataset: make_preview(autoencoder, dataset),
    )


def example_losses(
    autoencoder: Autoencoder,
    discriminator: PatchDiscriminator | None,
    params: Params,
    batch: dict[str, jax.Array],
    place: Place,
) -> dict[str, jax.Array]:
    """Each example's "loss" and what it is made of, [B] each.

    "mse": mean squared error a pixel, in [-1, 1]. "kl": nats an image. "lpips", "adversarial" (the hinge loss of the
    autoencoder) and "discriminator" (its own) where they have a weight. Without "discriminator" among the parameters,
    as in an evaluation of averaged ones, both of the last are 0.
    """
    reconstruction = autoencoder.config.reconstruction
    images = to_float(batch["image"])
    gaussian = posterior(autoencoder.model, params, images)
    latents = jax.vmap(DiagonalGaussian.sample)(gaussian, example_keys(place.key, place.index))
    rebuilt = autoencoder.model.apply({"params": params["autoencoder"]}, latents, method="decode")

    mean = lambda x: jnp.mean(x, axis=range(1, x.ndim))  # noqa: E731
    kl = gaussian.kl()
    told = {"mse": mean((rebuilt - images) ** 2), "kl": kl}
    error = told["mse"] if reconstruction.error == "l2" else mean(jnp.abs(rebuilt - images))
    loss = error + reconstruction.kl_weight * kl / np.prod(autoencoder.image_shape)
    if reconstruction.perceptual_weight:
        told["lpips"] = LPIPS().apply({"params": params["lpips"]}, images, rebuilt)
        loss += reconstruction.perceptual_weight * told["lpips"]
    if discriminator:
        told |= {"adversarial": jnp.zeros_like(loss), "discriminator": jnp.zeros_like(loss)}
    if discriminator and "discriminator" in params:
        judge = lambda params, images: discriminator.apply({"params": params}, images)  # noqa: E731
        # two games in one gradient: the autoencoder learns from a judge that stands still, the judge from still images
        told["adversarial"] = -mean(judge(jax.lax.stop_gradient(params["discriminator"]), rebuilt))
        real = judge(params["discriminator"], images)
        drawn = judge(params["discriminator"], jax.lax.stop_gradient(rebuilt))
        told["discriminator"] = mean(jax.nn.relu(1 - real) + jax.nn.relu(1 + drawn)) / 2
        heeded = place.step >= reconstruction.adversarial_start
        loss += heeded * (reconstruction.adversarial_weight * told["adversarial"] + told["discriminator"])
    return {"loss": loss, **told}


def make_preview(autoencoder: Autoencoder, dataset: ImageDataset) -> Callable[[Params], np.ndarray]:
    """Draws what is looked at: a row of images, a row of what becomes of them, and so on four times."""
    images = dataset.read(np.arange(4 * COLUMNS) % dataset.size)["image"]

    @jax.jit
    def rebuild(params: Params) -> jax.Array:
        return to_uint8(autoencoder.model.apply({"params": params["autoencoder"]}, to_float(images)))

    def preview(params: Params) -> np.ndarray:
        pairs = np.stack([images, np.asarray(rebuild(params))])  # [2, 4 * 8, ...] to rows that take turns
        rows = pairs.reshape(2, 4, COLUMNS, *images.shape[1:]).swapaxes(0, 1)
        return rows.reshape(-1, *images.shape[1:])

    return preview
