"""A run on disk: its config, and Orbax checkpoints of its state."""

import json
import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint import checkpoint_managers

from jaxdiff.config import CONFIGS, AutoencoderConfig, AutoencoderKL, Config, differences, from_dict, to_dict
from jaxdiff.errors import JaxdiffError
from jaxdiff.latents import Autoencoder, init_autoencoder, make_autoencoder, measure_scaling, posterior
from jaxdiff.pipelines import Diffuser, check_sampling, frozen_parts, init_params, make_diffuser

T = TypeVar("T", Diffuser, Autoencoder)

FROZEN = "frozen"
"""The folder of a run, and the part of the checkpoint there, with the parameters that it took over from others."""

MAY_DIFFER = ("run", "sampling", "train.steps")
"""What a resumed run may be given anew: nothing that the steps already taken depended on."""


class Frozen(NamedTuple):
    """What a run takes over from others and does not train; empty for most.

    params: by part. autoencoder: what that part is built of.
    """

    params: dict[str, Any] = {}  # noqa: RUF012  # never changed
    autoencoder: AutoencoderKL | None = None


def open_run(
    config: Config | AutoencoderConfig,
    image_shape: Sequence[int],
    class_names: Sequence[str],
    workdir: str | Path,
    adopted: Callable[[], Frozen] = Frozen,
) -> tuple[Diffuser | Autoencoder, dict[str, Any]]:
    """Save the config of a new run in its workdir, or check it against the one that is there.

    Returns its model, and the parameters that it takes over: a new run `adopted()` ones, of which it keeps a copy.
    Raises JaxdiffError where the config asks for what can not be built or sampled, and where the workdir holds a run
    of another config, or something that is no run's config; nothing is written then.
    """
    path = Path(workdir) / "config.json"
    there = path.exists()
    if there:
        before, section = _read_config(workdir)
        if differing := differences(before.config, config, ignore=MAY_DIFFER):
            raise JaxdiffError(
                f"{workdir} holds a run of another config (there and here, {'; '.join(differing)}): "
                "choose another --workdir, or the options that it was begun with."
            )
        frozen = Frozen({}, section)
    else:
        frozen = adopted()
    model = _make_model(config, image_shape, class_names, frozen.autoencoder)
    if isinstance(model, Diffuser):
        check_sampling(model, config.sampling)
    if there and (before.image_shape, before.class_names) != (model.image_shape, model.class_names):
        raise JaxdiffError(f"{workdir} holds a run on other images or classes: choose another --workdir.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if frozen.params:
        with open_checkpoints(workdir, name=FROZEN) as checkpoints:
            save(checkpoints, 0, {FROZEN: jax.device_get(frozen.params)})
    content = {
        "kind": next(kind for kind, section in CONFIGS.items() if isinstance(config, section)),
        "config": to_dict(config),
        "image_shape": list(image_shape),
        "class_names": list(class_names),
        "autoencoder": frozen.autoencoder and to_dict(frozen.autoencoder),
    }
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    unfinished.replace(path)
    return model, load_frozen(workdir, model)


def read_run(workdir: str | Path) -> Diffuser | Autoencoder:
    """The model of the run in a workdir. Raises JaxdiffError where there is none or its config can not be read."""
    return _read_config(workdir)[0]


def _read_config(workdir: str | Path) -> tuple[Diffuser | Autoencoder, AutoencoderKL | None]:
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise JaxdiffError(f"There is no run in {workdir}: train.py --workdir {workdir} makes one.")
    try:
        content = json.loads(path.read_text())
        section, config = CONFIGS[content["kind"]], content["config"]
        shape, names, autoencoder = content["image_shape"], content["class_names"], content["autoencoder"]
    except (ValueError, KeyError, TypeError) as error:
        raise JaxdiffError(f"{path} is damaged ({error!r}): put back what train.py wrote there.") from error
    autoencoder = autoencoder and from_dict(AutoencoderKL, autoencoder)
    return _make_model(from_dict(section, config), shape, names, autoencoder), autoencoder


def _make_model(
    config: Config | AutoencoderConfig,
    image_shape: Sequence[int],
    class_names: Sequence[str],
    autoencoder: AutoencoderKL | None,
) -> Diffuser | Autoencoder:
    if isinstance(config, AutoencoderConfig):
        return make_autoencoder(config, image_shape, class_names)
    return make_diffuser(config, image_shape, class_names, autoencoder)


def _shapes_of(model: Diffuser | Autoencoder) -> tuple[dict[str, Any], dict[str, Any]]:
    """The shapes of the parameters of a model that are trained, and of those that are not, by part."""
    key = jax.random.key(0)
    if isinstance(model, Autoencoder):
        return jax.eval_shape(lambda: init_autoencoder(model.model, model.image_shape, key)), {}
    parts = jax.eval_shape(lambda: init_params(model, key))
    return parts, {name: parts.pop(name) for name in frozen_parts(model.config)}


def open_checkpoints(
    workdir: str | Path, keep: int = 1, writing: bool = True, name: str = "checkpoints"
) -> ocp.CheckpointManager:
    """The checkpoints of a run, of which the newest `keep` and the one of least loss stay; closing waits for saves.

    Raises JaxdiffError where the loss of one does not read.
    """
    directory = Path(workdir).absolute() / name
    for path in directory.glob("*/metrics/metrics"):  # Orbax reads them all at once, whichever is asked for
        try:
            json.loads(path.read_text())
        except ValueError as error:
            raise JaxdiffError(_damaged(path.parents[1], f"its loss does not read: {error}")) from error
    policy = checkpoint_managers.AnyPreservationPolicy(
        [
            checkpoint_managers.LatestN(keep),
            # the last of the descending order is preserved: the least loss
            checkpoint_managers.BestN(get_metric_fn=_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False),
        ]
    )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy,
        best_fn=_loss,  # the policy decides, but without this the metrics are not written, and lost with the process
        create=writing,
        cleanup_tmp_directories=writing,
    )
    return ocp.CheckpointManager(directory, options=options)


