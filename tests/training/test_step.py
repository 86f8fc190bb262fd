"""One training step and what it is made of, on a network small enough to compile in a moment."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import split_over
from flax import jax_utils

from jaxdiff.config import Config, Diffusion, Optimizer, Train
from jaxdiff.pipelines import Diffuser
from jaxdiff.schedules import make_process
from jaxdiff.training import Place, diffusion_learner, init_state, make_eval_losses, make_train_step
from jaxdiff.training.diffusion import example_losses
from jaxdiff.training.loop import make_evaluation
from jaxdiff.training.state import learning_rate_schedule

SHAPE = (4, 4, 1)
CLASSES = ("a", "b", "c")
BATCH = 16


class Toy(nn.Module):
    """A network of one hidden layer that hears of the time and the class."""

    classes: int = len(CLASSES) + 1

    @nn.compact
    def __call__(self, x, t, cond, *, train=False):
        flat = x.reshape(len(x), -1)
        told = nn.Dense(8)(jnp.tanh(t[:, None] / 500)) + nn.Embed(self.classes, 8)(cond.label)
        return nn.Dense(flat.shape[1])(nn.tanh(nn.Dense(8)(flat) + told)).reshape(x.shape)


class Tell(nn.Module):
    """A network whose output is nothing but the label it was given."""

    @nn.compact
    def __call__(self, x, t, cond, *, train=False):
        return jnp.ones_like(x) * cond.label[:, None, None, None]


def make(diffusion=None, optimizer=None, train=None, model=None):
    config = Config(
        diffusion=diffusion or Diffusion(),
        optimizer=optimizer or Optimizer(learning_rate=1e-2),
        train=train or Train(batch_size=BATCH, steps=100),
    )
    process = make_process(config.diffusion.schedule, config.diffusion.timesteps, config.diffusion.zero_terminal_snr)
    return Diffuser(config, model or Toy(), process, SHAPE, CLASSES)


def make_batch(size=BATCH, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (size, *SHAPE), dtype=np.uint8),
        "label": rng.integers(0, len(CLASSES), size, dtype=np.int32),
    }


def steps_on(count, diffuser, steps=3):
    """The state after some steps on the first `count` devices."""
    devices = jax.devices()[:count]
    step = jax.pmap(make_train_step(diffusion_learner(diffuser), "batch"), axis_name="batch", devices=devices)
    state = jax_utils.replicate(init_state(diffusion_learner(diffuser)), devices)
    for i in range(steps):
        state = step(state, split_over(count, make_batch(seed=i)))
    for leaf in jax.tree.leaves(state):  # the devices' copies must not drift apart
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    return jax.tree.map(lambda leaf: np.asarray(leaf)[0], state)


def assert_close(one, other, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol), one, other)


# eps of Adam at 1e-3: at its usual 1e-8 the first step divides a rounding error by itself wherever a gradient is zero
STEADY = Optimizer(learning_rate=1e-2, eps=1e-3)


@pytest.mark.parametrize("stratified", [True, False])
def test_the_step_does_not_depend_on_the_number_of_devices(stratified):
    diffuser = make(Diffusion(condition_dropout=0.5, stratified=stratified), STEADY)
    one, two, eight = (steps_on(count, diffuser) for count in (1, 2, 8))
    assert int(one.step) == 3
    assert_close(one, two)
    assert_close(one, eight)


def test_a_batch_taken_in_parts_is_the_same_batch():
    whole = make(optimizer=STEADY)
    parts = make(optimizer=STEADY, train=Train(batch_size=BATCH, steps=100, accumulate=2))
    assert_close(steps_on(2, whole), steps_on(2, parts))
    assert_close(steps_on(1, whole), steps_on(2, parts))


def test_outside_pmap_the_step_is_the_one_of_a_single_device():
    diffuser = make()
    state, step = init_state(diffusion_learner(diffuser)), jax.jit(make_train_step(diffusion_learner(diffuser)))
    for i in range(3):
        state = step(state, make_batch(seed=i))
    assert_close(state, steps_on(1, diffuser))


def test_the_metrics_are_summed_until_they_are_reported():
    diffuser = make(optimizer=Optimizer(learning_rate=1e-2, clip_norm=0.01))
    step, state = jax.jit(make_train_step(diffusion_learner(diffuser))), init_state(diffusion_learner(diffuser))
    fresh = []
    for i in range(3):
        empty = state.replace(sums=jax.tree.map(jnp.zeros_like, state.sums))
        fresh.append(step(empty, make_batch(seed=i)).sums)
        state = step(state, make_batch(seed=i))
    for name in ("loss", "grad_norm", "count"):
        np.testing.assert_allclose(state.sums[name], sum(float(sums[name]) for sums in fresh), rtol=1e-6)
    assert state.sums["count"] == 3
    assert float(fresh[0]["grad_norm"]) > 0.01  # told as it was before clipping


def test_the_average_of_the_parameters():
    diffuser = make(optimizer=Optimizer(learning_rate=1e-2, ema_decay=0.2))
    step, state = jax.jit(make_train_step(diffusion_learner(diffuser))), init_state(diffusion_learner(diffuser))
    expected = state.params
    for i, decay in enumerate([1 / 10, 2 / 11, 0.2, 0.2]):  # (1 + i) / (10 + i), at most ema_decay
        state = step(state, make_batch(seed=i))
        expected = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, expected, state.params)
        assert_close(state.ema_params, expected, atol=1e-7)
    moved = jax.tree.map(lambda e, p: float(jnp.abs(e - p).max()), state.ema_params, state.params)
    assert max(jax.tree.leaves(moved)) > 1e-5


@pytest.mark.parametrize(
    ("decay", "warmup", "expected"),
    [
        ("none", 0, {0: 0.1, 50: 0.1, 100: 0.1}),
        ("none", 10, {0: 0.01, 4: 0.046, 10: 0.1, 99: 0.1}),
        ("linear", 0, {0: 0.1, 25: 0.075, 50: 0.05, 100: 0.0}),
        ("linear", 20, {0: 0.005, 20: 0.1, 60: 0.05, 100: 0.0}),
        ("cosine", 0, {0: 0.1, 25: 0.05 * (1 + 0.5**0.5), 50: 0.05, 100: 0.0}),
        ("cosine", 20, {20: 0.1, 60: 0.05, 100: 0.0}),
    ],
)
def test_the_learning_rate(decay, warmup, expected):
    optimizer = Optimizer(learning_rate=0.1, warmup_steps=warmup, decay=decay)
    rate = learning_rate_schedule(optimizer, Train(steps=100))
    for step, value in expected.items():
        np.testing.assert_allclose(rate(step), value, rtol=1e-5, atol=1e-8)


def test_the_optimizer_follows_the_learning_rate():
    """Adam's first step is the learning rate in the direction of the gradient's sign."""
    diffuser = make(optimizer=Optimizer(learning_rate=0.1, warmup_steps=4, clip_norm=0.0))
    before = init_state(diffusion_learner(diffuser))
    after = jax.jit(make_train_step(diffusion_learner(diffuser)))(before, make_batch())
    change = jax.tree.map(lambda a, b: np.abs(a - b).max(), after.params, before.params)
    np.testing.assert_allclose(max(jax.tree.leaves(change)), 0.1 / 4, rtol=1e-3)


def test_adamw_decays_the_weights_and_adam_does_not():
    before, after = {}, {}
    for name in ("adam", "adamw"):
        diffuser = make(optimizer=Optimizer(name=name, learning_rate=0.1, weight_decay=0.5))
        before[name] = init_state(diffusion_learner(diffuser))
        after[name] = jax.jit(make_train_step(diffusion_learner(diffuser)))(before[name], make_batch()).params
    assert_close(before["adam"].params, before["adamw"].params, atol=0)
    expected = jax.tree.map(lambda p, a: a - 0.1 * 0.5 * p, before["adam"].params, after["adam"])
    assert_close(after["adamw"], expected)


def test_the_eval_loss_depends_on_parameters_and_images_alone():
    diffuser = make(Diffusion(condition_dropout=1.0))
    learner, other = diffusion_learner(diffuser), diffusion_learner(make(train=Train(seed=1, batch_size=BATCH)))
    first, second = init_state(learner).params, init_state(other).params
    eval_losses = make_eval_losses(learner)
    index = jnp.arange(BATCH)
    once, other, again = (eval_losses(p, make_batch(), index)["loss"] for p in (first, second, first))
    np.testing.assert_array_equal(once, again)
    assert once.shape == (BATCH,)
    assert not np.allclose(once, other)
    anew = make_eval_losses(learner)(first, make_batch(), index)
    np.testing.assert_array_equal(once, anew["loss"])


def test_an_evaluation_reads_each_image_once_and_in_the_same_way(digits):
    diffuser = make()._replace(image_shape=digits.image_shape, model=Toy(classes=11), class_names=digits.class_names)
    params = init_state(diffusion_learner(diffuser)).params
    learner = diffusion_learner(diffuser)
    evaluate = make_evaluation(learner, digits, most=50, batch_size=24)
    assert evaluate(params) == evaluate(params)
    index = np.arange(56)  # 24 + 24 + 8 on eight devices, of which the last six are padding
    batches = [index[:24], index[24:48], np.arange(48, 72)]
    losses = [make_eval_losses(learner)(params, digits.read(i % 50), jnp.asarray(i))["loss"] for i in batches]
    np.testing.assert_allclose(evaluate(params)["eval_loss"], np.concatenate(losses)[:50].mean(), rtol=1e-5)


@pytest.fixture(scope="module")
def digits():
    from jaxdiff.data import open_dataset

    return open_dataset("digits", "test")


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_the_class_is_withheld_at_the_rate_asked_for(rate):
    """The loss of a network that tells its label: eps is of unit variance, so mean (label - eps)^2 = label^2 + 1."""
    diffuser = make(Diffusion(condition_dropout=rate), model=Tell())
    size = 4000
    batch = {"image": np.zeros((size, *SHAPE), np.uint8), "label": np.zeros(size, np.int32)}
    place = Place(jax.random.key(0), jnp.arange(size), size)
    losses_of = jax.jit(
        lambda dropout_key: example_losses(diffuser, {"network": {}}, batch, place._replace(dropout_key=dropout_key))
    )
    losses = losses_of(jax.random.key(1))
    withheld = np.asarray(losses) > 4.0  # about 1 for label 0, about 10 for the null label 3, both +- 2
    np.testing.assert_allclose(withheld.mean(), rate, atol=0.03)
    without = np.asarray(losses_of(None))
    np.testing.assert_allclose(without[~withheld], losses[~withheld], rtol=1e-5)  # only the label differs
    assert without.max() < 4.0


PREDICTIONS = ("eps", "x0", "v", "flow", "score", "edm")
SCHEDULES = ("linear", "cosine", "scaled_linear", "sigmoid", "vp", "edm", "flow")


@pytest.mark.parametrize(("prediction", "schedule"), list(itertools.product(PREDICTIONS, SCHEDULES)))
def test_every_prediction_trains_on_every_schedule(prediction, schedule):
    check_it_learns(Diffusion(schedule=schedule, prediction=prediction))


@pytest.mark.parametrize("weighting", ["snr", "min_snr", "edm"])
@pytest.mark.parametrize("schedule", ["cosine", "vp", "edm", "flow"])
def test_every_weighting_trains(weighting, schedule):
    check_it_learns(Diffusion(schedule=schedule, prediction="x0", weighting=weighting))


@pytest.mark.parametrize("prediction", ["v", "x0", "flow", "edm"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_zero_terminal_snr_trains(prediction, schedule):
    check_it_learns(Diffusion(schedule=schedule, prediction=prediction, zero_terminal_snr=True))


@pytest.mark.parametrize("schedule", ["linear", "vp", "edm", "flow"])
def test_lognormal_times_train(schedule):
    check_it_learns(Diffusion(schedule=schedule, prediction="edm", time_distribution="lognormal", weighting="edm"))


def check_it_learns(diffusion):
    """The loss and its gradient are finite, and a small step against the gradient lowers the loss as it should.

    Without jit: what is compiled is then single operations, which all combinations share.
    """
    diffuser = make(dataclasses.replace(diffusion, condition_dropout=0.0))
    params = toy_params()

    def loss_of(params):
        place = Place(jax.random.key(0), np.arange(BATCH), BATCH)
        return jnp.mean(example_losses(diffuser, params, make_batch(), place))

    loss, grads = jax.value_and_grad(loss_of)(params)
    assert np.isfinite(loss)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    squares = sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(grads))
    assert squares > 0
    rate = 1e-2 * float(loss) / squares  # to lower the loss by a hundredth, were it straight
    lower = loss_of(jax.tree.map(lambda p, g: p - rate * g, params, grads))
    assert 0.985 * loss < lower < 0.995 * loss


@functools.cache
def toy_params():
    return init_state(diffusion_learner(make())).params
