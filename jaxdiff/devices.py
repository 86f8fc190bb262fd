"""How arrays lie on the devices of all hosts, and come back."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

AXIS = "batch"
"""The name of the one axis along which devices lie: examples are split over it."""


def over_devices() -> tuple[NamedSharding, NamedSharding]:
    """Two ways to lie on all devices of all hosts: split along their first axis, and copied whole to each."""
    mesh = Mesh(np.asarray(jax.devices()), (AXIS,))
    return NamedSharding(mesh, PartitionSpec(AXIS)), NamedSharding(mesh, PartitionSpec())


def put(tree: Any, sharding: Any) -> Any:
    """Trees of arrays that every host has whole, on the devices, by one sharding or a tree of them.

    Keys of jax.random may be among them.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def place(x: Any, sharding: Sharding) -> jax.Array:
        if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x))
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])

    shardings = jax.tree.map(lambda _: sharding, tree) if isinstance(sharding, Sharding) else sharding
    return jax.tree.map(place, tree, shardings)


def fetch(tree: Any) -> Any:
    """Arrays that lie on the devices, whole and as NumPy, on every host; all hosts ask for it together."""

    def whole(x: Any) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return np.asarray(x)
        if x.is_fully_replicated:
            return np.asarray(x.addressable_data(0))
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(whole, tree)
