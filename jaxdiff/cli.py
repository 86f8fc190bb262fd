"""The command lines of the scripts: options, their defaults, and mistakes told in a sentence."""

import argparse
import errno
import functools
import logging
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, TypeVar

import jax
import numpy as np
import tyro
from annotated_types import Interval

from jaxdiff import hosts
from jaxdiff.checkpoints import check_kind, read_run
from jaxdiff.config import (
    SOLVER_OPTIONS,
    AutoencoderConfig,
    Config,
    Count,
    Hosts,
    Positive,
    Sampling,
    load_recipe,
    override,
    validate,
)
from jaxdiff.data.decoding import open_image, to_array
from jaxdiff.errors import JaxdiffError
from jaxdiff.images import to_float
from jaxdiff.pipelines import Diffuser, Prompt, Request
from jaxdiff.solvers import SOLVERS, describe_grids

Options = TypeVar("Options")


@dataclass(frozen=True)
class TrainOptions:
    """Options of train.py: a recipe, where to put the run, and any value of the recipe."""

    config: str = "configs/digits.py"
    """The recipe."""
    workdir: str = ""
    """Where the run is or will be; left empty, runs/<name of the recipe>."""
    hosts: Hosts = field(default_factory=Hosts)
    recipe: Annotated[Config | AutoencoderConfig, tyro.conf.arg(name="")] = field(default_factory=Config)


@dataclass(frozen=True)
class SampleOptions:
    """Options of sample.py: a run, what to draw from it, and how."""

    workdir: str = "runs/digits"
    """The run."""
    checkpoint: str = "latest"
    """latest, best or a step."""
    labels: tuple[str, ...] = ()
    """Classes to draw, by number or name, repeated in turn; left empty, all of them."""
    prompt: tuple[str, ...] = ()
    """Texts to draw, an equal share of the images each; of models of captions, in the place of labels."""
    prompts_file: str | None = None
    """A file with a text a line, in UTF-8, instead of --prompt."""
    num: Positive = 80
    """How many images."""
    out: str = "samples.png"
    """A picture of all (.png), or uint8 arrays (.npz)."""
    columns: Count = 0
    """Of the picture; 0 makes one a label, or a square."""
    animation: str | None = None
    """Also write the predicted images from noise to data as a .gif or .webp."""
    negative: tuple[str, ...] = ()
    """Classes or texts that guidance leads away from, repeated as those to draw are; left empty, from none."""
    image: str | None = None
    """A picture to start from, brought to the model's size and colours."""
    strength: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """The share of the steps that are taken from the picture on: little changes it little."""
    mask: str | None = None
    """A picture whose white parts are kept of --image, and black ones drawn."""
    seed: Count = 0
    batch_size: Positive = 256
    """Images drawn at a time."""
    list: bool = False
    """Say what solvers and grids there are, and leave."""
    hosts: Hosts = field(default_factory=Hosts)
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of jaxdiff.evaluate: a run, what of it to measure, and how to sample."""

    workdir: str = "runs/digits"
    """The run."""
    checkpoint: str = "latest"
    """latest, best or a step."""
    num: Positive = 1000
    """How many images to draw."""
    split: str | None = None
    """Of the run's data, to compare with; None is the one that it was evaluated on."""
    data_dir: str | None = None
    """Where the data are, if not where the run had them."""
    pixels: bool = True
    """Compare by the pixels themselves."""
    classifier: str | None = None
    """Compare by the features of a classifier that benchmarks/classifier.py trained (.npz)."""
    inception: str | None = None
    """Compare by Inception's: pt_inception-2015-12-05-6726825d.pth of pytorch-fid."""
    k: Positive = 5
    """The nearest neighbour by which precision, recall, density and coverage are told."""
    bits_images: Count = 0
    """Of how many images to measure the bits; 0 leaves it out."""
    bound_terms: Positive = 20
    """Terms of the variational bound that are drawn for each image."""
    rtol: Annotated[float, Interval(gt=0, le=0.1)] = 1e-4
    """Tolerance of the probability flow."""
    seed: Count = 0
    batch_size: Positive = 256
    """Images at a time."""
    hosts: Hosts = field(default_factory=Hosts)
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)


