"""A run on disk: its config, and Orbax checkpoints of its state."""

import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint import checkpoint_managers

from jaxdiff.config import Config, differences, from_dict, to_dict
from jaxdiff.errors import JaxdiffError
from jaxdiff.pipelines import Diffuser, check_sampling, init_params, make_diffuser

MAY_DIFFER = ("run", "sampling", "train.steps")
"""What a resumed run may be given anew: nothing that the steps already taken depended on."""


def open_run(config: Config, image_shape: Sequence[int], class_names: Sequence[str], workdir: str | Path) -> Diffuser:
    """Save the config of a new run in its workdir, or check it against the one that is there.

    Raises JaxdiffError where the config asks for what can not be built or sampled, and where the workdir holds a run
    of another config, or something that is no run's config; nothing is written then.
    """
    diffuser = make_diffuser(config, image_shape, class_names)
    check_sampling(diffuser, config.sampling)
    path = Path(workdir) / "config.json"
    if path.exists():
        there = read_run(workdir)
        if differing := differences(there.config, config, ignore=MAY_DIFFER):
            raise JaxdiffError(
                f"{workdir} holds a run of another config (there and here, {'; '.join(differing)}): "
                "choose another --workdir, or the options that it was begun with."
            )
        if (there.image_shape, there.class_names) != (diffuser.image_shape, diffuser.class_names):
            raise JaxdiffError(f"{workdir} holds a run on other images or classes: choose another --workdir.")
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"config": to_dict(config), "image_shape": list(image_shape), "class_names": list(class_names)}
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    unfinished.replace(path)
    return diffuser


def read_run(workdir: str | Path) -> Diffuser:
    """The model of the run in a workdir. Raises JaxdiffError where there is none or its config can not be read."""
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise JaxdiffError(f"There is no run in {workdir}: train.py --workdir {workdir} makes one.")
    try:
        content = json.loads(path.read_text())
        config, shape, names = content["config"], content["image_shape"], content["class_names"]
    except (ValueError, KeyError, TypeError) as error:
        raise JaxdiffError(f"{path} is damaged ({error!r}): put back what train.py wrote there.") from error
    return make_diffuser(from_dict(Config, config), shape, names)


def open_checkpoints(workdir: str | Path, keep: int = 1, writing: bool = True) -> ocp.CheckpointManager:
    """The checkpoints of a run, of which the newest `keep` and the one of least loss stay; closing waits for saves.

    Raises JaxdiffError where the loss of one does not read.
    """
    directory = Path(workdir).absolute() / "checkpoints"
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


def save(checkpoints: ocp.CheckpointManager, step: int, state: Any, ema_params: Any, loss: float | None) -> None:
    """Save a host copy of the state, and apart from it the parameters that samples are drawn from; does not wait.

    A checkpoint appears whole, by a rename, or not at all. It carries a checksum of either part. The one of least
    `loss` is kept as the best; None is no candidate.
    """
    checkpoints.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            ema_params=ocp.args.StandardSave(ema_params),
            checksums=ocp.args.JsonSave({"state": checksum(state), "ema_params": checksum(ema_params)}),
        ),
        metrics={} if loss is None else {"loss": loss},
    )


def restore(checkpoints: ocp.CheckpointManager, step: int, like: dict[str, Any]) -> dict[str, Any]:
    """Parts of a checkpoint ("state", "ema_params") as trees of arrays like those given, which only lend their shapes.

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


def load_run(workdir: str | Path, which: str | int = "latest") -> tuple[Diffuser, Any, int]:
    """A trained model for sampling: (diffuser, averaged parameters, their step). Only those parameters are read."""
    diffuser = read_run(workdir)
    if not (Path(workdir) / "checkpoints").is_dir():
        raise JaxdiffError(f"The run in {workdir} has no checkpoint yet.")
    like = {"ema_params": jax.eval_shape(lambda: init_params(diffuser, jax.random.key(0)))}
    with open_checkpoints(workdir, writing=False) as checkpoints:
        step = choose_step(checkpoints, which, workdir)
        return diffuser, restore(checkpoints, step, like)["ema_params"], step
