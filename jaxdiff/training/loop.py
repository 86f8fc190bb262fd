"""The loop: batches in, one call of the devices after the other, and what is written at intervals."""

import itertools
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.experimental import multihost_utils

from jaxdiff import checkpoints as ckpt
from jaxdiff import hosts
from jaxdiff.config import AutoencoderConfig, Config, Run, Train
from jaxdiff.data import ImageDataset, batches, open_dataset, prefetched
from jaxdiff.devices import fetch, over_devices, put
from jaxdiff.errors import JaxdiffError
from jaxdiff.images import make_grid_image, save_image, to_float
from jaxdiff.training.autoencoder import autoencoder_learner
from jaxdiff.training.diffusion import diffusion_learner
from jaxdiff.training.layout import Layout, make_layout, memory_of
from jaxdiff.training.learner import COLUMNS, Learner
from jaxdiff.training.reporting import Reporter
from jaxdiff.training.state import TrainState, init_state, learning_rate_schedule, zero_sums
from jaxdiff.training.step import make_eval_losses


def fit(config: Config | AutoencoderConfig, workdir: epath.PathLike) -> int:
    """Train what a config describes, in a workdir, from its newest whole checkpoint on if there is one.

    On several hosts, joined by `jaxdiff.hosts.join`, all call it alike. Returns the step that was reached:
    `config.train.steps`, or less where SIGTERM or Ctrl-C asked for an end; the state is saved in either case.
    Raises JaxdiffError for what can not be trained, where another process trains in the workdir, and where training
    diverges; what was saved before then stays.
    """
    split_batch(config.train)  # said before data are read, if it does not divide
    dataset, eval_dataset = open_datasets(config)
    with hosts.only_one(workdir):
        learner = open_learner(config, dataset, workdir)
        layout = make_layout(learner)
        start, state = start_or_resume(learner, layout, workdir)
        with Reporter(workdir, start, config.train.steps, config.run.tensorboard) as report:
            size = sum(x.size for x in jax.tree.leaves(jax.eval_shape(learner.init, jax.random.key(0))))
            several = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
            report.say(
                f"{size:,} parameters, {dataset.size:,} images {'x'.join(map(str, dataset.image_shape))}, "
                f"{jax.device_count()} {jax.devices()[0].platform} device(s){several}, "
                f"batches of {config.train.batch_size}"
            )
            if start:
                report.say(f"going on from step {start}")
            if start >= config.train.steps:
                report.say(f"the run is at step {start} of {config.train.steps}: nothing is left to train")
                return start
            with ckpt.open_checkpoints(workdir, config.run.keep) as checkpoints:
                step = run_steps(
                    learner, layout, state, start, dataset, eval_dataset, epath.Path(workdir), checkpoints, report
                )
                ckpt.finish(checkpoints)
            if step < config.train.steps:
                report.say(f"stopped and saved at step {step}: the same command goes on from there")
    return step


def start_or_resume(learner: Learner, layout: Layout, workdir: epath.PathLike) -> tuple[int, TrainState]:
    """The step that a run is at, and its state there, as the step takes it: the newest that reads, or the first."""
    init = partial(init_state, learner)
    shapes = jax.eval_shape(init)
    places = layout.place(shapes)
    like = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)
    found = ckpt.resume(workdir, parts_of(like))
    if found is None:
        return 0, layout.enter(jax.jit(init, out_shardings=places)())
    step, parts = found
    return step, layout.enter(parts["state"].replace(ema_params=parts["ema_params"]))


def parts_of(state: TrainState) -> dict[str, Any]:
    """A state as checkpoints hold it: what samples are drawn with, and what training needs besides."""
    return {"state": state.replace(ema_params=None), "ema_params": state.ema_params}


def open_learner(config: Config | AutoencoderConfig, dataset: ImageDataset, workdir: epath.PathLike) -> Learner:
    """What is trained in a workdir: a run of this config on these images, begun now or before."""
    shape, names = dataset.image_shape, dataset.class_names
    if isinstance(config, AutoencoderConfig):
        return autoencoder_learner(ckpt.open_run(config, shape, names, workdir)[0])
    read = lambda index: to_float(dataset.read(index)["image"])  # noqa: E731
    adopted = lambda: ckpt.adopt(config, shape, read, dataset.size)  # noqa: E731
    return diffusion_learner(*ckpt.open_run(config, shape, names, workdir, adopted))