def parse_train_options(args: list[str], description: str) -> TrainOptions:
    """The options of train.py; those of the recipe are named as in the recipe, as in `--train.steps`."""
    path = _peek(args, "--config", TrainOptions.config)
    defaults = TrainOptions(path, f"runs/{Path(path).stem}", recipe=load_recipe(path))
    options = override(defaults, args, "train.py", description)
    return replace(options, recipe=validate(options.recipe))


def parse_sample_options(args: list[str], description: str) -> SampleOptions:
    """The options of sample.py; how to sample is what the run's config says unless told otherwise."""
    options = _with_run(SampleOptions(), args, "sample.py", description)
    options = replace(options, prompt=read_prompts(options), prompts_file=None)
    if Path(options.out).suffix not in (".npz", ".png", ".jpg", ".webp"):
        raise JaxdiffError(f"--out must end in .png, .jpg, .webp or .npz, and {options.out} does not.")
    if options.animation and Path(options.animation).suffix not in (".gif", ".webp"):
        raise JaxdiffError(f"--animation must end in .gif or .webp, and {options.animation} does not.")
    return options


def parse_evaluate_options(args: list[str], description: str) -> EvaluateOptions:
    """The options of jaxdiff.evaluate; how to sample is what the run's config says unless told otherwise."""
    return _with_run(EvaluateOptions(), args, "jaxdiff.evaluate", description)


def _with_run(options: Options, args: list[str], prog: str, description: str) -> Options:
    """Options that have a workdir, in which how to sample is what its run's config says unless told otherwise."""
    workdir = _peek(args, "--workdir", options.workdir)
    sampling = Sampling()
    if not {"--help", "-h", "--list"} & set(args):
        check_kind(model := read_run(workdir), Diffuser, workdir)
        sampling = model.config.sampling
    if _peek(args, "--solver", sampling.solver) != sampling.solver:  # whose options are not those of another
        sampling = replace(sampling, **dict.fromkeys(SOLVER_OPTIONS))
    return validate(override(replace(options, workdir=workdir, sampling=sampling), args, prog, description))


def describe_samplers() -> str:
    """The solvers and the grids, a line each."""
    solvers = {name: solver.about for name, solver in SOLVERS.items()}
    parts = []
    for title, entries in (("Solvers (--solver)", solvers), ("Grids (--grid)", describe_grids())):
        parts += [title, *(f"  {name:<20} {about}" for name, about in entries.items())]
    return "\n".join(parts)


def read_image(path: str, image_shape: tuple[int, int, int]) -> np.ndarray:
    """A picture as the model takes it, float32 [H, W, C] in [-1, 1], its centred square where the model's is one.

    Raises JaxdiffError where it can not be read, and where a model of other proportions needs another size.
    """
    height, width, channels = image_shape
    pixels = to_array(open_image(path), height if height == width else None, channels)
    if pixels.shape != image_shape:
        raise JaxdiffError(f"{path} is {pixels.shape[1]}x{pixels.shape[0]}, and this model draws {width}x{height}.")
    return to_float(pixels)


def make_request(diffuser: Diffuser, options: SampleOptions) -> Request:
    """What the options of sample.py ask a model for. Raises JaxdiffError for classes and pictures that do not do."""
    num, shape = options.num, diffuser.image_shape
    for_each = lambda array: np.broadcast_to(array, (num, *array.shape))  # noqa: E731
    return Request(
        choose_prompts(diffuser, options.labels, options.prompt, num),
        negative=as_prompt(diffuser, options.negative, num) if options.negative else None,
        image=for_each(read_image(options.image, shape)) if options.image else None,
        mask=for_each(read_image(options.mask, (*shape[:2], 1)) > 0) if options.mask else None,
    )


