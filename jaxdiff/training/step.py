"""The two pure functions of training: one update, and the loss on examples that are not trained on."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxdiff.training.learner import Learner, Place
from jaxdiff.training.state import Guarded, TrainState, make_optimizer

SETTLED = 20
"""Updates after which the mean norm of the gradient is one to measure spikes by."""


def make_train_step(
    learner: Learner, axis_name: str | None = None, gather: Callable[[Any], Any] = lambda params: params
) -> Callable[[TrainState, dict[str, jax.Array], Any], TrainState]:
    """The pure train_step(state, batch, frozen) -> state; its metrics are added to `state.sums`.

    batch: {"image": uint8 [B, H, W, C], "label": [B]} or what else the learner's losses read, this device's part of the
    global batch. frozen: the learner's, an argument so that they are no constants of the program. Under `jax.pmap`,
    give its axis_name: gradients are averaged over it, once a step. Under `jax.jit`, `gather` may say how parameters
    that are sharded lie while the loss is worked out. All randomness is a function of the seed and `state.step`. An
    update that is bad by `config.guard` is left out: it changes nothing but the counts.
    """
    config = learner.config
    optimizer = make_optimizer(config.optimizer, config.train)
    parts = config.train.accumulate

    def train_step(state: TrainState, batch: dict[str, jax.Array], frozen: Any = learner.frozen) -> TrainState:
        local_size = batch["label"].shape[0]
        device, devices = (0, 1) if axis_name is None else (jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name))
        key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(config.train.seed), state.step))
        index = device * local_size + jnp.arange(local_size)

        def loss_of(params, part):
            part_batch, part_index = part
            dropout = jax.random.fold_in(dropout_key, part_index[0])
            place = Place(key, part_index, local_size * devices, state.step, dropout)
            means = jax.tree.map(jnp.mean, learner.losses(gather(frozen | params), part_batch, place))
            return means["loss"], means

        gradient = jax.grad(loss_of, has_aux=True)

        def add_part(total, part):
            return jax.tree.map(jnp.add, total, gradient(state.params, part)), None

        if parts == 1:
            grads, means = gradient(state.params, (batch, index))
        else:
            in_parts = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), (batch, index))
            zero = jax.tree.map(jnp.zeros_like, (state.params, {name: jnp.zeros(()) for name in learner.metrics}))
            total, _ = jax.lax.scan(add_part, zero, in_parts)
            grads, means = jax.tree.map(lambda x: x / parts, total)
        if axis_name is not None:
            grads, means = jax.lax.pmean((grads, means), axis_name)

        grad_norm, guarded = optax.tree.norm(grads), state.guarded
        bad = ~jnp.isfinite(means["loss"]) | ~jnp.isfinite(grad_norm)
        if config.guard.spike:
            bad |= (guarded.good >= SETTLED) & (grad_norm > config.guard.spike * guarded.norm)
        unless_bad = lambda new, old: jax.tree.map(lambda a, b: jnp.where(bad, b, a), new, old)  # noqa: E731

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # the average begins short, as a mean over the first steps would, and reaches its full length later
        decay = jnp.minimum(config.optimizer.ema_decay, (1 + state.step) / (10 + state.step))
        followed = {name: params[name] for name in learner.averaged}
        ema_params = optax.incremental_update(followed, state.ema_params, 1 - decay)
        metrics = means | {"grad_norm": grad_norm, "count": 1.0}
        sums = {name: state.sums[name] + jnp.where(bad, 0, value) for name, value in metrics.items()}
        in_row = jnp.where(bad, guarded.in_row + 1, 0)
        recent = jnp.minimum(0.98, guarded.good / (guarded.good + 1))
        return TrainState(
            step=state.step + 1,
            params=unless_bad(params, state.params),
            ema_params=unless_bad(ema_params, state.ema_params),
            opt_state=unless_bad(opt_state, state.opt_state),
            sums=sums | {"skipped": state.sums["skipped"] + bad},
            guarded=Guarded(
                good=guarded.good + ~bad,
                in_row=in_row,
                most=jnp.maximum(guarded.most, in_row),
                norm=unless_bad(recent * guarded.norm + (1 - recent) * grad_norm, guarded.norm),
            ),
        )

    return train_step


def make_eval_losses(learner: Learner) -> Callable[[Any, dict[str, jax.Array], jax.Array], dict[str, jax.Array]]:
    """A compiled eval_losses(params, batch, index [B]) -> {"loss": [B], ...}; params are all, those frozen included.

    Times and noise are fixed per place, and nothing is dropped: losses of two sets of parameters differ by the
    parameters alone, so that checkpoints can be compared by them.
    """

    @jax.jit
    def eval_losses(params: Any, batch: dict[str, jax.Array], index: jax.Array) -> dict[str, jax.Array]:
        return learner.losses(params, batch, Place(jax.random.key(0), index, index.shape[0]))

    return eval_losses