def run_steps(
    learner: Learner,
    layout: Layout,
    state: TrainState,
    start: int,
    dataset: ImageDataset,
    eval_dataset: ImageDataset | None,
    workdir: epath.Path,
    checkpoints: ckpt.Manager,
    report: Reporter,
) -> int:
    """Take the steps after `start`, and all that is due at them; returns the last, whose state is being saved."""
    config = learner.config
    shard = (jax.process_index(), jax.process_count())
    read = learner.prepare(dataset, cache=True)
    source = batches(read, config.train.batch_size, seed=config.train.seed, flip=config.data.flip, shard=shard)
    frozen = layout.enter(put(learner.frozen, layout.place(learner.frozen)))
    evaluate = make_evaluation(learner, eval_dataset, config.run.eval_images) if eval_dataset else None
    preview = learner.make_preview(dataset)
    learning_rate = learning_rate_schedule(config.optimizer, config.train)

    step, most = start, config.train.steps_per_call
    compiled = {}  # by steps a call: steps_per_call, and one for what is due between
    with stop_signal() as stopped, closing(prefetched(source, start)) as reader:
        while True:
            count = most if step + most <= next_due(step, config.run, config.train.steps) else 1
            args = (state, layout.feed(list(itertools.islice(reader, count))), frozen)
            if count not in compiled:
                compiled[count] = compile_steps(layout, report, count, *args)
                if step == start:
                    report.restart_clock(start)
            state = compiled[count](*args)
            step += count
            stopping = stopped()
            last = step == config.train.steps or stopping
            logging = due(step, config.run.log_every)
            saving = last or due(step, config.run.checkpoint_every)
            drawing = (due(step, config.run.sample_every) or step == config.train.steps) and not stopping
            if logging or saving:  # the only places where the host waits for the devices
                means = mean_metrics(layout.leave((state.sums, state.guarded)), config.guard.skips, step, checkpoints)
            if logging:
                speed = report.rate(step) * config.train.batch_size
                rates = {"learning_rate": float(learning_rate(step - 1)), "images_per_second": round(speed, 1)}
                report.metrics(step, means | rates)
                report.progress(step, means.get("loss"), speed)
                sums = put(zero_sums(learner), over_devices()[1])
                state = state.replace(
                    sums=layout.enter(sums), guarded=state.guarded._replace(most=jnp.copy(state.guarded.in_row))
                )
            if saving:
                whole = layout.leave(state)
                score = None if stopping else means.get("loss")  # a stop has no time to evaluate: no candidate for best
                if evaluate and not stopping:
                    scores = evaluate(fetch(whole.ema_params))
                    check_finite(scores, step, checkpoints)
                    report.metrics(step, scores)
                    score = scores["eval_loss"]
                    report.say(f"step {step}  eval loss {score:.4f}")
                norm = float(fetch(jax.jit(optax.tree.norm)(whole.params)))
                check_finite({"norm of the parameters": norm}, step, checkpoints)
                ckpt.save(checkpoints, step, parts_of(whole), score)
            if drawing:
                images = preview(fetch(layout.leave(state.ema_params)))
                path = workdir / "samples" / f"step_{step:07d}.png"
                if hosts.is_leader():
                    save_image(images, path, COLUMNS)
                report.picture(step, np.asarray(make_grid_image(images, COLUMNS)))
                report.say(f"step {step}  samples in {path}")
            if logging or saving or drawing:
                report.restart_clock(step)
            if last:
                return step


def compile_steps(layout: Layout, report: Reporter, count: int, *args: Any) -> jax.stages.Compiled:
    """So many steps as one call of the devices, and a line about it."""
    began = time.perf_counter()
    steps = layout.compile(count, *args)
    seconds, (held, used) = time.perf_counter() - began, (size / 1e6 for size in memory_of(steps))
    report.say(
        f"compiled {f'{count} steps' if count > 1 else 'the step'} in {seconds:.0f} s: a device holds {held:,.2f} MB "
        f"of state and batch, and works with {used:,.2f} MB more"
    )
    return steps


