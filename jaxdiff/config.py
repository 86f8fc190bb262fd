"""What a run is made of: typed, read from a recipe and the command line, checked as a whole, saved with the run."""

import dataclasses
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import tyro
from annotated_types import Ge, Gt, Interval
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from jaxdiff.errors import JaxdiffError

Positive = Annotated[int, Gt(0)]
Count = Annotated[int, Ge(0)]
Rate = Annotated[float, Ge(0)]
Probability = Annotated[float, Interval(ge=0, le=1)]
T = TypeVar("T")

SolverName = Literal[
    "ddpm", "ddpm_large", "ddim", "euler", "euler_ancestral", "heun", "edm", "dpm2", "dpm2_ancestral", "rk4",
    "dpm_2m", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpm_2s", "dpmpp_2s", "dpmpp_3s",
    "dpmpp_2s_ancestral", "dpmpp_sde", "unipc", "deis", "lms", "plms", "pndm", "ipndm", "lcm",
    "euler_maruyama", "reverse_diffusion", "predictor_corrector",
]  # fmt: skip
SOLVER_OPTIONS = ("eta", "order", "s_churn", "corrections", "snr")
"""The fields of `Sampling` that are a solver's own: None leaves each as the solver has it."""
GridName = Literal[
    "trailing", "leading", "linspace", "karras", "exponential", "logsnr", "beta", "ays_sd", "ays_sdxl", "ays_svd"
]


