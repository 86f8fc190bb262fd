"""Where the mathematics and the networks meet: a config becomes a model, a model and its parameters become images."""

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from jaxtyping import Float

from jaxdiff import models
from jaxdiff.config import SOLVER_OPTIONS, Config, Sampling, SimpleUNet, Text
from jaxdiff.config import AutoencoderKL as AutoencoderSection
from jaxdiff.devices import fetch, over_devices, put
from jaxdiff.errors import JaxdiffError
from jaxdiff.guidance import (
    THRESHOLDS,
    ConditionalDenoiser,
    classifier_free_guidance,
    condition,
    guidance_interval,
    inpaint,
)
from jaxdiff.images import to_uint8
from jaxdiff.latents import build, decode, draw_latents, init_autoencoder, latent_shape, posterior, unit_scaling
from jaxdiff.models import AutoencoderKL, Condition
from jaxdiff.preconditioning import Network, make_denoiser, precondition
from jaxdiff.sampling import example_keys, initial_noise, noised, sample
from jaxdiff.schedules import Process, expand, make_process, node_at
from jaxdiff.solvers import SolverTable, make_grid, make_table, tail
from jaxdiff.text import ByteTokenizer, ClipTokenizer, Tokenizer, Tokens


class TextEncoder(NamedTuple):
    """How a model reads prompts: a tokenizer, and the network from tokens to vectors."""

    tokenizer: Tokenizer
    model: nn.Module


