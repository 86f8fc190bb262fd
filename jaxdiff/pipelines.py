"""Where the mathematics and the networks meet: a config becomes a model, a model and its parameters become images."""

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
from jaxdiff.guidance import THRESHOLDS, classifier_free_guidance, condition
from jaxdiff.images import to_uint8
from jaxdiff.models import Condition
from jaxdiff.preconditioning import Network, make_denoiser
from jaxdiff.sampling import example_keys, initial_noise, sample
from jaxdiff.schedules import Process, make_process
from jaxdiff.solvers import SolverTable, make_grid, make_table


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


def make_sampler(diffuser: Diffuser, *, guided: bool, threshold: str = "clip", frames: int = 0) -> Callable:
    """A compiled draw(params, table, keys [B], labels [B], guidance_scale) -> Drawn.

    Not `guided` follows the labels at one evaluation a row and ignores guidance_scale. With `frames`, the predicted
    x_0 of that many rows come too, or of all where there are fewer.
    """
    diffusion = diffuser.config.diffusion

    @jax.jit
    def draw(params: Any, table: SolverTable, keys: jax.Array, labels: jax.Array, guidance_scale: jax.Array) -> Drawn:
        denoise = make_denoiser(
            make_network(diffuser, params), diffuser.process, diffusion.prediction, diffusion.sigma_data
        )
        cond = condition_on(diffuser, labels)
        if guided:
            null = condition_on(diffuser, jnp.full_like(labels, diffuser.null_label))
            denoise = classifier_free_guidance(denoise, cond, null, guidance_scale)
        else:
            denoise = condition(denoise, cond)
        x = initial_noise(table, keys, diffuser.image_shape)
        denoise = THRESHOLDS[threshold](denoise)
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


def check_sampling(diffuser: Diffuser, sampling: Sampling) -> SolverTable:
    """The solver's table, where what is asked for can be drawn from this model; else JaxdiffError."""
    unguided = not diffuser.class_names or diffuser.config.diffusion.class_dropout == 0
    if sampling.guidance_scale != 1 and unguided:
        raise JaxdiffError(
            f"guidance_scale {sampling.guidance_scale} needs a model that was trained with classes and class_dropout "
            "above 0, and this one was not: only guidance_scale 1 is possible."
        )
    return make_table(sampling.solver, make_grid(diffuser.process, sampling.num_steps, sampling.grid), eta=sampling.eta)


def generate(
    diffuser: Diffuser,
    params: Any,
    labels: np.ndarray,
    sampling: Sampling,
    *,
    seed: int = 0,
    batch_size: int = 128,
    frames: int = 0,
    draw: Callable | None = None,
) -> Iterator[Drawn]:
    """Draw one image a label, batch after batch over this host's devices; each Drawn holds at most batch_size.

    The i-th image depends on the seed, i and the options alone, to rounding: not on the batch size or the devices.
    `frames` is as in `make_sampler`; `draw` is one to use again, None makes one. Raises JaxdiffError for what the
    model can not draw.
    """
    table = check_sampling(diffuser, sampling)
    if draw is None:
        guided = sampling.guidance_scale != 1
        draw = make_sampler(diffuser, guided=guided, threshold=sampling.threshold, frames=frames)
    split, whole = over_local_devices()
    devices = jax.local_device_count()
    batch_size = -(-min(batch_size, len(labels)) // devices) * devices
    params = jax.device_put(params, whole)
    key = jax.random.key(seed)
    for start in range(0, len(labels), batch_size):
        count = min(batch_size, len(labels) - start)
        padded = np.resize(labels[start : start + count], batch_size).astype(np.int32)  # one shape, one compilation
        keys = jax.device_put(example_keys(key, start + jnp.arange(batch_size)), split)
        drawn = draw(params, table, keys, jax.device_put(padded, split), sampling.guidance_scale)
        passed = None if drawn.frames is None else np.asarray(drawn.frames)[:, :count]
        yield Drawn(np.asarray(drawn.images)[:count], passed)
