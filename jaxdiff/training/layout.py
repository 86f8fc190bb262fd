"""How a run lies on the devices of all hosts: a copy on each, stepped under pmap, or shards, stepped under jit."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdiff.devices import AXIS, over_devices
from jaxdiff.training.learner import Learner
from jaxdiff.training.state import TrainState
from jaxdiff.training.step import make_train_step

Batch = dict[str, np.ndarray]


class Layout(NamedTuple):
    """Where things lie. Outside the step each array is there once, as a `jax.Array` over all devices: "whole".

    place: tree of arrays or shapes -> how each lies when whole: copied to every device, or sharded.
    enter: whole tree -> as the step takes it. leave: and back; neither sends anything from device to device.
    feed: this host's parts of batches, in their order -> as the step takes them.
    compile: (number of steps, state, batches, frozen), as the step takes them -> the compiled step, or so many of them,
    over all devices: (state, batches, frozen) -> state.
    """

    place: Callable[[Any], Any]
    enter: Callable[[Any], Any]
    leave: Callable[[Any], Any]
    feed: Callable[[Sequence[Batch]], dict[str, jax.Array]]
    compile: Callable[[int, Any, Any, Any], jax.stages.Compiled]


def make_layout(learner: Learner) -> Layout:
    """The layout that the config asks for."""
    return sharded(learner) if learner.config.train.parameters == "sharded" else replicated(learner)


def replicated(learner: Learner) -> Layout:
    """A copy of everything on every device, and a pmapped step that averages the gradients over them."""
    split, copied = over_devices()
    local = jax.local_device_count()

    def on_each(do: Callable, before: PartitionSpec, after: PartitionSpec) -> Callable:
        """What each device does with its copy of each array, as one program for a whole tree."""
        do_all = partial(jax.tree.map, do)
        return jax.jit(jax.shard_map(do_all, mesh=split.mesh, in_specs=before, out_specs=after, check_vma=False))

    def cut(*parts: np.ndarray) -> np.ndarray:
        """A host's parts [devices x B, ...] of k batches to [devices, B, ...] or, where k > 1, [devices, k, B, ...]."""
        by_device = [x.reshape(local, -1, *x.shape[1:]) for x in parts]
        return by_device[0] if len(parts) == 1 else np.stack(by_device, axis=1)

    def feed(batches: Sequence[Batch]) -> dict[str, jax.Array]:
        whole = lambda *parts: jax.make_array_from_process_local_data(split, cut(*parts))  # noqa: E731
        return jax.tree.map(whole, *batches)

    def compile(count: int, *args: Any) -> jax.stages.Compiled:
        step = jax.pmap(in_a_row(make_train_step(learner, AXIS), count), axis_name=AXIS, donate_argnums=0)
        # pmap wants to see what lies on this host; what it compiles takes the arrays of all hosts
        own = multihost_utils.global_array_to_host_local_array(args, split.mesh, split.spec)
        return step.lower(*own).compile()

    return Layout(
        place=lambda tree: jax.tree.map(lambda _: copied, tree),
        enter=on_each(lambda x: x[None], copied.spec, split.spec),
        leave=on_each(lambda x: x[0], split.spec, copied.spec),
        feed=feed,
        compile=compile,
    )


def sharded(learner: Learner) -> Layout:
    """Every array cut along its longest side that divides by the number of devices (ZeRO, Rajbhandari et al. 2020).

    The same step as under pmap, seen by jit as one computation on the whole batch, from which the compiler finds what
    is to be sent (GSPMD, Xu et al. 2021): parameters are gathered for the loss, and gradients summed and scattered.
    """
    split, copied = over_devices()
    gather = lambda params: jax.lax.with_sharding_constraint(params, copied)  # noqa: E731
    mesh: Mesh = split.mesh

    def place(x: Any) -> NamedSharding:
        sides = [i for i, side in enumerate(x.shape) if side % mesh.size == 0]
        if not sides:
            return copied
        longest = max(sides, key=lambda i: x.shape[i])
        return NamedSharding(mesh, PartitionSpec(*[AXIS if i == longest else None for i in range(len(x.shape))]))

    def feed(batches: Sequence[Batch]) -> dict[str, jax.Array]:
        if len(batches) == 1:
            return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split, x), batches[0])
        along = NamedSharding(mesh, PartitionSpec(None, AXIS))
        return jax.tree.map(lambda *x: jax.make_array_from_process_local_data(along, np.stack(x)), *batches)

    def compile(count: int, state: Any, *args: Any) -> jax.stages.Compiled:
        steps = in_a_row(make_train_step(learner, gather=gather), count)
        out = jax.tree.map(lambda x: x.sharding, state)
        return jax.jit(steps, out_shardings=out, donate_argnums=0).lower(state, *args).compile()

    unchanged = lambda tree: tree  # noqa: E731
    return Layout(lambda tree: jax.tree.map(place, tree), unchanged, unchanged, feed, compile)


def in_a_row(step: Callable, count: int) -> Callable:
    """So many steps as one, over batches [count, B, ...]; one step takes a batch [B, ...] as it is."""
    if count == 1:
        return step

    def steps(state: TrainState, batches: Any, frozen: Any) -> TrainState:
        return jax.lax.scan(lambda state, batch: (step(state, batch, frozen), None), state, batches)[0]

    return steps


def memory_of(step: jax.stages.Compiled) -> tuple[int, int]:
    """Bytes on each device by the compiler's own account: of what the step takes, and of what it works with."""
    memory = step.memory_analysis()
    return memory.argument_size_in_bytes, memory.temp_size_in_bytes