class Diffuser(NamedTuple):
    """A diffusion model without its parameters: the network, the process, and what it draws.

    image_shape: (H, W, C) of the images. class_names: what the labels 0, 1, ... stand for; empty where the network
    takes none. text: what reads prompts; None where the network takes none. autoencoder: what makes the latents that
    are diffused; None where that are the pixels.
    """

    config: Config
    model: nn.Module
    process: Process
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    text: TextEncoder | None = None
    autoencoder: AutoencoderKL | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of what is diffused: that of the images, or of their latents."""
        return latent_shape(self.autoencoder, self.image_shape) if self.autoencoder else self.image_shape

    @property
    def null_label(self) -> int:
        """The label that stands for no class: one more than the last."""
        return len(self.class_names)

    @property
    def conditional(self) -> bool:
        """Whether the network takes a condition at all."""
        return bool(self.class_names) or self.text is not None


Prompt = jax.Array | Tokens
"""What images are to show, a row each: labels [B] (of no meaning to a model without classes), or texts as tokens."""


def make_diffuser(
    config: Config,
    image_shape: Sequence[int],
    class_names: Sequence[str],
    autoencoder: AutoencoderSection | None = None,
) -> Diffuser:
    """Build what a config describes, for images [H, W, C] of these classes.

    autoencoder: what that of the run `config.latent.run` is built of, for a config that has a `latent`.
    Raises JaxdiffError where the network does not fit the images, before anything is compiled.
    """
    options = {key: value for key, value in vars(config.model).items() if key not in ("kind", "class_conditional")}
    if (config.latent is None) != (autoencoder is None):
        raise JaxdiffError("A config with a section latent, and no other, needs its autoencoder.")
    encoder = build(autoencoder, image_shape[-1]) if autoencoder else None
    channels = autoencoder.latent_channels if autoencoder else image_shape[-1]
    text = make_text_encoder(config.text) if config.text else None
    if isinstance(config.model, SimpleUNet):
        if text:
            raise JaxdiffError("The simple_unet takes no captions: choose the model unet, or leave text out.")
        class_names = ()
        model = models.SimpleUNet(out_channels=channels, **options)
    else:
        class_names = tuple(class_names) if config.model.class_conditional and not text else ()
        options["dtype"] = jnp.dtype(options["dtype"])
        options["context_dim"] = config.text.hidden_size if text else None
        classes = len(class_names) + 1 if class_names else None
        model = models.UNet(out_channels=channels, num_class_embeds=classes, **options)
    diffusion = config.diffusion
    process = make_process(diffusion.schedule, diffusion.timesteps, diffusion.zero_terminal_snr)
    diffuser = Diffuser(config, model, process, tuple(image_shape), class_names, text, encoder)
    jax.eval_shape(lambda: init_params(diffuser, jax.random.key(0)))
    return diffuser


def make_text_encoder(text: Text) -> TextEncoder:
    """What a config says of reading prompts. Raises JaxdiffError where the vocabulary is not to be had."""
    if text.tokenizer == "clip":
        if text.vocabulary is None:
            raise JaxdiffError('The tokenizer "clip" needs text.vocabulary: a tokenizer.json, or the folder of one.')
        tokenizer = ClipTokenizer(text.vocabulary, text.max_length)
    else:
        tokenizer = ByteTokenizer(text.max_length)
    sizes = (text.hidden_size, text.intermediate_size, text.num_layers, text.num_heads, text.max_length)
    model = models.CLIPTextModel(tokenizer.vocab_size, *sizes, text.hidden_act, eos_token_id=tokenizer.end_id)
    return TextEncoder(tokenizer, model)


def init_params(diffuser: Diffuser, key: jax.Array) -> dict[str, Any]:
    """Fresh parameters of all parts: "network", and where there are such, "text", "autoencoder" and "latents".

    Those that are taken from another run stand here for their shapes alone: see `frozen_parts`.
    """
    params = {}
    prompt = null_prompt(diffuser, 1)
    if diffuser.text:
        params["text"] = diffuser.text.model.init(jax.random.fold_in(key, 1), *prompt)["params"]
    if diffuser.autoencoder:
        params |= init_autoencoder(diffuser.autoencoder, diffuser.image_shape, jax.random.fold_in(key, 2))
        params["latents"] = unit_scaling(diffuser.autoencoder.latent_channels)
    x, cond = jnp.zeros((1, *diffuser.shape)), condition_on(diffuser, params, prompt)
    return params | {"network": diffuser.model.init(key, x, jnp.zeros(1), cond)["params"]}


def frozen_parts(config: Config) -> tuple[str, ...]:
    """The parts of the parameters that are taken from other runs and not trained."""
    parts = ["autoencoder", "latents"] if config.latent else []
    return (*parts, "text") if config.text and config.text.run else tuple(parts)


def to_diffused(
    diffuser: Diffuser, params: dict[str, Any], images: jax.Array, keys: jax.Array | None = None
) -> jax.Array:
    """What is diffused of images [B, H, W, C] in [-1, 1]: they themselves, or their latents [B, h, w, D].

    Latents are drawn with a key each, or are the most likely ones where keys is None.
    """
    if diffuser.autoencoder is None:
        return images
    return draw_latents(params, posterior(diffuser.autoencoder, params, images), keys)


def to_images(diffuser: Diffuser, params: dict[str, Any], x: jax.Array) -> jax.Array:
    """The images [B, H, W, C] that samples are or, in latent space, decode to; not clipped to [-1, 1]."""
    return x if diffuser.autoencoder is None else decode(diffuser.autoencoder, params, x)


def mask_of_diffused(diffuser: Diffuser, mask: jax.Array) -> jax.Array:
    """A mask [B, H, W, 1] of pixels for what is diffused: a latent is kept where all of its pixels are."""
    ratio = 1 if diffuser.autoencoder is None else diffuser.autoencoder.downsampling
    return reduce(mask, "b (h i) (w j) c -> b h w c", "min", i=ratio, j=ratio)


def null_prompt(diffuser: Diffuser, num: int) -> Prompt:
    """As many prompts that ask for nothing: the label after the last, or the empty text."""
    if diffuser.text is None:
        return jnp.full(num, diffuser.null_label)
    empty = diffuser.text.tokenizer.encode([""])
    return jax.tree.map(lambda row: jnp.repeat(jnp.asarray(row), num, axis=0), empty)


def prompt_of(diffuser: Diffuser, batch: dict[str, jax.Array]) -> Prompt:
    """The prompts that come with a batch's images."""
    return batch["label"] if diffuser.text is None else Tokens(batch["tokens"], batch["mask"])


def condition_on(diffuser: Diffuser, params: dict[str, Any], prompt: Prompt) -> Condition:
    """The condition that prompts make; empty where the network takes none."""
    if diffuser.text is None:
        return Condition(label=prompt) if diffuser.class_names else Condition()
    hidden, pooled = diffuser.text.model.apply({"params": params["text"]}, *prompt)
    if diffuser.config.text.pooled_only:
        return Condition(context=pooled[:, None])
    return Condition(context=hidden, context_mask=prompt.mask)


def make_network(diffuser: Diffuser, params: Any, dropout_key: jax.Array | None = None) -> Network:
    """The network as F(x, c_noise, cond), training with dropout where a key is given."""
    train = dropout_key is not None
    rngs = {"dropout": dropout_key} if train else None
    return lambda x, t, cond: diffuser.model.apply({"params": params["network"]}, x, t, cond, train=train, rngs=rngs)


