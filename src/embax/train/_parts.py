"""Parts: a corpus split over the devices of a mesh, and the communication between processes."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int64, Shaped

# The axis of the mesh over which everything is split.
AXIS = "devices"


class Parts(NamedTuple):
    """The parts of a corpus, one for each device of a mesh; without a mesh, the corpus is one part."""

    mesh: Mesh | None
    number: int
    own: tuple[int, ...]  # the numbers of this process's parts

    def everywhere(self, array: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """Replicate an array, or a random key, that is the same in all processes."""
        if self.mesh is None:
            return array
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            data = self.everywhere(jax.random.key_data(array))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
        return jax.device_put(array, NamedSharding(self.mesh, PartitionSpec()))

    def split(self, array: Shaped[np.ndarray, "steps own *slots"]) -> Shaped[Array | np.ndarray, "steps batch *slots"]:
        """Put this process's share of a batch onto its devices, one part on each."""
        if self.mesh is None:
            return array
        size = array.shape[1] // len(self.own)
        shape = (array.shape[0], size * self.number, *array.shape[2:])

        def of_device(index: Any) -> np.ndarray:
            first = self.own.index(index[1].indices(shape[1])[0] // size) * size
            return array[:, first : first + size]

        return jax.make_array_from_callback(shape, NamedSharding(self.mesh, PartitionSpec(None, AXIS)), of_device)

    def total(self, numbers: Int64[np.ndarray, "..."]) -> Int64[np.ndarray, "..."]:
        """Sum numbers over all processes."""
        if not self.is_shared:
            return numbers
        shape, found = numbers.shape, self.gather(numbers.astype(np.int64).tobytes())
        return np.sum([np.frombuffer(x, np.int64) for x in found], axis=0).reshape(shape)

    def gather(self, data: bytes) -> list[bytes]:
        """Return the data of all processes, in the order of the processes."""
        if not self.is_shared:
            return [data]
        # As bytes, since JAX would cut 64-bit integers to 32 bits.
        size = np.frombuffer(np.int64(len(data)).tobytes(), np.uint8)
        sizes = [int(np.frombuffer(row.tobytes(), np.int64)[0]) for row in multihost_utils.process_allgather(size)]
        padded = np.zeros(max(sizes), np.uint8)
        padded[: len(data)] = np.frombuffer(data, np.uint8)
        found = multihost_utils.process_allgather(padded)
        return [row[:size].tobytes() for row, size in zip(found, sizes, strict=True)]

    @property
    def is_shared(self) -> bool:
        """Whether there are other processes."""
        return self.mesh is not None and len(self.own) < self.number


# The whole corpus as one part.
WHOLE = Parts(None, 1, (0,))


def parts_of(call: str, mesh: Mesh | None) -> Parts:
    """Check a mesh, and find the devices of this process.

    Args:
      call: The call, for error messages.
      mesh: A mesh, or None.

    Returns:
      The parts.

    Raises:
      TypeError: If `mesh` is not a mesh.
      ValueError: If it lacks devices of a process.
    """
    if mesh is None:
        return WHOLE
    if not isinstance(mesh, Mesh):
        raise TypeError(f"`{call}(mesh=...)` must be a jax.sharding.Mesh, got {type(mesh).__name__}. Make one.")
    devices = mesh.devices.ravel()
    if jax.process_count() > 1 and len(devices) < jax.device_count():
        raise ValueError(
            f"`{call}(mesh=...)` must have all {jax.device_count()} devices of the {jax.process_count()} processes, "
            f"got {len(devices)}. Make it of jax.devices()."
        )
    return _parts_of_devices(tuple(devices))


@functools.cache
def _parts_of_devices(devices: tuple[Any, ...]) -> Parts:
    mesh = Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))
    own = tuple(i for i, device in enumerate(devices) if device.process_index == jax.process_index())
    return Parts(mesh, len(devices), own)