def _loss(metrics: dict[str, float]) -> float:
    return metrics.get("loss", math.inf)


def save(checkpoints: ocp.CheckpointManager, step: int, parts: dict[str, Any], loss: float | None = None) -> None:
    """Save host copies of trees of arrays by name, which can be restored one without the others; does not wait.

    A checkpoint appears whole, by a rename, or not at all. It carries a checksum of each part. The one of least
    `loss` is kept as the best; None is no candidate.
    """
    args = {name: ocp.args.StandardSave(tree) for name, tree in parts.items()}
    sums = {name: checksum(tree) for name, tree in parts.items()}
    checkpoints.save(
        step,
        args=ocp.args.Composite(checksums=ocp.args.JsonSave(sums), **args),
        metrics={} if loss is None else {"loss": loss},
    )


def restore(checkpoints: ocp.CheckpointManager, step: int, like: dict[str, Any]) -> dict[str, Any]:
    """Parts of a checkpoint ("state", "ema_params" ...) as trees of arrays like those given, which lend their shapes.

    Raises JaxdiffError where a part is missing, does not read, has other shapes or is not what was saved.
    """
    where = Path(checkpoints.directory) / str(step)
    template = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
    try:
        for name in like:
            _read_through(where / name)
        args = {name: ocp.args.StandardRestore(tree) for name, tree in template.items()}
        restored = checkpoints.restore(step, args=ocp.args.Composite(checksums=ocp.args.JsonRestore(), **args))
        sums = {name: checksum(restored[name]) for name in like}
        intact = all(restored["checksums"][name] == sums[name] for name in like)
        alike = _shapes(template) == _shapes({name: restored[name] for name in like})
    except Exception as error:  # whatever reading a damaged file raises, in Orbax or below
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise JaxdiffError(_damaged(where, reason)) from error
    if not intact or not alike:
        raise JaxdiffError(_damaged(where, f"its {'checksum' if alike else 'shape'} differs"))
    return {name: restored[name] for name in like}


def _read_through(part: Path) -> None:
    """Read every value of a part, one after the other.

    Orbax reads them side by side, and when one fails the others print tracebacks of the event loop that it left.
    """
    database = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{part}/"}).result()
    for key in database.list().result():
        database.read(key).result()


def _damaged(where: Path, reason: str) -> str:
    others = sorted(int(path.name) for path in where.parent.iterdir() if path.name.isdecimal() and path != where)
    rest = f"there are also {', '.join(map(str, others))}" if others else "there is no other"
    return f"The checkpoint {where} is damaged ({reason}): delete that folder to go on from another; {rest}."


def _shapes(tree: Any) -> list[tuple]:
    """Shape and type of every array of a tree."""
    return [(np.shape(x), np.asarray(x).dtype) for x in jax.tree.leaves(tree)]


def checksum(tree: Any) -> int:
    """CRC-32 of all arrays of a tree with their paths."""
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        total = zlib.crc32(jax.tree_util.keystr(path).encode(), total)
        total = zlib.crc32(np.ascontiguousarray(leaf), total)
    return total


