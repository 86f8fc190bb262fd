"""Where the mathematics and the networks meet: a config becomes a model, a model and its parameters become images."""

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdiff import models
from jaxdiff.config import Config, Sampling, SimpleUNet
from jaxdiff.errors import JaxdiffError
from jaxdiff.guidance import THRESHOLDS, classifier_free_guidance, condition, guidance_interval, inpaint
from jaxdiff.images import to_uint8
from jaxdiff.models import Condition
from jaxdiff.preconditioning import Network, make_denoiser
from jaxdiff.sampling import example_keys, initial_noise, noised, sample
from jaxdiff.schedules import Process, make_process
from jaxdiff.solvers import SolverTable, make_grid, make_table, tail


class Diffuser(NamedTuple):
    """A diffusion model without its parameters: the network, the process, and what it draws.

    image_shape: (H, W, C). class_names: what the labels 0, 1, ... stand for; empty where the network takes none.
    """

    config: Config
    model: nn.Module
    process: Process
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]

    @property
    def null_label(self) -> int:
        """The label that stands for no class: one more than the last."""
        return len(self.class_names)


def make_diffuser(config: Config, image_shape: Sequence[int], class_names: Sequence[str]) -> Diffuser:
    """Build what a config describes, for images [H, W, C] of these classes.

    Raises JaxdiffError where the network does not fit the images, before anything is compiled.
    """
    options = {key: value for key, value in vars(config.model).items() if key not in ("kind", "class_conditional")}
    channels = image_shape[-1]
    if isinstance(config.model, SimpleUNet):
        class_names = ()
        model = models.SimpleUNet(out_channels=channels, **options)
    else:
        class_names = tuple(class_names) if config.model.class_conditional else ()
        options["dtype"] = jnp.dtype(options["dtype"])
        classes = len(class_names) + 1 if class_names else None
        model = models.UNet(out_channels=channels, num_class_embeds=classes, **options)
    diffusion = config.diffusion
    process = make_process(diffusion.schedule, diffusion.timesteps, diffusion.zero_terminal_snr)
    diffuser = Diffuser(config, model, process, tuple(image_shape), class_names)
    jax.eval_shape(lambda: init_params(diffuser, jax.random.key(0)))
    return diffuser


def init_params(diffuser: Diffuser, key: jax.Array) -> Any:
    """Fresh parameters of the network."""
    x = jnp.zeros((1, *diffuser.image_shape))
    return diffuser.model.init(key, x, jnp.zeros(1), condition_on(diffuser, jnp.zeros(1, jnp.int32)))["params"]


def condition_on(diffuser: Diffuser, labels: jax.Array) -> Condition:
    """The condition of labels [B]; empty where the network takes none."""
    return Condition(label=labels) if diffuser.class_names else Condition()


def make_network(diffuser: Diffuser, params: Any, dropout_key: jax.Array | None = None) -> Network:
    """The network as F(x, c_noise, cond), training with dropout where a key is given."""
    train = dropout_key is not None
    rngs = {"dropout": dropout_key} if train else None
    return lambda x, t, cond: diffuser.model.apply({"params": params}, x, t, cond, train=train, rngs=rngs)


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

    labels: int [B]. negative: labels [B] that guidance leads away from, instead of from no class.
    image: [B, H, W, C] in [-1, 1], to start from with the noise of the table's first node. mask: [B, H, W, 1], 1 where
    that image is kept.
    """

    labels: jax.Array
    negative: jax.Array | None = None
    image: jax.Array | None = None
    mask: jax.Array | None = None


def make_sampler(diffuser: Diffuser, *, threshold: str = "clip", frames: int = 0) -> Callable:
    """A compiled draw(params, table, keys [B], request, guidance) -> Drawn, one program for all tables of a shape.

    Guidance that is None follows the labels at one evaluation a row.

    With `frames`, the predicted x_0 of that many rows come too, or of all where there are fewer.
    """
    diffusion = diffuser.config.diffusion

    @jax.jit
    def draw(
        params: Any, table: SolverTable, keys: jax.Array, request: Request, guidance: Guidance | None = None
    ) -> Drawn:
        denoise = make_denoiser(
            make_network(diffuser, params), diffuser.process, diffusion.prediction, diffusion.sigma_data
        )
        cond = condition_on(diffuser, request.labels)
        if guidance is None:
            denoise = condition(denoise, cond)
        else:
            away = jnp.full_like(request.labels, diffuser.null_label) if request.negative is None else request.negative
            scale = guidance_interval(guidance.scale, guidance.low, guidance.high)
            denoise = classifier_free_guidance(denoise, cond, condition_on(diffuser, away), scale, guidance.rescale)
        denoise = THRESHOLDS[threshold](denoise)
        if request.mask is not None:
            denoise = inpaint(denoise, request.image, request.mask)
        if request.image is None:
            x = initial_noise(table, keys, diffuser.image_shape)
        else:
            x = noised(table, request.image, keys)
        if not frames:
            return Drawn(to_uint8(sample(denoise, table, x, keys)), None)
        x, passed = sample(denoise, table, x, keys, trajectory=True)
        rows = np.unique(np.linspace(0, len(passed.x0) - 1, frames).round().astype(int))
        return Drawn(to_uint8(x), to_uint8(passed.x0[rows]))

    return draw


def over_local_devices() -> tuple[NamedSharding, NamedSharding]:
    """How arrays lie on this host's devices: split along their first axis, and copied whole to each."""
    mesh = Mesh(np.asarray(jax.local_devices()), ("batch",))
    return NamedSharding(mesh, PartitionSpec("batch")), NamedSharding(mesh, PartitionSpec())


