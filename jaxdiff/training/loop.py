"""The loop: batches in, one pmapped step after the other, and what is written at intervals."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import jax_utils

from jaxdiff import checkpoints as ckpt
from jaxdiff.config import AutoencoderConfig, Config, Train
from jaxdiff.data import ImageDataset, batches, open_dataset, prefetched
from jaxdiff.devices import over_local_devices
from jaxdiff.errors import JaxdiffError
from jaxdiff.images import make_grid_image, save_image, to_float
from jaxdiff.training.autoencoder import autoencoder_learner
from jaxdiff.training.diffusion import diffusion_learner
from jaxdiff.training.learner import COLUMNS, Learner
from jaxdiff.training.reporting import Reporter
from jaxdiff.training.state import TrainState, init_state, learning_rate_schedule, zero_sums
from jaxdiff.training.step import make_eval_losses, make_train_step

AXIS = "batch"


def fit(config: Config | AutoencoderConfig, workdir: str | Path) -> int:
    """Train what a config describes, in a workdir, from its newest checkpoint on if there is one.

    Returns the step that was reached: `config.train.steps`, or less where SIGTERM or Ctrl-C asked for an end; the state
    is saved in either case. Raises JaxdiffError for what can not be trained, and where the loss is no longer finite;
    what was saved before then stays.
    """
    split_batch(config.train)  # said before data are read, if it does not divide
    dataset, eval_dataset = open_datasets(config)
    learner = open_learner(config, dataset, workdir)
    with ckpt.open_checkpoints(workdir, config.run.keep) as checkpoints:
        state = init_state(learner)
        start = checkpoints.latest_step() or 0
        if start:
            state = restore_state(checkpoints, start, state)
        with Reporter(workdir, start, config.train.steps, config.run.tensorboard) as report:
            size = sum(x.size for x in jax.tree.leaves(state.params))
            report.say(
                f"{size:,} parameters, {dataset.size:,} images {'x'.join(map(str, dataset.image_shape))}, "
                f"{jax.device_count()} {jax.devices()[0].platform} device(s), batches of {config.train.batch_size}"
            )
            if start:
                report.say(f"going on from step {start}")
            if start >= config.train.steps:
                report.say(f"the run is at step {start} of {config.train.steps}: nothing is left to train")
                return start
            step = run_steps(learner, state, start, dataset, eval_dataset, Path(workdir), checkpoints, report)
        checkpoints.wait_until_finished()
    if step < config.train.steps:
        print(f"stopped and saved at step {step}: the same command goes on from there", flush=True)
    return step


def open_learner(config: Config | AutoencoderConfig, dataset: ImageDataset, workdir: str | Path) -> Learner:
    """What is trained in a workdir: a run of this config on these images, begun now or before."""
    shape, names = dataset.image_shape, dataset.class_names
    if isinstance(config, AutoencoderConfig):
        return autoencoder_learner(ckpt.open_run(config, shape, names, workdir)[0])
    read = lambda index: to_float(dataset.read(index)["image"])  # noqa: E731
    adopted = lambda: ckpt.adopt(config, shape, read, dataset.size)  # noqa: E731
    return diffusion_learner(*ckpt.open_run(config, shape, names, workdir, adopted))


def run_steps(
    learner: Learner,
    state: TrainState,
    start: int,
    dataset: ImageDataset,
    eval_dataset: ImageDataset | None,
    workdir: Path,
    checkpoints: ocp.CheckpointManager,
    report: Reporter,
) -> int:
    """Take the steps after `start`, and all that is due at them; returns the last, whose state is being saved."""
    config = learner.config
    local_size = split_batch(config.train)
    shard = (jax.process_index(), jax.process_count())
    read = learner.prepare(dataset, cache=True)
    source = batches(read, config.train.batch_size, seed=config.train.seed, flip=config.data.flip, shard=shard)
    state, frozen = jax_utils.replicate((state, learner.frozen))
    train_step, seconds = compile_step(learner, state, split_over_devices(source[start], local_size), frozen)
    report.say(f"compiled in {seconds:.0f} s")
    evaluate = make_evaluation(learner, eval_dataset, config.run.eval_images) if eval_dataset else None
    preview = learner.make_preview(dataset)
    learning_rate = learning_rate_schedule(config.optimizer, config.train)

    report.restart_clock(start)
    with stop_signal() as stopped, closing(prefetched(source, start)) as reader:
        for step, batch in enumerate(reader, start + 1):
            state = train_step(state, split_over_devices(batch, local_size), frozen)
            stopping = stopped()
            last = step == config.train.steps or stopping
            logging = due(step, config.run.log_every)
            saving = last or due(step, config.run.checkpoint_every)
            drawing = due(step, config.run.sample_every) or step == config.train.steps
            if logging or saving:  # the only places where the host waits for the devices
                means = mean_metrics(state, step, checkpoints)
            if logging:
                speed = report.rate(step) * config.train.batch_size
                rates = {"learning_rate": float(learning_rate(step - 1)), "images_per_second": round(speed, 1)}
                report.metrics(step, means | rates)
                report.progress(step, means["loss"], speed)
                state = state.replace(sums=jax_utils.replicate(zero_sums(learner)))
            if saving:
                host = jax.device_get(jax_utils.unreplicate(state))
                score = None if stopping else means["loss"]  # a stop has no time to evaluate: no candidate for best
                if evaluate and not stopping:
                    scores = evaluate(host.ema_params)
                    check_finite(scores, step, checkpoints)
                    report.metrics(step, scores)
                    score = scores["eval_loss"]
                    report.say(f"step {step}  eval loss {score:.4f}")
                check_finite({"norm of the parameters": float(optax.tree.norm(host.params))}, step, checkpoints)
                parts = {"state": host.replace(ema_params=None), "ema_params": host.ema_params}
                ckpt.save(checkpoints, step, parts, score)
            if drawing and jax.process_index() == 0 and not stopping:
                images = preview(jax_utils.unreplicate(state.ema_params))
                path = workdir / "samples" / f"step_{step:07d}.png"
                save_image(images, path, COLUMNS)
                report.picture(step, np.asarray(make_grid_image(images, COLUMNS)))
                report.say(f"step {step}  samples in {path}")
            if logging or saving or drawing:
                report.restart_clock(step)
            if last:
                return step


def due(step: int, every: int) -> bool:
    """Whether a step is one of every so many; 0 is never."""
    return bool(every) and step % every == 0


def split_batch(train: Train) -> int:
    """How many images a device takes; JaxdiffError where the global batch does not divide."""
    ways = jax.device_count() * train.accumulate
    if train.batch_size % ways:
        below = train.batch_size // ways * ways
        near = f"{below} or {below + ways}" if below else f"{ways}"
        raise JaxdiffError(
            f"train.batch_size {train.batch_size} does not divide by {jax.device_count()} device(s) x "
            f"{train.accumulate} accumulated part(s): take {near}."
        )
    return train.batch_size // jax.device_count()


def split_over_devices(batch: dict[str, np.ndarray], local_size: int) -> dict[str, np.ndarray]:
    """Give each device its part of this host's batch: [devices x B, ...] to [devices, B, ...]."""
    return {name: x.reshape(-1, local_size, *x.shape[1:]) for name, x in batch.items()}