def choose_step(checkpoints: ocp.CheckpointManager, which: str | int, workdir: str | Path) -> int:
    """The step of the checkpoint "latest", "best" (least loss) or a number; JaxdiffError where it does not exist."""
    steps = sorted(checkpoints.all_steps())
    if not steps:
        raise JaxdiffError(f"The run in {workdir} has no checkpoint yet.")
    if which == "latest":
        return steps[-1]
    if which == "best":
        losses = {step: checkpoints.metrics(step) for step in steps}
        return min((step for step in steps if losses[step]), key=lambda step: _loss(losses[step]), default=steps[-1])
    if str(which).isdecimal() and int(which) in steps:
        return int(which)
    raise JaxdiffError(f"There is no checkpoint {which} in {workdir}; there are latest, best and {steps}.")


def load_frozen(workdir: str | Path, model: Diffuser | Autoencoder) -> dict[str, Any]:
    """The parameters that a run took over from others, by part; none for most runs."""
    _, like = _shapes_of(model)
    if not like:
        return {}
    if not (Path(workdir) / FROZEN).is_dir():
        raise JaxdiffError(f"{workdir}/{FROZEN} is missing, with what the run took over from others: put it back.")
    with open_checkpoints(workdir, writing=False, name=FROZEN) as checkpoints:
        return restore(checkpoints, 0, {FROZEN: like})[FROZEN]


def load_run(
    workdir: str | Path, which: str | int = "latest", kind: type[T] = Diffuser
) -> tuple[T, dict[str, Any], int]:
    """A trained model: (diffuser, averaged parameters with those taken over, their step). Only those are read.

    Raises JaxdiffError where there is none of this kind, or no such checkpoint.
    """
    model = read_run(workdir)
    check_kind(model, kind, workdir)
    if not (Path(workdir) / "checkpoints").is_dir():
        raise JaxdiffError(f"The run in {workdir} has no checkpoint yet.")
    like, _ = _shapes_of(model)
    with open_checkpoints(workdir, writing=False) as checkpoints:
        step = choose_step(checkpoints, which, workdir)
        params = restore(checkpoints, step, {"ema_params": like})["ema_params"]
    return model, params | load_frozen(workdir, model), step


def check_kind(model: Diffuser | Autoencoder, kind: type, workdir: str | Path) -> None:
    """Raise a JaxdiffError where a run is not of the kind that is needed."""
    if isinstance(model, kind):
        return
    if kind is Diffuser:
        raise JaxdiffError(
            f"{workdir} holds an autoencoder, which draws nothing by itself: a recipe whose latent.run it is draws "
            "with it."
        )
    raise JaxdiffError(f"{workdir} holds a diffusion model, and an autoencoder is needed.")


def adopt(config: Config, image_shape: Sequence[int], read: Callable[[np.ndarray], Any], size: int) -> Frozen:
    """What a new run takes over from the runs that its config names: an autoencoder, a text transformer.

    read: indices [B] to images float32 [B, H, W, C] in [-1, 1], of `size`, by which the scaling of latents is measured.
    Raises JaxdiffError where such a run, or its checkpoint, is missing, or does not fit the config or the images.
    """
    params, section = {}, None
    if config.latent:
        try:
            autoencoder, parts, _ = load_run(config.latent.run, config.latent.checkpoint, Autoencoder)
        except JaxdiffError as error:
            raise JaxdiffError(f"latent.run needs a trained autoencoder. {error}") from error
        if autoencoder.image_shape[-1] != image_shape[-1]:
            raise JaxdiffError(
                f"The autoencoder in {config.latent.run} is of images of {autoencoder.image_shape[-1]} channels, "
                f"and these have {image_shape[-1]}."
            )
        gaussian_of = jax.jit(lambda images: posterior(autoencoder.model, parts, images))
        params |= parts | {"latents": measure_scaling(lambda index: gaussian_of(read(index)), size)}
        section = autoencoder.config.model
    if config.text and config.text.run:
        try:
            source, parts, _ = load_run(config.text.run)
        except JaxdiffError as error:
            raise JaxdiffError(f"text.run needs a trained model of captions. {error}") from error
        if source.text is None:
            raise JaxdiffError(f"text.run needs a model of captions, and that in {config.text.run} reads none.")
        if differing := differences(source.config.text, config.text, ignore=("run", "pooled_only")):
            raise JaxdiffError(f"The text of {config.text.run} and of this config differ: {'; '.join(differing)}.")
        params["text"] = parts["text"]
    return Frozen(params, section)