def check_sampling(diffuser: Diffuser, sampling: Sampling, strength: float = 1.0) -> SolverTable:
    """The solver's table, where what is asked for can be drawn from this model; else JaxdiffError.

    strength: the share of the steps that are taken, where one starts from an image.
    """
    unguided = not diffuser.class_names or diffuser.config.diffusion.class_dropout == 0
    if sampling.guidance_scale != 1 and unguided:
        raise JaxdiffError(
            f"guidance_scale {sampling.guidance_scale} needs a model that was trained with classes and class_dropout "
            "above 0, and this one was not: only guidance_scale 1 is possible."
        )
    placing = {"final": sampling.final, "shift": sampling.shift, "frame": sampling.frame}
    grid = make_grid(diffuser.process, sampling.num_steps, sampling.grid, **placing)
    options = {name: getattr(sampling, name) for name in ("eta", "order", "s_churn")}
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
    """Draw an image for each row of a request, in batches over this host's devices; a Drawn holds at most batch_size.

    The i-th image depends on the seed, i, its row and the options alone, to rounding: not on the batch size or the
    devices. strength: the share of the steps that are taken from the request's image on. `frames` is as in
    `make_sampler`; `draw` is one to use again, None makes one.
    Raises JaxdiffError for what the model can not draw, and a request whose parts do not fit.
    """
    table = check_sampling(diffuser, sampling, strength)
    guidance = guidance_of(sampling)
    if request.negative is not None and guidance is None:
        raise JaxdiffError("Guidance leads away from negative labels: choose a guidance_scale other than 1.")
    if request.image is None and (request.mask is not None or strength != 1):
        raise JaxdiffError("A mask, and a strength below 1, are of an image, and there is none.")
    num, shape = len(request.labels), diffuser.image_shape
    fitting = Request((num,), (num,), (num, *shape), (num, *shape[:2], 1))
    for name, part, fits in zip(Request._fields, request, fitting, strict=True):
        if part is not None and part.shape != fits:
            raise JaxdiffError(f"For {num} images of this model a request's {name} is {fits}, not {part.shape}.")
    if draw is None:
        draw = make_sampler(diffuser, threshold=sampling.threshold, frames=frames)
    split, whole = over_local_devices()
    devices = jax.local_device_count()
    batch_size = -(-min(batch_size, num) // devices) * devices
    params = jax.device_put(params, whole)
    key = jax.random.key(seed)
    for start in range(0, num, batch_size):
        index = start + np.arange(batch_size)
        at = operator.itemgetter(np.minimum(index, num - 1))  # a last batch of the same size, for one compilation
        keys = jax.device_put(example_keys(key, index), split)
        drawn = draw(params, table, keys, jax.device_put(jax.tree.map(at, request), split), guidance)
        count = min(batch_size, num - start)
        passed = None if drawn.frames is None else np.asarray(drawn.frames)[:, :count]
        yield Drawn(np.asarray(drawn.images)[:count], passed)
