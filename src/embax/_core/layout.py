"""Split: the arguments of `embax.shard`, `Table.create` and `sharding.plan` that say how to split a table over a mesh.

For instance, `Split(mesh, "x", "rows-cyclic")` on 4 devices of the axis `x` puts the rows 1, 5 and 9 on device 1.
`Split(mesh, "x", columns="y")` puts a block of rows on each index of `x`, and splits its columns over `y`. `_mesh`
checks a Split and makes a Placement of it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from jax.sharding import AbstractMesh, Mesh

Layout = Literal["rows", "rows-cyclic", "columns", "replicated"]


@dataclasses.dataclass(frozen=True)
class Split:
    """How to split tables over a mesh; not checked yet.

    Args:
      mesh: The mesh.
      axis: The mesh axis, or axes, over which rows are split; for the layout `"columns"`, the axis for columns.
      layout: `"rows"`: device `k` has the `k`-th block of rows. `"rows-cyclic"`: row `r` is on device `r mod n`.
        `"columns"`: each device has a part of every row. `"replicated"`: each device has all rows.
      columns: With a layout of rows, a mesh axis over which columns are split as well.
      skew: The room for rows in one round, as a multiple of the mean number for an owner; 1 or more, dimensionless.
      pool_at_owners: Whether owners may sum the rows of a bag and send the sum instead of rows, if that is less.
    """

    mesh: Mesh | AbstractMesh
    axis: str | Sequence[str]
    layout: Layout = "rows"
    columns: str | None = None
    skew: float = 2.0
    pool_at_owners: bool = False
