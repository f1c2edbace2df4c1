"""Sharded tables: put tables on a device mesh, and plan what a layout will cost."""

from .._core.containers.stored_rows import StoredRows as StoredRows
from .._core.layout import Layout as Layout
from .._mesh.placement import Placement as Placement
from ._plan import plan as plan
from ._results import Plan as Plan
from ._results import TablePlan as TablePlan
from ._results import Transfer as Transfer
from ._shard import rounds as rounds
from ._shard import shard as shard
from ._shard import unshard as unshard