def conditional_denoiser(diffuser: Diffuser, params: dict[str, Any]) -> ConditionalDenoiser:
    """The model as denoise(x, node, cond) -> x0_hat, with a cond that `condition_on` makes."""
    diffusion = diffuser.config.diffusion
    network = make_network(diffuser, params)
    return make_denoiser(network, diffuser.process, diffusion.prediction, diffusion.sigma_data)


def attention_maps(
    diffuser: Diffuser, params: dict[str, Any], x: jax.Array, t: jax.Array, prompt: Prompt
) -> Float[jax.Array, "B L H W"]:
    """Where in x_t [B, H, W, C], at times t [B], the network looks for each token of prompts.

    x_t: images or, of a latent model, latents. The mean over layers and heads, each enlarged to x_t's size; over the L
    tokens they sum to 1 everywhere.
    Raises JaxdiffError for a model that reads no prompts.
    """
    if diffuser.text is None:
        raise JaxdiffError("This model was trained without captions, and attends to none.")
    node = node_at(diffuser.process, t)
    p = precondition(diffuser.config.diffusion.prediction, node.alpha, node.sigma, diffuser.config.diffusion.sigma_data)
    variables = {"params": params["network"]}
    cond = condition_on(diffuser, params, prompt)
    c_noise = diffuser.process.c_noise(t)
    _, seen = diffuser.model.apply(variables, expand(p.c_in, x.ndim) * x, c_noise, cond, mutable="attention")
    height, width = x.shape[1:3]
    maps = []
    for weights in jax.tree.leaves(seen):
        rows = round((weights.shape[2] * height / width) ** 0.5)
        small = rearrange(weights.mean(1), "b (h w) l -> b l h w", h=rows)
        maps.append(jnp.repeat(jnp.repeat(small, height // rows, 2), height // rows, 3))
    return sum(maps) / len(maps)


class Drawn(NamedTuple):
    """A batch of samples, and what the sampler predicted them to be on the way.

    images: uint8 [B, H, W, C]. frames: uint8 [F, B, H, W, C] from noise to data, or None where not asked for.
    """

    images: np.ndarray
    frames: np.ndarray | None


class Guidance(NamedTuple):
    """How to guide: see `classifier_free_guidance`; between the noise levels low and high alone."""

    scale: jax.Array | float
    rescale: jax.Array | float = 0.0
    low: jax.Array | float = 0.0
    high: jax.Array | float = np.inf


class Request(NamedTuple):
    """What to draw, a row for each image; parts that are None ask for nothing and cost nothing.

    prompt: what to show. negative: prompts that guidance leads away from, instead of from none.
    image: [B, H, W, C] in [-1, 1], to start from with the noise of the table's first node. mask: [B, H, W, 1], 1 where
    that image is kept.
    """

    prompt: Prompt
    negative: Prompt | None = None
    image: jax.Array | None = None
    mask: jax.Array | None = None


def make_sampler(diffuser: Diffuser, *, threshold: str = "clip", frames: int = 0) -> Callable:
    """A compiled draw(params, table, keys [B], request, guidance) -> Drawn, one program for all tables of a shape.

    Guidance that is None follows the prompts at one evaluation a row.

    With `frames`, the predicted x_0 of that many rows come too, or of all where there are fewer.
    """

    @jax.jit
    def draw(
        params: Any, table: SolverTable, keys: jax.Array, request: Request, guidance: Guidance | None = None
    ) -> Drawn:
        denoise = conditional_denoiser(diffuser, params)
        cond = condition_on(diffuser, params, request.prompt)
        if guidance is None:
            denoise = condition(denoise, cond)
        else:
            away = null_prompt(diffuser, len(keys)) if request.negative is None else request.negative
            null = condition_on(diffuser, params, away)
            scale = guidance_interval(guidance.scale, guidance.low, guidance.high)
            denoise = classifier_free_guidance(denoise, cond, null, scale, guidance.rescale)
        denoise = THRESHOLDS[threshold](denoise)
        image = None if request.image is None else to_diffused(diffuser, params, request.image)
        if request.mask is not None:
            denoise = inpaint(denoise, image, mask_of_diffused(diffuser, request.mask))
        x = initial_noise(table, keys, diffuser.shape) if image is None else noised(table, image, keys)
        pictures = lambda x: to_uint8(to_images(diffuser, params, x))  # noqa: E731
        if not frames:
            return Drawn(pictures(sample(denoise, table, x, keys)), None)
        x, passed = sample(denoise, table, x, keys, trajectory=True)
        rows = np.unique(np.linspace(0, len(passed.x0) - 1, frames).round().astype(int))
        return Drawn(pictures(x), jax.lax.map(pictures, passed.x0[rows]))

    return draw


def check_sampling(diffuser: Diffuser, sampling: Sampling, strength: float = 1.0) -> SolverTable:
    """The solver's table, where what is asked for can be drawn from this model; else JaxdiffError.

    strength: the share of the steps that are taken, where one starts from an image.
    """
    unguided = not diffuser.conditional or diffuser.config.diffusion.condition_dropout == 0
    if sampling.guidance_scale != 1 and unguided:
        raise JaxdiffError(
            f"guidance_scale {sampling.guidance_scale} needs a model that was trained with classes or captions and "
            "condition_dropout above 0, and this one was not: only guidance_scale 1 is possible."
        )
    if diffuser.autoencoder and sampling.threshold != "none":
        raise JaxdiffError(
            f"threshold {sampling.threshold!r} holds pixels to [-1, 1], and this model draws latents: choose none."
        )
    if sampling.guidance_scale == 1 and (sampling.guidance_interval or sampling.guidance_rescale):
        raise JaxdiffError("guidance_interval and guidance_rescale need guidance: a guidance_scale other than 1.")
    if sampling.guidance_interval and not sampling.guidance_interval[0] < sampling.guidance_interval[1]:
        low, high = sampling.guidance_interval
        raise JaxdiffError(f"guidance_interval goes from a noise level up to a higher one, not from {low} to {high}.")
    placing = {"final": sampling.final, "shift": sampling.shift, "frame": sampling.frame}
    grid = make_grid(diffuser.process, sampling.num_steps, sampling.grid, **placing)
    options = {name: getattr(sampling, name) for name in SOLVER_OPTIONS}
    options = {name: value for name, value in options.items() if value is not None}
    return make_table(sampling.solver, grid if strength == 1 else tail(grid, strength), **options)


def guidance_of(sampling: Sampling) -> Guidance | None:
    """What the options say of guidance; None where they ask for none, which halves the work."""
    if sampling.guidance_scale == 1:
        return None
    return Guidance(sampling.guidance_scale, sampling.guidance_rescale, *(sampling.guidance_interval or (0.0, np.inf)))


def generate(
    diffuser: Diffuser,
    params: Any,
    request: Request,
    sampling: Sampling,
    *,
    strength: float = 1.0,
    seed: int = 0,
    batch_size: int = 128,
    frames: int = 0,
    draw: Callable | None = None,
) -> Iterator[Drawn]:
    """Draw an image for each row of a request, in batches over all devices; a Drawn holds at most batch_size.

    Where there are several hosts, all ask for the same, and each gets all of it.

    The i-th image depends on the seed, i, its row and the options alone, to rounding: not on the batch size or the
    devices. strength: the share of the steps that are taken from the request's image on. `frames` is as in
    `make_sampler`; `draw` is one to use again, None makes one.
    Raises JaxdiffError for what the model can not draw, and a request whose parts do not fit.
    """
    table = check_sampling(diffuser, sampling, strength)
    guidance = guidance_of(sampling)
    if request.negative is not None and guidance is None:
        raise JaxdiffError("Guidance leads away from negative prompts: choose a guidance_scale other than 1.")
    if request.image is None and (request.mask is not None or strength != 1):
        raise JaxdiffError("A mask, and a strength below 1, are of an image, and there is none.")
    num, shape = len(jax.tree.leaves(request.prompt)[0]), diffuser.image_shape
    prompts = jax.tree.map(np.shape, null_prompt(diffuser, num))
    fitting = Request(prompts, prompts, (num, *shape), (num, *shape[:2], 1))
    for name, part, fits in zip(Request._fields, request, fitting, strict=True):
        if part is not None and (given := jax.tree.map(np.shape, part)) != fits:
            raise JaxdiffError(f"For {num} images of this model a request's {name} is {fits}, not {given}.")
    if draw is None:
        draw = make_sampler(diffuser, threshold=sampling.threshold, frames=frames)
    split, whole = over_devices()
    devices = jax.device_count()
    batch_size = -(-min(batch_size, num) // devices) * devices
    params = put(params, whole)
    key = jax.random.key(seed)
    for start in range(0, num, batch_size):
        index = start + np.arange(batch_size)
        at = operator.itemgetter(np.minimum(index, num - 1))  # a last batch of the same size, for one compilation
        keys = put(example_keys(key, index), split)
        drawn = fetch(draw(params, table, keys, put(jax.tree.map(at, request), split), guidance))
        count = min(batch_size, num - start)
        passed = None if drawn.frames is None else drawn.frames[:, :count]
        yield Drawn(drawn.images[:count], passed)
