"""How arrays lie on the devices of this host."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def over_local_devices() -> tuple[NamedSharding, NamedSharding]:
    """Two ways to lie on this host's devices: split along their first axis, and copied whole to each."""
    mesh = Mesh(np.asarray(jax.local_devices()), ("batch",))
    return NamedSharding(mesh, PartitionSpec("batch")), NamedSharding(mesh, PartitionSpec())