def open_datasets(config: Config | AutoencoderConfig) -> tuple[ImageDataset, ImageDataset | None]:
    """The data to train on and the data to evaluate on, if the config names a split for it."""
    data = config.data
    options = {"data_dir": data.data_dir, "image_size": data.image_size, "channels": data.channels}
    dataset = open_dataset(data.name, data.split, **options)
    return dataset, open_dataset(data.name, data.eval_split, **options) if data.eval_split else None


def compile_step(
    learner: Learner, state: TrainState, batch: dict[str, np.ndarray], frozen: Any
) -> tuple[Callable, float]:
    """The train step over this host's devices, compiled for the shapes of what it takes, and the seconds."""
    began = time.perf_counter()
    step = jax.pmap(make_train_step(learner, AXIS), axis_name=AXIS, donate_argnums=0)
    return step.lower(state, batch, frozen).compile(), time.perf_counter() - began


def restore_state(checkpoints: ocp.CheckpointManager, step: int, like: TrainState) -> TrainState:
    """The state saved at a step."""
    parts = ckpt.restore(checkpoints, step, {"state": like.replace(ema_params=None), "ema_params": like.ema_params})
    return parts["state"].replace(ema_params=parts["ema_params"])


def mean_metrics(state: TrainState, step: int, checkpoints: ocp.CheckpointManager) -> dict[str, float]:
    """The means since the last report; JaxdiffError where one is not finite, so that such a state is never saved."""
    sums = {name: float(x) for name, x in jax.device_get(jax_utils.unreplicate(state.sums)).items()}
    count = sums.pop("count")
    means = {name: value / count for name, value in sums.items()}
    check_finite(means, step, checkpoints)
    return means


def check_finite(values: dict[str, float], step: int, checkpoints: ocp.CheckpointManager) -> None:
    """Raise a JaxdiffError where a number that tells of the state at a step is not finite."""
    if all(np.isfinite(value) for value in values.values()):
        return
    checkpoints.wait_until_finished()
    kept = checkpoints.latest_step()
    raise JaxdiffError(
        f"By step {step} training has diverged ({', '.join(f'{name} {value}' for name, value in values.items())}): "
        "lower optimizer.learning_rate or look at the data; "
        f"{f'the checkpoint of step {kept} is kept' if kept else 'nothing was saved yet'}."
    )


def make_evaluation(learner: Learner, dataset: ImageDataset, most: int, batch_size: int = 256) -> Callable:
    """evaluate(averaged params) -> {"eval_loss": ...}, means over the first `most` images, on this host's devices."""
    eval_losses = make_eval_losses(learner)
    count = min(most, dataset.size)
    batch_size = -(-min(batch_size, count) // jax.local_device_count()) * jax.local_device_count()
    split, whole = over_local_devices()
    frozen = jax.device_put(learner.frozen, whole)
    dataset = learner.prepare(dataset, cache=False)

    def evaluate(params: Any) -> dict[str, float]:
        params = frozen | jax.device_put(params, whole)
        losses = []
        for begin in range(0, count, batch_size):
            index = np.arange(begin, begin + batch_size)
            batch = jax.device_put(dataset.read(index % count), split)
            losses.append(eval_losses(params, batch, jnp.asarray(index)))
        total = jax.tree.map(lambda *parts: float(np.mean(np.concatenate(parts)[:count])), *losses)
        return {f"eval_{name}": value for name, value in total.items()}

    return evaluate


@contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGTERM or Ctrl-C into a question that the loop asks; a second one ends the program as ever."""
    asked = []
    before = {}

    def handle(number, frame):
        asked.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, handle)
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
