"""How a table is to be split over a mesh, as callers of `embax.shard`, `Table.create` and `sharding.plan` describe it.

For instance, `Split(mesh, "x", "rows-cyclic")` on 4 devices of the axis `x` puts the rows 1, 5 and 9 on device 1;
`Split(mesh, "x", columns="y")` puts a block of rows on each device of `x`, and a part of each of them on each of `y`.
The engine of meshes checks a description, and makes a Placement of it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from jax.sharding import AbstractMesh, Mesh

Layout = Literal["rows", "rows-cyclic", "columns", "replicated"]


@dataclasses.dataclass(frozen=True)
class Split:
    """A description of where the rows of tables are to be on a mesh, unchecked.

    Args:
      mesh: The mesh.
      axis: The mesh axis, or axes, over which rows are split; of the layout `"columns"`, the columns.
      layout: `"rows"`: device `k` has the `k`-th block of rows. `"rows-cyclic"`: row `r` is on device `r mod n`.
        `"columns"`: each device has a part of every row. `"replicated"`: each device has all rows.
      columns: With a layout of rows: the mesh axis over which the columns are split, too.
      skew: How many times the mean a device may ask another one for in a round, at least 1, dimensionless.
      pool_at_owners: Whether the owners of rows sum those of a bag, where a sum is less to send than rows.
    """

    mesh: Mesh | AbstractMesh
    axis: str | Sequence[str]
    layout: Layout = "rows"
    columns: str | None = None
    skew: float = 2.0
    pool_at_owners: bool = False
