"""Everything that training changes, in one pytree, and the optimiser that changes it."""

from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxdiff.config import Optimizer, Train
from jaxdiff.training.learner import Learner


class Guarded(NamedTuple):
    """What is known of bad updates: see `jaxdiff.config.Guard`.

    good: updates made, [] int32. in_row: bad ones since the last that was made. most: of these, since the last report.
    norm: the recent mean norm of the gradient.
    """

    good: jax.Array
    in_row: jax.Array
    most: jax.Array
    norm: jax.Array


@flax.struct.dataclass
class TrainState:
    """The state after `step` steps, each an update or one that was left out.

    ema_params: the moving average of those parts of params which samples are drawn from. sums: of each metric over the
    steps since it was last reported, and their "count"; part of the state so that a resumed run reports what an
    unbroken one does.
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any
    sums: dict[str, jax.Array]
    guarded: Guarded


def zero_sums(learner: Learner) -> dict[str, jax.Array]:
    """Sums over no steps: of what its losses tell, of the norm of the gradient, and of how many steps; left-out ones
    count in "skipped" alone.
    """
    return {name: jnp.zeros(()) for name in (*learner.metrics, "grad_norm", "count", "skipped")}


def learning_rate_schedule(optimizer: Optimizer, train: Train) -> optax.Schedule:
    """Step -> learning rate: linear from 0 over the warm-up, then constant or falling to 0 at the last step."""
    peak, warmup = optimizer.learning_rate, optimizer.warmup_steps
    rest = max(train.steps - warmup, 1)
    after = {
        "none": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
        "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
    }[optimizer.decay]()
    if not warmup:
        return after
    # from 1 / warmup and not from 0, at which the first step would change nothing
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, warmup), after], [warmup])


def make_optimizer(optimizer: Optimizer, train: Train) -> optax.GradientTransformation:
    """Clipping, then Adam (Kingma & Ba 2015) or AdamW (Loshchilov & Hutter 2019) on the learning rate's schedule."""
    rate = learning_rate_schedule(optimizer, train)
    moments = {"b1": optimizer.b1, "b2": optimizer.b2, "eps": optimizer.eps}
    if optimizer.name == "adamw":
        update = optax.adamw(rate, weight_decay=optimizer.weight_decay, **moments)
    else:
        update = optax.adam(rate, **moments)
    clip = optax.clip_by_global_norm(optimizer.clip_norm) if optimizer.clip_norm else optax.identity()
    return optax.chain(clip, update)


def init_state(learner: Learner) -> TrainState:
    """The state before the first step: a function of the config, its seed included."""
    config = learner.config
    params = jax.jit(learner.init)(jax.random.key(config.train.seed))
    opt_state = make_optimizer(config.optimizer, config.train).init(params)
    ema_params = jax.tree.map(jnp.copy, {name: params[name] for name in learner.averaged})
    count = partial(jnp.zeros, (), jnp.int32)  # an array each: a step is given them to use up
    guarded = Guarded(count(), count(), count(), jnp.zeros(()))
    return TrainState(count(), params, ema_params, opt_state, zero_sums(learner), guarded)
