"""Bad updates: left out and counted, or the end of the run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff.config import Config, Guard, Optimizer, Train
from jaxdiff.training import Learner, init_state, make_train_step


def make(guard=Guard()):  # noqa: B008
    """A learner of one number w by the loss x w, whose gradient is the x of the batch."""
    config = Config(optimizer=Optimizer(learning_rate=0.1, clip_norm=0.0), train=Train(batch_size=1), guard=guard)
    learner = Learner(
        config=config,
        init=lambda key: {"w": jnp.ones(())},
        averaged=("w",),
        frozen={},
        metrics=("loss",),
        losses=lambda params, batch, place: {"loss": batch["x"] * params["w"]},
        prepare=None,
        make_preview=None,
    )
    return init_state(learner), jax.jit(make_train_step(learner))


def take(state, step, values):
    for x in values:
        state = step(state, {"x": jnp.full(1, x, jnp.float32), "label": jnp.zeros(1, jnp.int32)})
    return state


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_changes_the_counts_alone(bad):
    state, step = make()
    before = take(state, step, [1.0, 2.0])
    after = take(before, step, [bad])
    for name in ("params", "ema_params", "opt_state"):
        for a, b in zip(jax.tree.leaves(getattr(after, name)), jax.tree.leaves(getattr(before, name)), strict=True):
            np.testing.assert_array_equal(a, b)
    assert after.step == 3
    assert (after.guarded.good, after.guarded.in_row, after.guarded.most) == (2, 1, 1)
    assert {name: float(after.sums[name]) for name in ("count", "skipped")} == {"count": 2, "skipped": 1}
    for name in ("loss", "grad_norm"):
        assert after.sums[name] == before.sums[name]


def test_after_bad_updates_training_goes_on_as_without_them():
    state, step = make()
    whole = take(state, step, [1.0, 2.0, 3.0, 4.0])
    broken = take(state, step, [1.0, np.nan, 2.0, np.nan, np.nan, 3.0, 4.0])
    np.testing.assert_array_equal(broken.params["w"], whole.params["w"])
    assert broken.guarded.most == 2
    assert broken.guarded.in_row == 0
    assert {int(count) for _, count in optax.tree.get_all_with_path(broken.opt_state, "count")} == {4}


def test_spikes_are_measured_by_the_recent_mean_once_that_has_settled():
    state, step = make(Guard(spike=5.0))
    early = take(state, step, [1.0, 100.0])  # too early to tell
    assert early.guarded.good == 2
    settled = take(state, step, [1.0] * 30)
    np.testing.assert_allclose(settled.guarded.norm, 1.0, rtol=1e-6)
    assert take(settled, step, [4.9]).guarded.in_row == 0
    spiked = take(settled, step, [5.1])
    assert spiked.guarded.in_row == 1
    np.testing.assert_array_equal(spiked.params["w"], settled.params["w"])
    np.testing.assert_array_equal(spiked.guarded.norm, settled.guarded.norm)
    unguarded, step = make()
    assert take(unguarded, step, [1.0] * 30 + [1e6]).guarded.in_row == 0


def test_the_guard_is_validated():
    from jaxdiff.config import validate
    from jaxdiff.errors import JaxdiffError

    for wrong in (Guard(skips=-1), Guard(spike=0.5)):
        with pytest.raises(JaxdiffError, match="guard"):
            validate(dataclasses.replace(Config(), guard=wrong))