def next_due(step: int, run: Run, total: int) -> int:
    """The first step after this one at which the host has something to do."""
    rhythms = [every for every in (run.log_every, run.checkpoint_every, run.sample_every) if every]
    return min(total, *((step // every + 1) * every for every in rhythms))


def due(step: int, every: int) -> bool:
    """Whether a step is one of every so many; 0 is never."""
    return bool(every) and step % every == 0


def split_batch(train: Train) -> None:
    """Raise a JaxdiffError where the global batch does not divide over the devices."""
    ways = jax.device_count() * train.accumulate
    if train.batch_size % ways:
        below = train.batch_size // ways * ways
        near = f"{below} or {below + ways}" if below else f"{ways}"
        raise JaxdiffError(
            f"train.batch_size {train.batch_size} does not divide by {jax.device_count()} device(s) x "
            f"{train.accumulate} accumulated part(s): take {near}."
        )


def open_datasets(config: Config | AutoencoderConfig) -> tuple[ImageDataset, ImageDataset | None]:
    """The data to train on and the data to evaluate on, if the config names a split for it."""
    data = config.data
    options = {"data_dir": data.data_dir, "image_size": data.image_size, "channels": data.channels}
    dataset = open_dataset(data.name, data.split, **options)
    return dataset, open_dataset(data.name, data.eval_split, **options) if data.eval_split else None


def mean_metrics(told: Any, skips: int, step: int, checkpoints: ckpt.Manager) -> dict[str, float]:
    """The means since the last report, from (sums, guarded); without a "loss" where every update was left out.

    Raises JaxdiffError where more updates in a row were bad than may be skipped.
    """
    sums, guarded = fetch(told)
    sums = {name: float(x) for name, x in sums.items()}
    count, skipped = sums.pop("count"), sums.pop("skipped")
    if guarded.most > skips:
        diverged(
            step, f"{int(guarded.most)} update(s) in a row with a loss or gradient not finite, or a spike", checkpoints
        )
    means = {name: value / count for name, value in sums.items()} if count else {}
    return means | ({"skipped": skipped} if skipped else {})


def check_finite(values: dict[str, float], step: int, checkpoints: ckpt.Manager) -> None:
    """Raise a JaxdiffError where a number that tells of the state at a step is not finite."""
    if not all(np.isfinite(value) for value in values.values()):
        diverged(step, ", ".join(f"{name} {value}" for name, value in values.items()), checkpoints)


def diverged(step: int, how: str, checkpoints: ckpt.Manager) -> None:
    """Raise the JaxdiffError that ends a run, once what was saved before is on disk."""
    ckpt.finish(checkpoints)
    kept = ckpt.newest_whole(checkpoints.directory)
    raise JaxdiffError(
        f"By step {step} training has diverged ({how}): lower optimizer.learning_rate, look at the data, or allow "
        f"guard.skips; {f'the checkpoint of step {kept} is kept' if kept else 'nothing was saved yet'}."
    )


def make_evaluation(learner: Learner, dataset: ImageDataset, most: int, batch_size: int = 256) -> Callable:
    """evaluate(averaged params) -> {"eval_loss": ...}, means over the first `most` images, on all devices."""
    eval_losses = make_eval_losses(learner)
    count = min(most, dataset.size)
    batch_size = -(-min(batch_size, count) // jax.device_count()) * jax.device_count()
    split, whole = over_devices()
    frozen = put(learner.frozen, whole)
    dataset = learner.prepare(dataset, cache=False)

    def evaluate(params: Any) -> dict[str, float]:
        params = frozen | put(params, whole)
        losses = []
        for begin in range(0, count, batch_size):
            index = np.arange(begin, begin + batch_size)
            batch = put(dataset.read(index % count), split)
            losses.append(fetch(eval_losses(params, batch, index)))
        total = jax.tree.map(lambda *parts: float(np.mean(np.concatenate(parts)[:count])), *losses)
        return {f"eval_{name}": value for name, value in total.items()}

    return evaluate


@contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGTERM or Ctrl-C into a question that the loop asks after each call; a second ends the program.

    Where there are several hosts, SIGTERM to any of them, and what JAX takes for a notice of preemption, makes the
    answer yes on all of them at the same step.
    """
    if jax.distributed.is_initialized():
        calls = itertools.count(1)  # and not steps: JAX agrees on the number after the largest, and it must come
        yield lambda: multihost_utils.reached_preemption_sync_point(next(calls))
        return
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
