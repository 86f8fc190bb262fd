"""The two pure functions of training: one update, and the loss on examples that are not trained on."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxdiff.images import to_float
from jaxdiff.losses import diffusion_loss, stratify, time_from_uniform
from jaxdiff.pipelines import Diffuser, condition_on, make_network, null_prompt, prompt_of
from jaxdiff.sampling import example_keys
from jaxdiff.schedules import expand
from jaxdiff.training.state import TrainState, make_optimizer


def example_losses(
    diffuser: Diffuser,
    params: Any,
    batch: dict[str, jax.Array],
    index: jax.Array,
    batch_size: int,
    key: jax.Array,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """The loss of each example [B] of a part of a batch, with times and noise drawn per example.

    batch: {"image": uint8 [B, H, W, C], "label": [B]}, for captions also "tokens" and "mask" [B, L]. index: [B], the
    examples' places in the whole batch of `batch_size`: what is drawn for an example depends on the key and its place,
    not on how the batch is split over devices. With a `dropout_key` the network's dropout is on and conditions are
    withheld; without, neither.
    """
    diffusion = diffuser.config.diffusion
    x_0 = to_float(batch["image"])
    noise_key, time_key, condition_key = jax.random.split(key, 3)
    noise = jax.vmap(lambda k: jax.random.normal(k, diffuser.image_shape))(example_keys(noise_key, index))
    if diffusion.stratified:
        u = stratify(jax.random.uniform(time_key), index, batch_size)
    else:
        u = jax.vmap(jax.random.uniform)(example_keys(time_key, index))
    t = time_from_uniform(
        diffuser.process,
        u,
        diffusion.time_distribution,
        mean=diffusion.lognormal_mean,
        std=diffusion.lognormal_std,
    )
    prompt = prompt_of(diffuser, batch)
    if dropout_key is not None and diffusion.condition_dropout:
        withheld = jax.vmap(jax.random.uniform)(example_keys(condition_key, index)) < diffusion.condition_dropout
        choose = lambda null, given: jnp.where(expand(withheld, given.ndim), null, given)  # noqa: E731
        prompt = jax.tree.map(choose, null_prompt(diffuser, len(index)), prompt)
    return diffusion_loss(
        make_network(diffuser, params, dropout_key),
        diffuser.process,
        x_0,
        t,
        noise,
        condition_on(diffuser, params, prompt),
        prediction=diffusion.prediction,
        weighting=diffusion.weighting,
        min_snr_gamma=diffusion.min_snr_gamma,
        sigma_data=diffusion.sigma_data,
    )


def make_train_step(
    diffuser: Diffuser, axis_name: str | None = None
) -> Callable[[TrainState, dict[str, jax.Array]], TrainState]:
    """The pure train_step(state, batch) -> state; its metrics are added to `state.sums`.

    batch: {"image": uint8 [B, H, W, C], "label": [B]}, this device's part of the global batch. Under `jax.pmap`, give
    its axis_name: gradients are averaged over it, once a step. All randomness is a function of the seed and
    `state.step`.
    """
    config = diffuser.config
    optimizer = make_optimizer(config.optimizer, config.train)
    parts = config.train.accumulate

    def train_step(state: TrainState, batch: dict[str, jax.Array]) -> TrainState:
        local_size = batch["image"].shape[0]
        device, devices = (0, 1) if axis_name is None else (jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name))
        key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(config.train.seed), state.step))
        index = device * local_size + jnp.arange(local_size)

        def loss_of(params, part):
            part_batch, part_index = part
            dropout = jax.random.fold_in(dropout_key, part_index[0])
            return jnp.mean(
                example_losses(diffuser, params, part_batch, part_index, local_size * devices, key, dropout)
            )

        def add_part(total, part):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_of)(state.params, part)), None

        if parts == 1:
            loss, grads = jax.value_and_grad(loss_of)(state.params, (batch, index))
        else:
            in_parts = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), (batch, index))
            zero = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), state.params))
            (loss, grads), _ = jax.lax.scan(add_part, zero, in_parts)
            loss, grads = jax.tree.map(lambda x: x / parts, (loss, grads))
        if axis_name is not None:
            loss, grads = jax.lax.pmean((loss, grads), axis_name)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # the average begins short, as a mean over the first steps would, and reaches its full length later
        decay = jnp.minimum(config.optimizer.ema_decay, (1 + state.step) / (10 + state.step))
        ema_params = optax.incremental_update(params, state.ema_params, 1 - decay)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "count": 1.0}
        sums = {name: state.sums[name] + value for name, value in metrics.items()}
        return TrainState(state.step + 1, params, ema_params, opt_state, sums)

    return train_step


def make_eval_loss(diffuser: Diffuser) -> Callable[[Any, dict[str, jax.Array], jax.Array], jax.Array]:
    """A compiled eval_loss(params, batch, index [B]) -> [B]: times and noise fixed per place, no dropout of any kind.

    Losses of two sets of parameters differ by the parameters alone, so that checkpoints can be compared by them.
    """

    @jax.jit
    def eval_loss(params: Any, batch: dict[str, jax.Array], index: jax.Array) -> jax.Array:
        return example_losses(diffuser, params, batch, index, index.shape[0], jax.random.key(0))

    return eval_loss
