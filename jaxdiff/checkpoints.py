"""A run on disk: its config, and Orbax checkpoints of its state."""

import json
import logging
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers, type_handlers

from jaxdiff import hosts
from jaxdiff.config import CONFIGS, AutoencoderConfig, AutoencoderKL, Config, differences, from_dict, to_dict
from jaxdiff.errors import JaxdiffError
from jaxdiff.latents import Autoencoder, init_autoencoder, make_autoencoder, measure_scaling, posterior
from jaxdiff.pipelines import Diffuser, check_sampling, frozen_parts, init_params, make_diffuser

T = TypeVar("T", Diffuser, Autoencoder)
Path = epath.Path  # a workdir may be on gs://
logger = logging.getLogger(__name__)

FROZEN = "frozen"
"""The folder of a run, and the part of the checkpoint there, with the parameters that it took over from others."""

MAY_DIFFER = (
    "run", "sampling", "guard", "train.steps", "train.steps_per_call", "train.parameters", "model.remat",
)  # fmt: skip
"""What a resumed run may be given anew: nothing that the steps already taken depended on, but how they were taken."""


class DamagedError(JaxdiffError):
    """A checkpoint that does not read, or is not what was saved; another may do."""


class Manager(ocp.CheckpointManager):
    """Orbax's, but that it leaves it to the training loop to ask JAX whether a host is preempted.

    JAX agrees on the number after the largest that a host asked about last. Orbax asks about the step of a checkpoint,
    also once it is written, when the loop has long asked about later ones: the hosts then agree on a step that one of
    them has passed, and wait for it for ever.
    """

    def reached_preemption(self, step: int) -> bool:
        """No, at any step."""
        return False


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
    workdir: epath.PathLike,
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
    hosts.wait_for_all("the run's config is read")
    path.parent.mkdir(parents=True, exist_ok=True)
    if frozen.params:
        with open_checkpoints(workdir, name=FROZEN) as checkpoints:
            save(checkpoints, 0, {FROZEN: jax.device_get(frozen.params)})
            finish(checkpoints)
    content = {
        "kind": next(kind for kind, section in CONFIGS.items() if isinstance(config, section)),
        "config": to_dict(config),
        "image_shape": list(image_shape),
        "class_names": list(class_names),
        "autoencoder": frozen.autoencoder and to_dict(frozen.autoencoder),
    }
    if hosts.is_leader():
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(content, indent=2) + "\n")
        unfinished.replace(path)
    hosts.wait_for_all("the run's config is written")
    return model, load_frozen(workdir, model)


def read_run(workdir: epath.PathLike) -> Diffuser | Autoencoder:
    """The model of the run in a workdir. Raises JaxdiffError where there is none or its config can not be read."""
    return _read_config(workdir)[0]


def _read_config(workdir: epath.PathLike) -> tuple[Diffuser | Autoencoder, AutoencoderKL | None]:
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


def folder_of(workdir: epath.PathLike, name: str = "checkpoints") -> epath.Path:
    """Where the checkpoints of a run are, absolute as Orbax wants it."""
    path = Path(workdir)
    return (path if "://" in str(workdir) else path.absolute()) / name


def open_checkpoints(workdir: epath.PathLike, keep: int = 1, name: str = "checkpoints") -> Manager:
    """Checkpoints to be added to, of which the newest `keep` and the one of least loss stay; closing waits for saves.

    All hosts open, save and close together. Saves go on in the background: see `finish`. A run whose newest checkpoints
    may be damaged is read by `resume` first.
    """
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
        cleanup_tmp_directories=True,
    )
    return Manager(folder_of(workdir, name), options=options, handler_registry=_handlers())