class _Strict:
    """Has pydantic refuse names that a section does not have, and numbers that are none."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Data(_Strict):
    """The images."""

    name: str = "digits"
    """"digits" (scikit-learn's, 8x8, embedded), "folder", or an image data set of tensorflow-datasets."""
    data_dir: str | None = None
    """The folder of images, or where tensorflow-datasets keeps its data (None: its own default)."""
    split: str = "train"
    """What to train on."""
    eval_split: str | None = "test"
    """What the checkpoints are compared on; None compares them by the training loss."""
    image_size: Positive | None = None
    """Resize the shorter side and crop the centre to this; None keeps the size."""
    channels: Literal[1, 3] | None = None
    """1 for grey, 3 for RGB; None keeps what there is."""
    flip: bool = False
    """Mirror every second image left to right, at random."""


@dataclass(frozen=True)
class SimpleUNet(_Strict):
    """The course's network, without conditions."""

    kind: Literal["simple_unet"] = "simple_unet"
    channels: tuple[Positive, ...] = (64, 128, 256)
    time_dim: Positive = 256


@dataclass(frozen=True)
class UNet(_Strict):
    """The U-Net of DDPM and Stable Diffusion: see `jaxdiff.models.UNet`."""

    kind: Literal["unet"] = "unet"
    channels: tuple[Positive, ...] = (128, 256, 256, 256)
    """Width of each level; each level halves the size of the one before."""
    layers_per_block: Positive = 2
    attention_levels: tuple[Count, ...] = (1,)
    """The levels that attend, 0 being the largest."""
    mid_attention: bool = True
    num_heads: Positive | None = None
    dim_head: Positive = 64
    scale_shift: bool = False
    """Time scales and shifts the second norm's output, and is not added before it."""
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    patch_size: Positive = 1
    """This many by this many pixels enter as one: a space-to-depth stem."""
    num_groups: Positive = 32
    eps: Annotated[float, Gt(0)] = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: Literal[0, 1] = 0
    downsample_padding: Literal[0, 1] = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; parameters stay float32."""
    remat: bool = False
    """Work out again in the backward pass what is inside a block, which takes time and saves memory."""
    class_conditional: bool = True
    """Embed the class of each image, where the data has classes."""


@dataclass(frozen=True)
class AutoencoderKL(_Strict):
    """The autoencoder of latent diffusion: see `jaxdiff.models.AutoencoderKL`."""

    latent_channels: Positive = 4
    channels: tuple[Positive, ...] = (128, 256, 512, 512)
    """Width of each level; each level halves the size of the one before."""
    layers_per_block: Positive = 2
    mid_attention: bool = True
    patch_size: Positive = 1
    """This many by this many pixels enter as one: a space-to-depth stem."""
    num_groups: Positive = 32
    eps: Annotated[float, Gt(0)] = 1e-6
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; parameters stay float32."""
    remat: bool = False
    """Work out again in the backward pass what is inside a block, which takes time and saves memory."""


_KINDS = {"simple_unet": SimpleUNet, "unet": UNet}


@dataclass(frozen=True)
class Diffusion(_Strict):
    """The process and what is learned of it."""

    schedule: Literal["linear", "cosine", "scaled_linear", "sigmoid", "vp", "subvp", "ve", "edm", "flow"] = "linear"
    timesteps: Positive = 1000
    """Rows of a discrete schedule (the first four)."""
    zero_terminal_snr: bool = False
    """Rescale a discrete schedule so that it ends in pure noise."""
    prediction: Literal["eps", "x0", "v", "flow", "score", "edm"] = "eps"
    weighting: Literal["plain", "snr", "min_snr", "edm"] = "plain"
    min_snr_gamma: Annotated[float, Gt(0)] = 5.0
    sigma_data: Annotated[float, Gt(0)] = 0.5
    """Standard deviation of the data, for the prediction and the weighting "edm"."""
    time_distribution: Literal["uniform", "lognormal"] = "uniform"
    lognormal_mean: float = -1.2
    lognormal_std: Annotated[float, Gt(0)] = 1.2
    stratified: bool = True
    """Spread the times of a batch evenly; each by itself is distributed as before."""
    condition_dropout: Probability = 0.1
    """How often the class or the caption is withheld in training, for classifier-free guidance."""


@dataclass(frozen=True)
class Text(_Strict):
    """How captions are read: a tokenizer, and a text transformer that is trained with the network."""

    tokenizer: Literal["bytes", "clip"] = "bytes"
    vocabulary: str | None = None
    """Where CLIP's vocabulary lies, a tokenizer.json or the folder of vocab.json and merges.txt; of no use to bytes."""
    max_length: Positive = 64
    """Tokens of a prompt, begin and end included; longer captions in the data are cut, longer prompts refused."""
    hidden_size: Positive = 128
    intermediate_size: Positive = 512
    num_layers: Positive = 2
    num_heads: Positive = 4
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    pooled_only: bool = False
    """Give the network one vector for the whole caption and not one a token: an ablation."""
    run: str | None = None
    """A run whose text transformer, of the same sizes, is taken over and stays as it is; None trains one."""


@dataclass(frozen=True)
class Latent(_Strict):
    """Diffuse the latents of an autoencoder, which stays as it is, in the place of pixels."""

    run: str
    """The autoencoder's run; the new run keeps a copy of what it needs of it."""
    checkpoint: str = "latest"
    """latest, best or a step."""
    cache: bool = True
    """Encode the training images once, before the first step, and keep that in memory; False encodes in each step."""


@dataclass(frozen=True)
class Reconstruction(_Strict):
    """What an autoencoder is trained on: see `jaxdiff.training.autoencoder`."""

    error: Literal["l1", "l2"] = "l1"
    """Of a pixel, averaged over an image."""
    kl_weight: Rate = 1e-6
    """Of the divergence of an image's latents from N(0, I), in nats for each number of the image."""
    perceptual_weight: Rate = 0.0
    """Of the LPIPS distance, which needs the two files below."""
    vgg16: str | None = None
    """torchvision's vgg16-397923af.pth."""
    lpips: str | None = None
    """The heads on its features: weights/v0.1/vgg.pth of the package lpips."""
    adversarial_weight: Rate = 0.0
    """Of a discriminator of patches, which is trained along."""
    adversarial_start: Count = 0
    """The step from which the discriminator is heeded."""


@dataclass(frozen=True)
class Optimizer(_Strict):
    """The optimiser and the averages of its parameters."""

    name: Literal["adam", "adamw"] = "adam"
    learning_rate: Annotated[float, Gt(0)] = 2e-4
    warmup_steps: Count = 0
    """Steps over which the learning rate grows from 0."""
    decay: Literal["none", "cosine", "linear"] = "none"
    """How the learning rate falls to 0 at train.steps."""
    weight_decay: Rate = 0.01
    """Of adamw alone."""
    b1: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    b2: Annotated[float, Interval(ge=0, lt=1)] = 0.999
    eps: Annotated[float, Gt(0)] = 1e-8
    clip_norm: Rate = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    ema_decay: Annotated[float, Interval(ge=0, lt=1)] = 0.9999
    """Of the averaged parameters, which samples are drawn from; the first steps average over fewer."""


@dataclass(frozen=True)
class Train(_Strict):
    """The budget."""

    steps: Positive = 10_000
    batch_size: Positive = 128
    """Images per step over all devices of all hosts."""
    accumulate: Positive = 1
    """Parts that a device's share of the batch is taken in, one after the other, to save memory."""
    steps_per_call: Positive = 1
    """Steps that the devices take without asking the host, where nothing is due between: small models then do not wait
    for it."""
    parameters: Literal["replicated", "sharded"] = "replicated"
    """Copied to every device, under pmap, or spread over all of them with the optimiser's state, under jit."""
    seed: Annotated[int, Interval(ge=0, lt=2**32)] = 0


@dataclass(frozen=True)
class Guard(_Strict):
    """What is done about a bad update: one whose loss or gradient is not finite, or whose gradient is a spike."""

    skips: Count = 0
    """Bad updates in a row that are left out; one more ends the run, with what was saved before kept."""
    spike: Annotated[float, Interval(gt=1)] | None = None
    """A gradient of this many times the recent mean norm is a spike; None calls none so."""


@dataclass(frozen=True)
class Run(_Strict):
    """How often things are written; may differ when a run is resumed. 0 is never."""

    log_every: Positive = 50
    checkpoint_every: Count = 500
    """Also the rhythm of evaluation; the last step is always kept."""
    eval_images: Positive = 1024
    """At most this many images of the evaluation split are evaluated."""
    keep: Positive = 2
    """Newest checkpoints kept, beside the best."""
    sample_every: Count = 1000
    tensorboard: bool = True


@dataclass(frozen=True)
class Sampling(_Strict):
    """How samples are drawn unless `sample.py` is told otherwise."""

    solver: SolverName = "ddim"
    """`sample.py --list` says what each is."""
    num_steps: Positive = 50
    """Steps of the solver; some evaluate the network more than once in each."""
    grid: GridName = "trailing"
    final: Literal["zero", "sigma_min"] = "zero"
    """End on clean data, or at the least noise that was trained on."""
    shift: Annotated[float, Gt(0)] = 1.0
    """Of the flow process's times; above 1 spends more steps at high noise."""
    frame: Literal["noise", "flow"] | None = None
    """In which levels are measured and Runge-Kutta and Adams methods step; None is as usual for the process."""
    eta: Probability | None = None
    """Fresh noise, of the solvers that have this option (None: as each has it)."""
    order: Annotated[int, Interval(ge=1, le=4)] | None = None
    """Of the solvers that have several."""
    s_churn: Rate | None = None
    """Noise added again before a step, of euler, heun, edm and dpm2."""
    corrections: Count | None = None
    """Langevin's steps after each of the others, of predictor_corrector."""
    snr: Annotated[float, Gt(0)] | None = None
    """Signal to noise of Langevin's steps, which sets their size."""
    guidance_scale: Rate = 1.0
    """0 ignores the class, 1 follows it as the model learned it, more exaggerates it."""
    guidance_rescale: Probability = 0.0
    """How far the contrast of a guided image is brought back to that without guidance."""
    guidance_interval: tuple[Rate, Rate] | None = None
    """Guide at noise levels sigma / alpha above the first and up to the second number alone."""
    threshold: Literal["none", "clip", "dynamic"] = "clip"
    """What is done to a predicted x_0 outside [-1, 1]."""


@dataclass(frozen=True)
class Config(_Strict):
    """A whole run of a diffusion model: what most recipes in configs/ make."""

    data: Data = Data()
    model: Annotated[SimpleUNet | UNet, Field(discriminator="kind")] = UNet()
    latent: Latent | None = None
    """None diffuses pixels; a Latent what an autoencoder makes of them."""
    text: Text | None = None
    """None conditions on classes, where the data has any; a Text on captions."""
    diffusion: Diffusion = Diffusion()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    guard: Guard = Guard()
    run: Run = Run()
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class AutoencoderConfig(_Strict):
    """A whole run of an autoencoder, for others to diffuse its latents."""

    data: Data = Data()
    model: AutoencoderKL = AutoencoderKL()
    reconstruction: Reconstruction = Reconstruction()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    guard: Guard = Guard()
    run: Run = Run()


@dataclass(frozen=True)
class Hosts(_Strict):
    """How the processes of a run on several hosts find each other; left as it is, there is one."""

    auto: bool = False
    """Ask the environment: a TPU pod, Slurm, Kubernetes or Open MPI."""
    coordinator: str | None = None
    """Address and port of host 0, as 10.0.0.2:1234."""
    count: Positive | None = None
    """Of hosts."""
    index: Count | None = None
    """Of this one, from 0."""
    timeout: Positive = 60
    """Seconds without a sign of life after which a host is taken for lost, and the others end."""


CONFIGS = {"diffusion": Config, "autoencoder": AutoencoderConfig}
"""The kinds of run."""


def load_recipe(path: str | Path) -> Config | AutoencoderConfig:
    """The `config` that a recipe defines. Raises JaxdiffError where there is no such file, or what it says is wrong."""
    path = Path(path)
    if not path.is_file() or path.suffix != ".py":
        known = ", ".join(sorted(p.name for p in path.parent.glob("*.py"))) or "none"
        raise JaxdiffError(f"There is no recipe {path}; recipes in {path.parent}: {known}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, NameError, ImportError, AttributeError, TypeError) as error:
        raise JaxdiffError(f"The recipe {path} can not be read: {error}.") from error
    config = getattr(module, "config", None)
    if not isinstance(config, tuple(CONFIGS.values())):
        raise JaxdiffError(
            f"The recipe {path} does not define `config = Config(...)`, or an AutoencoderConfig in its place."
        )
    return validate(config)


def override(config: T, args: list[str], prog: str, description: str = "") -> T:
    """A config with options such as `--train.steps 2000` put in their place, not yet validated.

    An option that does not exist or does not parse is told on the terminal, with what was perhaps meant, and the
    program leaves with status 2.
    """
    return tyro.cli(
        type(config),
        default=config,
        args=args,
        prog=prog,
        description=description,
        config=(tyro.conf.AvoidSubcommands,),
    )


def validate(config: T) -> T:
    """The config itself, where every value is one that is allowed; raises JaxdiffError with a sentence a mistake."""
    return from_dict(type(config), dataclasses.asdict(config))


def from_dict(section: type[T], values: dict) -> T:
    """A section, or a whole config, from nested dicts. Raises JaxdiffError with a sentence for each mistake."""
    try:
        config = TypeAdapter(section).validate_python(values)
    except ValidationError as error:
        raise JaxdiffError(" ".join(_sentence(entry, section) for entry in error.errors())) from error
    if isinstance(config, Config):
        _check_diffusion(config.diffusion)
        if config.latent and config.sampling.threshold != "none":
            raise JaxdiffError(
                f"sampling.threshold {config.sampling.threshold!r} holds pixels to [-1, 1], and latents have no such "
                "bounds: choose none."
            )
    if isinstance(config, AutoencoderConfig):
        _check_reconstruction(config.reconstruction)
    return config


def to_dict(config: Any) -> dict:
    """The config as what JSON can hold; `from_dict` takes it back."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def _check_reconstruction(reconstruction: Reconstruction) -> None:
    if reconstruction.perceptual_weight and not (reconstruction.vgg16 and reconstruction.lpips):
        raise JaxdiffError(
            "reconstruction.perceptual_weight needs the weights of LPIPS, as the files reconstruction.vgg16 "
            "(https://download.pytorch.org/models/vgg16-397923af.pth) and reconstruction.lpips (weights/v0.1/vgg.pth "
            "of the package lpips)."
        )


def _check_diffusion(diffusion: Diffusion) -> None:
    if diffusion.zero_terminal_snr and diffusion.schedule not in ("linear", "cosine", "scaled_linear", "sigmoid"):
        raise JaxdiffError(
            "diffusion.zero_terminal_snr rescales betas, and the schedule "
            f"{diffusion.schedule!r} has none: choose linear, cosine, scaled_linear or sigmoid."
        )
    if diffusion.zero_terminal_snr and diffusion.prediction in ("eps", "score"):
        raise JaxdiffError(
            f"diffusion.prediction {diffusion.prediction!r} tells nothing of the image where zero_terminal_snr ends: "
            "choose v, x0, flow or edm."
        )


def _sentence(error: dict, section: type) -> str:
    """One mistake that pydantic found: where it is, what is allowed, what was given."""
    # the model's kind stands in the path though it is no part of the option's name
    where = ".".join(str(part) for part in error["loc"] if part not in _KINDS)
    if error["type"] == "unexpected_keyword_argument":
        return f"There is no option {where}; there are {_siblings(error['loc'][:-1], section)}."
    if error["type"].startswith("union_tag"):
        return f"{where}.kind must be one of {', '.join(_KINDS)}."
    return f"{where} {error['msg'].removeprefix('Input ')}, not {error['input']!r}."


def _siblings(path: tuple[str, ...], section: type) -> str:
    """The options that a section has at a path."""
    for name in path:
        types = {field.name: field.type for field in dataclasses.fields(section)}
        wanted = _KINDS.get(name, types.get(name, section))
        sections = [part for part in (wanted, *get_args(wanted)) if dataclasses.is_dataclass(part)]
        section = sections[0] if sections else section
    return ", ".join(field.name for field in dataclasses.fields(section))


def differences(one: Any, other: Any, *, ignore: tuple[str, ...] = ()) -> list[str]:
    """Where two configs differ, as "train.steps: 1000 and 2000"; `ignore` names sections or single options."""

    def flat(tree: dict, prefix: str = "") -> dict:
        entries = {}
        for name, value in tree.items():
            path = prefix + name
            if path not in ignore:
                entries |= flat(value, path + ".") if isinstance(value, dict) else {path: value}
        return entries

    a, b = flat(to_dict(one)), flat(to_dict(other))
    return [f"{path}: {a.get(path)} and {b.get(path)}" for path in sorted({*a, *b}) if a.get(path) != b.get(path)]
