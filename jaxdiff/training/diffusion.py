"""What a diffusion model learns: to predict, at times drawn per example, what was noised, in pixels or in latents."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.data import ImageDataset
from jaxdiff.data.captions import captioned, tokenized, uncaptioned
from jaxdiff.data.dataset import precomputed
from jaxdiff.devices import fetch, over_devices, put
from jaxdiff.errors import JaxdiffError
from jaxdiff.images import to_float
from jaxdiff.latents import draw_latents, posterior
from jaxdiff.losses import diffusion_loss, stratify, time_from_uniform
from jaxdiff.models import DiagonalGaussian
from jaxdiff.pipelines import (
    Diffuser,
    Request,
    condition_on,
    frozen_parts,
    generate,
    init_params,
    make_network,
    make_sampler,
    null_prompt,
    prompt_of,
)
from jaxdiff.sampling import example_keys
from jaxdiff.schedules import expand
from jaxdiff.training.learner import COLUMNS, Learner, Params, Place


def diffusion_learner(diffuser: Diffuser, frozen: Params | None = None) -> Learner:
    """How a diffusion model is trained beside the parts that are `frozen`."""
    frozen = frozen or {}
    trained = lambda params: {name: params[name] for name in params if name not in frozen_parts(diffuser.config)}  # noqa: E731
    parts = trained(jax.eval_shape(lambda: init_params(diffuser, jax.random.key(0))))
    return Learner(
        config=diffuser.config,
        init=lambda key: trained(init_params(diffuser, key)),
        averaged=tuple(parts),
        frozen=frozen,
        metrics=("loss",),
        losses=lambda params, batch, place: {"loss": example_losses(diffuser, params, batch, place)},
        prepare=lambda data, cache: with_prompts(diffuser, encoded(diffuser, frozen, data) if cache else data),
        make_preview=lambda dataset: make_preview(diffuser, frozen, with_prompts(diffuser, dataset)),
    )


def example_losses(diffuser: Diffuser, params: Params, batch: dict[str, jax.Array], place: Place) -> jax.Array:
    """The loss of each example [B] of a part of a batch, with times and noise drawn per example.

    batch: {"image": uint8 [B, H, W, C], "label": [B]}, for captions also "tokens" and "mask" [B, L], and "moments"
    in the place of images that were encoded before. With a dropout_key the network's dropout is on and conditions are
    withheld; without, neither.
    """
    diffusion = diffuser.config.diffusion
    noise_key, time_key, condition_key, latent_key = jax.random.split(place.key, 4)
    x_0 = what_is_diffused(diffuser, params, batch, example_keys(latent_key, place.index))
    noise = jax.vmap(lambda k: jax.random.normal(k, diffuser.shape))(example_keys(noise_key, place.index))
    if diffusion.stratified:
        u = stratify(jax.random.uniform(time_key), place.index, place.batch_size)
    else:
        u = jax.vmap(jax.random.uniform)(example_keys(time_key, place.index))
    t = time_from_uniform(
        diffuser.process,
        u,
        diffusion.time_distribution,
        mean=diffusion.lognormal_mean,
        std=diffusion.lognormal_std,
    )
    prompt = prompt_of(diffuser, batch)
    if place.dropout_key is not None and diffusion.condition_dropout:
        withheld = jax.vmap(jax.random.uniform)(example_keys(condition_key, place.index)) < diffusion.condition_dropout
        choose = lambda null, given: jnp.where(expand(withheld, given.ndim), null, given)  # noqa: E731
        prompt = jax.tree.map(choose, null_prompt(diffuser, len(place.index)), prompt)
    return diffusion_loss(
        make_network(diffuser, params, place.dropout_key),
        diffuser.process,
        x_0,
        t,
        noise,
        condition_on(diffuser, params, prompt),
        prediction=diffusion.prediction,
        weighting=diffusion.weighting,
        min_snr_gamma=diffusion.min_snr_gamma,
        sigma_data=diffusion.sigma_data,
    )


def what_is_diffused(diffuser: Diffuser, params: Params, batch: dict[str, jax.Array], keys: jax.Array) -> jax.Array:
    """The pixels of a batch [B, H, W, C] in [-1, 1], or latents [B, h, w, D] drawn with a key each."""
    if diffuser.autoencoder is None:
        return to_float(batch["image"])
    if "moments" in batch:
        gaussian = DiagonalGaussian.from_moments(batch["moments"])
    else:
        gaussian = posterior(diffuser.autoencoder, params, to_float(batch["image"]))
    return draw_latents(params, gaussian, keys)


def encoded(diffuser: Diffuser, frozen: Params, dataset: ImageDataset) -> ImageDataset:
    """The data with "moments" [B, h, w, 2 D] in the place of images, encoded here and now; of pixels, the data itself.

    Raises JaxdiffError where images are to be mirrored, which those that are encoded already can not be.
    """
    config = diffuser.config
    if config.latent is None or not config.latent.cache:
        return dataset
    if config.data.flip:
        raise JaxdiffError("data.flip mirrors images, and latent.cache encodes them before: set one of them to False.")
    split, whole = over_devices()
    frozen = put(frozen, whole)

    @jax.jit
    def moments_of(frozen: Any, images: jax.Array) -> jax.Array:
        return jnp.concatenate(posterior(diffuser.autoencoder, frozen, to_float(images)), axis=-1)

    def encode(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        images = batch.pop("image")
        return batch | {"moments": fetch(moments_of(frozen, put(images, split)))}

    return precomputed(dataset, encode, block=256 * jax.device_count(), what="encoding")


def with_prompts(diffuser: Diffuser, dataset: ImageDataset) -> ImageDataset:
    """The data with what the model reads of them: their captions as tokens, made from the classes where there are none.

    Raises JaxdiffError where a model of captions is given neither captions nor classes.
    """
    if diffuser.text is None:
        return uncaptioned(dataset)
    return tokenized(dataset if dataset.captions else captioned(dataset), diffuser.text.tokenizer)


def make_preview(diffuser: Diffuser, frozen: Params, dataset: ImageDataset) -> Callable[[Params], np.ndarray]:
    """Draws what is looked at: eight images a row, of each class (at most ten) or of the first eight captions."""
    sampling = diffuser.config.sampling
    draw = make_sampler(diffuser, threshold=sampling.threshold)
    if diffuser.text:
        prompt = prompt_of(diffuser, dataset.read(np.arange(COLUMNS) % dataset.size))
    else:
        prompt = np.arange(min(len(diffuser.class_names), 10) or COLUMNS)
    request = Request(jax.tree.map(lambda rows: np.repeat(rows, COLUMNS, axis=0), prompt))

    def preview(params: Params) -> np.ndarray:
        parts = generate(diffuser, frozen | params, request, sampling, draw=draw)
        return np.concatenate([part.images for part in parts])

    return preview
