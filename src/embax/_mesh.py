"""How arrays are laid out on a mesh whose axes are explicit."""

import jax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec, reshard
from jaxtyping import Array, Shaped


def explicit_sharding(ids: Shaped[Array, "*batch"], trailing: int = 0) -> NamedSharding | None:
    """Say how rows are laid out on a mesh with explicit axes: as their ids, the trailing axes not sharded.

    Args:
      ids: Row numbers.
      trailing: The number of axes that a row has.

    Returns:
      The sharding, or None where no mesh axis is explicit and XLA chooses.
    """
    sharding = jax.typeof(ids).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec, *[None] * trailing))


def laid_out(array: Shaped[Array, "*shape"], sharding: NamedSharding | PartitionSpec) -> Shaped[Array, "*shape"]:
    """Lay an array out as a caller asks, whether the axes of the mesh are explicit or left to XLA."""
    if isinstance(sharding, NamedSharding) and not isinstance(array, Tracer):
        return array if isinstance(array, jax.Array) and array.sharding == sharding else jax.device_put(array, sharding)
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else jax.sharding.get_abstract_mesh()
    if AxisType.Explicit in mesh.axis_types:
        return reshard(array, sharding)
    return jax.lax.with_sharding_constraint(array, sharding)


def on_every_device(array: Shaped[Array, "*batch"]) -> Shaped[Array, "*batch"]:
    """Replicate an array over the explicit axes of a mesh, for what depends on all ids of a call."""
    sharding = explicit_sharding(array)
    # A NamedSharding, since a bare PartitionSpec needs `jax.set_mesh`.
    return array if sharding is None else reshard(array, NamedSharding(sharding.mesh, PartitionSpec()))