def read_prompts(options: SampleOptions) -> tuple[str, ...]:
    """The texts of --prompt or --prompts-file; JaxdiffError for both, and for a file that is missing or not UTF-8."""
    if options.prompts_file is None:
        return options.prompt
    if options.prompt:
        raise JaxdiffError("Give the texts by --prompt or by --prompts-file, not by both.")
    try:
        lines = Path(options.prompts_file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise JaxdiffError(f"The prompts in {options.prompts_file} can not be read: {error}.") from error
    if not (prompts := tuple(line.strip() for line in lines if line.strip())):
        raise JaxdiffError(f"There is no prompt in {options.prompts_file}.")
    return prompts


def choose_prompts(diffuser: Diffuser, labels: tuple[str, ...], prompts: tuple[str, ...], num: int) -> Prompt:
    """What to draw: texts for a model of captions, none of them being the empty text, and labels for any other."""
    if diffuser.text is None:
        if prompts:
            raise JaxdiffError("This model was trained without captions: leave --prompt out, and choose --labels.")
    elif labels:
        raise JaxdiffError("This model was trained on captions: leave --labels out, and say what to draw by --prompt.")
    return as_prompt(diffuser, labels if diffuser.text is None else prompts or ("",), num)


def as_prompt(diffuser: Diffuser, wanted: tuple[str, ...], num: int) -> Prompt:
    """Classes, or texts as tokens [num, L] with an equal share each in turn, as the model takes them.

    Raises JaxdiffError for a class that the model does not know, and for a text that is too long.
    """
    if diffuser.text is None:
        return choose_labels(diffuser, wanted, num)
    share = -(-num // len(wanted))
    tokens = diffuser.text.tokenizer.encode(wanted)
    return jax.tree.map(lambda rows: np.repeat(rows, share, axis=0)[:num], tokens)


def default_columns(diffuser: Diffuser, options: SampleOptions) -> int | None:
    """Of a picture: a column a class, or a row a text; None, a square, where there is neither."""
    if diffuser.text and options.prompt:
        return -(-options.num // len(options.prompt))
    return len(options.labels) or len(diffuser.class_names) or None


def prompt_arrays(diffuser: Diffuser, prompt: Prompt) -> dict[str, np.ndarray]:
    """What was asked for, to be saved beside the images: their labels, or the texts."""
    if diffuser.text is None:
        return {"labels": prompt}
    return {"prompts": np.array(diffuser.text.tokenizer.decode(prompt.tokens))}


def choose_labels(diffuser: Diffuser, wanted: tuple[str, ...], num: int) -> np.ndarray:
    """Labels [num] int32, from numbers or names repeated in turn; none wanted is all classes.

    Raises JaxdiffError for a class that the model does not know.
    """
    names = list(diffuser.class_names)
    if wanted and not names:
        raise JaxdiffError("This model was trained without classes: leave --labels and --negative out.")
    numbers = []
    for label in wanted:
        if label in names:
            numbers.append(names.index(label))
        elif label.isdecimal() and int(label) < len(names):
            numbers.append(int(label))
        else:
            raise JaxdiffError(
                f"There is no class {label!r}; there are the numbers 0 to {len(names) - 1}, or {', '.join(names)}."
            )
    return np.resize(numbers or range(max(len(names), 1)), num).astype(np.int32)


def told_in_a_sentence(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """Have a script's main print a JaxdiffError as one line and return 1, and a full disk; all else stays a traceback.

    One of several hosts leaves without waiting for the others, which notice; and what it says of an error that comes
    from the loss of another is one line.
    """

    @functools.wraps(main)
    def wrapped(args: list[str]) -> int:
        logging.basicConfig(format="%(message)s", force=True)  # importing Orbax has already set another format
        logging.getLogger("jaxdiff").setLevel(logging.INFO)
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells every step of a save
        try:
            return main(args)
        except JaxdiffError as error:
            said = str(error)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            said = f"{error.filename or 'A file'} can not be written: {error.strerror}. What was saved before is kept."
        except BaseException as error:
            if not jax.distributed.is_initialized():
                raise
            traceback.print_exc()
            said = f"This host ends: {type(error).__name__}."
            if isinstance(error, jax.errors.JaxRuntimeError):
                said = (
                    f"Host {jax.process_index()} of {jax.process_count()} (from 0) ends because another did or can not "
                    "be reached: run the same command again on all of them."
                )
        print(f"error: {said}", file=sys.stderr)
        if jax.distributed.is_initialized():
            hosts.leave(1)
        return 1

    return wrapped


def _peek(args: list[str], name: str, default: str) -> str:
    """The value of one option, read before the others because their defaults depend on it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(name, default=default)
    return vars(parser.parse_known_args(args)[0])[name.removeprefix("--")]
