"""Layouts of arrays on a mesh, in particular on one with explicit axes, where the sharding is part of the type."""

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, reshard
from jaxtyping import Array, Shaped


def is_explicit(mesh: Mesh | AbstractMesh) -> bool:
    """Whether a mesh has an explicit axis, so that shardings are part of the types of its arrays."""
    return AxisType.Explicit in mesh.axis_types


def explicit_sharding(ids: Shaped[Array, "*batch"], trailing: int = 0) -> NamedSharding | None:
    """Return the sharding of rows read for some ids: as the ids, the trailing axes not sharded.

    Args:
      ids: Row numbers.
      trailing: The number of axes that a row has.

    Returns:
      The sharding, or None where no mesh axis is explicit and XLA chooses.
    """
    sharding = jax.typeof(ids).sharding
    if not is_explicit(sharding.mesh):
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec, *[None] * trailing))


def laid_out(array: Shaped[Array, "*shape"], sharding: NamedSharding | PartitionSpec) -> Shaped[Array, "*shape"]:
    """Give an array a sharding, whether it is concrete or traced, and the mesh axes explicit or left to XLA."""
    if isinstance(sharding, NamedSharding) and not isinstance(array, Tracer):
        return array if isinstance(array, jax.Array) and array.sharding == sharding else jax.device_put(array, sharding)
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else jax.sharding.get_abstract_mesh()
    if is_explicit(mesh):
        return reshard(array, sharding)
    return jax.lax.with_sharding_constraint(array, sharding)


def resharded(
    array: Shaped[Array, "*shape"], mesh: Mesh | AbstractMesh, spec: PartitionSpec
) -> Shaped[Array, "*shape"]:
    """Reshard an array on a mesh with explicit axes; on any other mesh, leave its sharding to XLA."""
    # A NamedSharding, since a bare PartitionSpec needs `jax.set_mesh`.
    return reshard(array, NamedSharding(mesh, spec)) if is_explicit(mesh) else array


def laid_out_as(
    like: Shaped[Array, "*batch"], array: Shaped[Array, "*batch_dim"], batch: int, mesh: Mesh | AbstractMesh
) -> Shaped[Array, "*batch_dim"]:
    """Shard an array like the leading axes of another one.

    Args:
      like: The other array. If it has no explicit sharding, `array` is replicated over explicit axes of `mesh`.
      array: The array.
      batch: How many leading axes both have in common.
      mesh: The mesh of the array.

    Returns:
      The resharded array.
    """
    sharding = explicit_sharding(like)
    if sharding is None:
        return resharded(array, mesh, PartitionSpec())
    return resharded(array, sharding.mesh, PartitionSpec(*sharding.spec[:batch], *[None] * (array.ndim - batch)))


def on_every_device(array: Shaped[Array, "*batch"]) -> Shaped[Array, "*batch"]:
    """Replicate an array over the explicit axes of a mesh, for computations that need all ids of a call."""
    sharding = explicit_sharding(array)
    return array if sharding is None else resharded(array, sharding.mesh, PartitionSpec())
