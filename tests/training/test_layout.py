"""Replicated under pmap and sharded under jit: the same losses, an all-reduce an update, and an nth of the memory."""

import dataclasses
import re
from functools import partial

import jax
import numpy as np
import pytest

from jaxdiff import config as c
from jaxdiff.data import batches, open_dataset
from jaxdiff.devices import fetch, put
from jaxdiff.pipelines import make_diffuser
from jaxdiff.training import diffusion_learner, init_state
from jaxdiff.training.layout import make_layout, memory_of

CONFIG = c.Config(
    model=c.UNet(channels=(32, 64), layers_per_block=1, attention_levels=(1,), num_heads=2, num_groups=8, patch_size=2),
    diffusion=c.Diffusion(schedule="cosine", prediction="v"),
    optimizer=c.Optimizer(name="adamw", learning_rate=1e-3, ema_decay=0.9),
    train=c.Train(batch_size=16, steps=100),
)
STEPS = 20
COLLECTIVES = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute")


class Trained:
    """A layout, its compiled step, and what comes of some steps."""

    def __init__(self, parameters, data, steps_per_call=1):
        train = dataclasses.replace(CONFIG.train, parameters=parameters)
        learner = diffusion_learner(make_diffuser(dataclasses.replace(CONFIG, train=train), data.image_shape, ()))
        layout = make_layout(learner)
        state = jax.jit(partial(init_state, learner))()
        self.sizes = {"params": sum(x.nbytes for x in jax.tree.leaves(state.params)), "metrics": len(learner.metrics)}
        state = layout.enter(put(state, layout.place(state)))
        source = batches(learner.prepare(data, cache=False), CONFIG.train.batch_size)
        feed = lambda step: layout.feed([source[step + i] for i in range(steps_per_call)])  # noqa: E731
        self.batch = sum(x.nbytes for x in jax.tree.leaves(source[0])) / jax.device_count()
        self.step = layout.compile(steps_per_call, state, feed(0), {})
        self.losses = []
        for step in range(0, STEPS, steps_per_call):
            state = self.step(state, feed(step), {})
            self.losses.append(float(fetch(layout.leave(state.sums))["loss"]))
        self.state = layout.leave(state)


@pytest.fixture(scope="module")
def data():
    return open_dataset("digits", "train")


@pytest.fixture(scope="module")
def replicated(data):
    return Trained("replicated", data)


@pytest.fixture(scope="module")
def sharded(data):
    return Trained("sharded", data)


def collectives(step):
    """The collectives of a compiled program: (kind, bytes that it gives) of each."""
    sizes = {"f32": 4, "s32": 4, "u32": 4, "pred": 1, "u8": 1, "bf16": 2, "u64": 8, "s64": 8}
    found = []
    for shapes, kind in re.findall(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", step.as_text()):
        parts = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        sizes_of = [sizes[dtype] * int(np.prod([int(n) for n in dims.split(",") if n])) for dtype, dims in parts]
        found.append((kind, sum(sizes_of)))
    return found


def test_a_sharded_run_has_the_losses_of_a_replicated_one(replicated, sharded):
    np.testing.assert_allclose(sharded.losses, replicated.losses, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(sharded.state.params), jax.tree.leaves(replicated.state.params), strict=True):
        np.testing.assert_allclose(fetch(a), fetch(b), rtol=1e-3, atol=1e-4)


def test_a_sharded_run_holds_an_nth_of_the_state_on_each_device(replicated, sharded):
    whole, part = (memory_of(each.step)[0] - each.batch for each in (replicated, sharded))
    assert whole > 4 * replicated.sizes["params"]  # parameters, their average and two moments
    assert part / whole < 1.1 / jax.device_count()


def test_a_replicated_update_holds_one_all_reduce_of_the_size_of_the_parameters(replicated):
    ((kind, size),) = collectives(replicated.step)
    assert kind == "all-reduce"
    # a little less where two gradients are equal, as those of two biases that are added, and are sent once
    params = replicated.sizes["params"]
    assert 0.995 * params < size <= params + 4 * replicated.sizes["metrics"]


def test_a_sharded_update_reduces_each_gradient_once_and_gathers_parameters(sharded):
    """XLA's CPU compiler does not make a reduce-scatter of an all-reduce and a slice, as those of GPU and TPU do."""
    found = collectives(sharded.step)
    by_kind = {name: sum(size for kind, size in found if kind == name) for name in COLLECTIVES}
    reduced = by_kind["all-reduce"] + by_kind["reduce-scatter"] * jax.device_count()
    params = sharded.sizes["params"]
    assert 0.98 * params < reduced < 1.01 * params, by_kind
    assert 0.98 * params < by_kind["all-gather"] < 1.01 * params, by_kind
    assert sum(by_kind.values()) < 2.05 * params, by_kind


def test_steps_in_one_call_are_those_of_several(replicated, data):
    together = Trained("replicated", data, steps_per_call=4)
    np.testing.assert_allclose(together.losses, replicated.losses[3::4], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(together.state.params), jax.tree.leaves(replicated.state.params), strict=True):
        np.testing.assert_allclose(fetch(a), fetch(b), rtol=1e-4, atol=1e-5)
    assert [kind for kind, _ in collectives(together.step)] == ["all-reduce"]  # in the loop's body, once a step