def _handlers() -> ocp.handlers.CheckpointHandlerRegistry:
    """Orbax's own, of which each device writes its part of an array that all have only where that is 1 MiB or more.

    It would otherwise cut every array on every device while the next step waits: seven times as long for 400 small
    ones on eight devices, in seven times as many pieces.
    """
    arrays = type_handlers.create_type_handler_registry(
        (np.ndarray, type_handlers.NumpyHandler()),
        (jax.Array, type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)),
    )
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add(None, ocp.args.PyTreeSave, ocp.PyTreeCheckpointHandler(type_handler_registry=arrays))
    registry.add(None, ocp.args.JsonSave, ocp.JsonCheckpointHandler())
    return registry


def _loss(metrics: dict[str, float]) -> float:
    return metrics.get("loss", math.inf)


def save(checkpoints: Manager, step: int, parts: dict[str, Any], loss: float | None = None) -> None:
    """Save trees of arrays by name, which can be restored one without the others; copies them, and writes later.

    Arrays are the same on every host, or lie over the devices of all of them. A checkpoint appears whole, by a
    rename, or not at all. It carries a checksum of each part. The one of least `loss` is kept as the best; None is no
    candidate.
    Raises JaxdiffError where this or an earlier save fails.
    """
    args = {name: ocp.args.PyTreeSave(jax.tree.map(_as_array, tree)) for name, tree in parts.items()}
    sums = {name: checksum(tree) for name, tree in parts.items()}
    args |= {"checksums": ocp.args.JsonSave(sums)}
    metrics = {} if loss is None else {"loss": loss}
    _saving(checkpoints, lambda: checkpoints.save(step, args=ocp.args.Composite(**args), metrics=metrics))


def finish(checkpoints: Manager) -> None:
    """Wait until everything that was saved is on disk; JaxdiffError where that fails."""
    _saving(checkpoints, checkpoints.wait_until_finished)


def _saving(checkpoints: Manager, do: Callable[[], Any]) -> None:
    try:
        do()
    except Exception as error:  # whatever writing raises, in Orbax or below: a full disk, a lost mount
        kept = newest_whole(checkpoints.directory)
        raise JaxdiffError(
            f"A checkpoint could not be written in {checkpoints.directory} ({_reason(error)}); "
            f"{f'that of step {kept} is kept' if kept is not None else 'none was written before'}."
        ) from error


def newest_whole(directory: epath.PathLike) -> int | None:
    """The newest step of which there is a checkpoint that was written to its end; None where there is none."""
    return max(_steps(Path(directory)), default=None)


def _steps(directory: epath.Path) -> list[int]:
    """The steps of the checkpoints in a folder: unfinished ones have other names."""
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal()) if directory.exists() else []


def restore(folder: epath.Path, step: int, like: dict[str, Any]) -> dict[str, Any]:
    """Parts of a checkpoint ("state", "ema_params" ...) as trees of arrays like those given, which lend their shapes.

    Those that are a `jax.ShapeDtypeStruct` with a sharding come to lie so, whatever the devices that they were saved
    from; others are NumPy arrays. All hosts restore together.
    Raises DamagedError, on all hosts, where a part is missing, does not read, has other shapes or is not what was
    saved.
    """
    where = folder / str(step)
    template = jax.tree.map(_as_template, like)
    problem, restored = None, None
    if hosts.is_leader():  # one reads for all, before they begin to wait for each other
        problem = _problem(lambda: [_read_through(where / name, tree) for name, tree in like.items()])
    if hosts.all_agree(problem is None):
        args = {name: ocp.args.StandardRestore(tree) for name, tree in template.items()}
        args |= {"checksums": ocp.args.JsonRestore()}

        def read() -> None:
            nonlocal restored
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
                restored = checkpointer.restore(where, args=ocp.args.Composite(**args))
            if any(restored["checksums"][name] != checksum(restored[name]) for name in like):
                raise ValueError("its checksum differs")

        problem = _problem(read)
    if not hosts.all_agree(problem is None):
        raise DamagedError(_damaged(where, problem or "as another host says"))
    return {name: restored[name] for name in like}


