"""Arrays of JAX made of a caller's values."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Shaped


def as_jax(values: PyTree) -> Shaped[Array, "..."]:
    """Return values as an array of JAX; one that is an array of JAX already is returned itself.

    `jnp.asarray` compiles a program for each shape of a NumPy array (jax 0.10.2); `jnp.array` compiles none. Both copy.
    """
    return jnp.array(values) if isinstance(values, np.ndarray) else jnp.asarray(values)
