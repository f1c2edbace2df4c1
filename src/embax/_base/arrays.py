"""Arrays of JAX made of a caller's values."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Shaped

_SMALL = 1 << 20  # bytes; of a larger array, no copy is made in between


def as_jax(values: PyTree) -> Shaped[Array, "..."]:
    """Return values as an array of JAX; one that is an array of JAX already is returned itself.

    `jnp.asarray` and `jnp.array` compile a program for each shape of a NumPy array (jax 0.10.2). `jax.device_put`
    compiles none, but may share the caller's memory, so it gets a copy. It does not lay arrays out on a mesh that
    `jax.set_mesh` has set.
    """
    if isinstance(values, np.ndarray) and values.nbytes <= _SMALL and jax.sharding.get_abstract_mesh().empty:
        return jax.device_put(np.array(values))
    return jnp.asarray(values)