def restore_newest(folder: epath.Path, like: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
    """(step, parts) of the newest checkpoint that is not damaged; None where there is none at all.

    Raises DamagedError, of the newest, where all are damaged. Those passed over are told of in a warning.
    """
    first = None
    for step in reversed(_steps(folder)):
        try:
            found = restore(folder, step, like)
        except DamagedError as error:
            first = first or error
            continue
        if first:
            logger.warning("%s That of step %d is taken.", first, step)
        return step, found
    if first:
        raise first
    return None


def resume(workdir: epath.PathLike, like: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
    """What `restore_newest` gives, of a run that is to go on and is made fit for that.

    Damaged checkpoints that are newer come into its folder `damaged`, and a loss that does not read is none. Where all
    are damaged, nothing is moved.
    """
    folder = folder_of(workdir)
    found = restore_newest(folder, like)
    hosts.wait_for_all("checkpoints are read")
    for step in _steps(folder) if hosts.is_leader() else []:
        if step > found[0]:
            aside = folder.parent / "damaged"
            aside.mkdir(exist_ok=True)
            number = sum(path.name.startswith(f"{step}_") for path in aside.iterdir())
            (folder / str(step)).rename(aside / f"{step}_{number}")
            logger.warning("The checkpoint of step %d is put into %s.", step, aside)
        elif _metrics(folder / str(step)) is None:  # Orbax reads those of all checkpoints at once
            (folder / str(step) / "metrics").mkdir(exist_ok=True)
            (folder / str(step) / "metrics" / "metrics").write_text("{}")
    hosts.wait_for_all("checkpoints are mended")
    return found


def _metrics(checkpoint: epath.Path) -> dict[str, float] | None:
    """What was saved with a checkpoint, {} where that was nothing; None where it does not read."""
    try:
        return dict(json.loads((checkpoint / "metrics" / "metrics").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _problem(do: Callable[[], Any]) -> str | None:
    """What reading a damaged file raises, in Orbax or below, in a few words; None where it does not."""
    try:
        do()
    except Exception as error:
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def _as_array(x: Any) -> jax.Array | np.ndarray:
    return x if isinstance(x, jax.Array) else np.asarray(x)


def _as_template(x: Any) -> Any:
    placed = isinstance(x, jax.ShapeDtypeStruct) and x.sharding is not None
    return x if placed else np.empty(x.shape, x.dtype)


def _read_through(part: epath.Path, like: Any) -> None:
    """Compare a part's arrays with those of a tree, and read every value, one after the other.

    Orbax reads them side by side, and when one fails the others print tracebacks of the event loop that it left.
    """
    base = f"{part}/" if "://" in str(part) else f"file://{part}/"
    database = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    keys = database.list().result()
    if not keys:  # also what a missing manifest looks like
        raise ValueError(f"{part.name} has no arrays")
    saved, wanted = _kinds(ocp.StandardCheckpointHandler().metadata(part).tree), _kinds(like)
    for name in sorted(saved.keys() | wanted.keys()):
        one, other = saved.get(name, "nothing"), wanted.get(name, "nothing")
        if one != other:
            raise ValueError(f"{part.name} has {one} as {name}, and not {other}")
    for key in keys:
        database.read(key).result()


def _damaged(where: Path, reason: str) -> str:
    others = sorted(int(path.name) for path in where.parent.iterdir() if path.name.isdecimal() and path != where)
    rest = f"there are also {', '.join(map(str, others))}" if others else "there is no other"
    return f"The checkpoint {where} is damaged ({reason}): delete that folder to go on from another; {rest}."


def _kinds(tree: Any) -> dict[str, str]:
    """Type and shape of every array of a tree, as "float32 (11, 64)", by its path, as "opt_state.1.0.count"."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): f"{x.dtype} {x.shape}" for path, x in paths}


def checksum(tree: Any) -> int:
    """A number of 32 bits of all arrays of a tree with their paths; the same however they lie on devices and hosts.

    The sum of each array's bits, each weighted by an odd number that tells its place: no single bit can change unseen.
    Every host sums what lies on its own devices.
    """
    paths, arrays = zip(*jax.tree_util.tree_leaves_with_path(tree), strict=True)
    sums = np.array([_own_sum(x) for x in arrays], np.uint32)
    if jax.process_count() > 1:
        sums = multihost_utils.process_allgather(sums).sum(axis=0, dtype=np.uint32)
    told = [(jax.tree_util.keystr(path), np.shape(x), int(n)) for path, x, n in zip(paths, arrays, sums, strict=True)]
    return zlib.crc32(repr(told).encode())


def _own_sum(x: Any) -> int:
    if isinstance(x, jax.Array):
        parts = [(shard.index, shard.data) for shard in x.addressable_shards if shard.replica_id == 0]
    else:  # every host has it
        parts = [(tuple(slice(None) for _ in np.shape(x)), x)] if hosts.is_leader() else []
    total = 0
    for index, part in parts:
        place, stride = np.zeros((), np.uint32), 1
        for axis, side in reversed(list(enumerate(np.shape(x)))):
            along = np.arange(*index[axis].indices(side), dtype=np.uint64) * stride
            place = place + np.expand_dims(along.astype(np.uint32), tuple(range(1, np.ndim(x) - axis)))
            stride *= side
        part = np.asarray(part)
        bits = np.frombuffer(part.tobytes(), f"u{part.dtype.itemsize}").reshape(part.shape).astype(np.uint64)
        folded = (bits ^ (bits >> 32)).astype(np.uint32)
        total += int(np.sum(folded * (2 * place + np.uint32(1)), dtype=np.uint32))
    return total % 2**32


def choose_step(folder: epath.Path, which: str | int) -> int:
    """The step of the checkpoint "latest", "best" (least loss) or a number; JaxdiffError where it does not exist."""
    steps = _steps(folder)
    if not steps:
        raise JaxdiffError(f"The run in {folder.parent} has no checkpoint yet.")
    if which == "latest":
        return steps[-1]
    if which == "best":
        losses = {step: _metrics(folder / str(step)) for step in steps}
        return min((step for step in steps if losses[step]), key=lambda step: _loss(losses[step]), default=steps[-1])
    if str(which).isdecimal() and int(which) in steps:
        return int(which)
    raise JaxdiffError(f"There is no checkpoint {which} in {folder.parent}; there are latest, best and {steps}.")


def load_frozen(workdir: epath.PathLike, model: Diffuser | Autoencoder) -> dict[str, Any]:
    """The parameters that a run took over from others, by part; none for most runs."""
    _, like = _shapes_of(model)
    if not like:
        return {}
    if not (Path(workdir) / FROZEN).is_dir():
        raise JaxdiffError(f"{workdir}/{FROZEN} is missing, with what the run took over from others: put it back.")
    return restore(folder_of(workdir, FROZEN), 0, {FROZEN: like})[FROZEN]


def load_run(
    workdir: epath.PathLike, which: str | int = "latest", kind: type[T] = Diffuser
) -> tuple[T, dict[str, Any], int]:
    """A trained model: (diffuser, averaged parameters with those taken over, their step). Only those are read.

    "latest" passes over damaged ones, with a warning.

    Raises JaxdiffError where there is none of this kind, or no such checkpoint.
    """
    model = read_run(workdir)
    check_kind(model, kind, workdir)
    like, folder = {"ema_params": _shapes_of(model)[0]}, folder_of(workdir)
    step = choose_step(folder, which)
    if which == "latest":
        step, parts = restore_newest(folder, like)
    else:
        parts = restore(folder, step, like)
    return model, parts["ema_params"] | load_frozen(workdir, model), step


def check_kind(model: Diffuser | Autoencoder, kind: type, workdir: epath.PathLike) -> None:
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
