"""Storage: where the rows of a table are, and how they are read, written and summed. The contract of all storages.

A Table is a weight, its rules and a storage. The weight is one array, whose first axis is of *stored* rows: in which
order they are stored, on which device, and whether there are more of them than rows, the storage alone knows. All other
code names rows by ids, in `[0, rows)`, with `rows` for none, and asks the storage.

For instance, five rows in three storages:

    dense                      stored rows 0 1 2 3 4
    sharded, cyclic, 2 parts   stored rows 0 2 4 | 1 3 .      the last one has no meaning
    reversed                   stored rows 4 3 2 1 0

A storage is frozen, hashable, compared by value, and static in the pytree of a Table. `leaf` below is the weight, or
any array with a row, or a number, for each stored row, such as an optimizer's state. Everything works on traced arrays,
under every transformation of JAX, unless it says otherwise.
"""

import abc
import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from jaxtyping import Array, Bool, Float, Int, Int32, PyTree, Shaped

from .._base.distinct import Distinct, Slots
from .layout import Split
from .stored_rows import StoredRows

if TYPE_CHECKING:
    from .own_rows import OwnRows

WriteMode = Literal["set", "add"]
Weight = Shaped[Array, "stored *dim"]


class Storage(abc.ABC):
    """How the rows of a table are stored. Abstract; `Dense` is the plain one."""

    # What follows from where rows are. To ask which storage it is, is for the packages that move tables alone.
    is_local: ClassVar[bool]  # whether a row can be read wherever its id is, so that to read it twice costs little
    owners_add: ClassVar[bool]  # whether the sums of `combine` are where their rows are, and `add` takes them so
    in_blocks: ClassVar[bool]  # whether to gather and store distinct rows block by block saves memory
    pools_apart: ClassVar[bool]  # whether bags of different lengths of several features are pooled one by one
    name: ClassVar[str] = "storage"  # what a table calls it where it shows its rules
    placement: Any = None  # on a mesh, where the rows are: `embax.sharding.Placement`

    # ---- Rows and their places.

    @abc.abstractmethod
    def rows_of(self, stored: int) -> int:
        """The number of rows of a weight of some stored rows."""

    @abc.abstractmethod
    def stored_rows(self, rows: int) -> int:
        """The number of stored rows that so many rows take."""

    @abc.abstractmethod
    def with_rows(self, rows: int) -> "Storage":
        """The same storage of another number of rows."""

    @abc.abstractmethod
    def check(self, weight: Weight) -> None:
        """Raise a ValueError if the weight cannot be stored so."""

    @abc.abstractmethod
    def positions(self, ids: Int[Array, "*batch"], rows: int) -> Int[Array, "*batch"]:
        """Where rows are stored; any number outside of the stored rows for an id that has none."""

    @property
    @abc.abstractmethod
    def descriptions(self) -> tuple[str, ...]:
        """The storage in words, ever more precisely; the first are what a user would call it."""

    @property
    @abc.abstractmethod
    def layout(self) -> PyTree:
        """What two tables must have in common to be stored as one, hashable."""

    @property
    def noted(self) -> str | None:
        """How the state of an optimizer notes the storage of its tables; None for rows in the order of their ids."""
        return self.descriptions[0]

    @property
    def rows_at_once(self) -> int:
        """By what multiple of rows a table grows so that all devices have equally many."""
        return 1

    @property
    def on_explicit_axes(self) -> bool:
        """Whether the rows are on a mesh whose axes are explicit."""
        return False

    # ---- Rows in and out.

    @abc.abstractmethod
    def take(
        self, leaf: Weight, ids: Int[Array, "*batch"], fill_value: float, *, linear: bool = False
    ) -> Shaped[Array, "*batch_dim"]:
        """Read a row for each id, laid out as the ids; `fill_value` where an id has none.

        `linear` says that the leaf is a tangent: the read is transposed, or fused into what makes the tangent.
        """

    @abc.abstractmethod
    def put(self, leaf: Weight, ids: Int[Array, " ids"], values: Shaped[Array, "ids *dim"], mode: WriteMode) -> Weight:
        """Set rows, to equal values where an id occurs twice, or add to rows; an id without a row goes nowhere."""

    @abc.abstractmethod
    def replace(
        self,
        leaf: Weight,
        ids: Int[Array, "*batch"],
        function: Callable[[Array, Array], Array],
        fill_value: float,
    ) -> Weight:
        """Put `function(ids, rows)` in the place of the rows of some ids, in whatever shape suits; as `take`, `put`."""

    @abc.abstractmethod
    def to_rows(self, leaf: Weight) -> Shaped[Array, "rows *dim"]:
        """The rows in the order of their ids, in one array on one device."""

    @abc.abstractmethod
    def from_rows(self, values: Shaped[Array, "rows *dim"]) -> Weight:
        """Store rows that are in the order of their ids; a NumPy array, too."""

    def held(self, leaf: Weight) -> PyTree:
        """What a layer holds in place of a weight, without a Table around it: rows that go with their storage.

        Returns:
          A `StoredRows`; the weight itself where its rows are in the order of their ids.
        """
        return StoredRows(leaf, self)

    # ---- Whole tables made of others. The storage is that of the result.

    @abc.abstractmethod
    def created(self, fresh: Callable[[], Shaped[Array, "rows *dim"]]) -> Weight:
        """Store rows as they are made, each device its own."""

    @abc.abstractmethod
    def overwritten(self, leaf: Weight, of: "Storage", others: Weight) -> Weight:
        """Put the first rows of another weight in the place of the first ones of this: as many as both have."""

    @abc.abstractmethod
    def resized(
        self, call: str, leaf: Weight, rows: int, fresh: Callable[[], Shaped[Array, "more *dim"]]
    ) -> tuple[Weight, "Storage"]:
        """Cut a weight to some rows, or add fresh ones behind its last."""

    @abc.abstractmethod
    def put_together(self, parts: Sequence[tuple["Storage", Weight]]) -> Weight:
        """Store the rows of several weights one behind the other."""

    @abc.abstractmethod
    def part(self, leaf: Weight, start: int, rows: int) -> tuple[Weight, "Storage"]:
        """Take out some rows from `start` on."""

    # ---- What belongs to the ids of a batch.

    @abc.abstractmethod
    def flat(self, array: Shaped[Array, "..."], shape: tuple[int, ...]) -> Shaped[Array, "ids *dim"]:
        """Give what there is for each id the shape `(ids, *dim)`, for `joined`."""

    @abc.abstractmethod
    def joined(self, arrays: Sequence[Shaped[Array, "ids ..."]], fill_value: Any) -> Shaped[Array, "total ..."]:
        """Concatenate arrays, each entry on its own device; `fill_value` pads those that do not divide."""

    @abc.abstractmethod
    def parted(self, array: Shaped[Array, "total ..."], lengths: Sequence[int]) -> list[Shaped[Array, "ids ..."]]:
        """Take apart what has an entry for each entry of what `joined` gave."""

    # ---- The rows of a gradient, for optimizers. Distinct ids are laid out as `combine` gives them.

    def scratch(self, rows: int) -> Slots:
        """Memory that `combine` keeps from step to step, or None."""
        return None

    @abc.abstractmethod
    def combine(
        self, slots: Slots, ids: Int[Array, " ids"], values: PyTree, rows: int, dim: tuple[int, ...]
    ) -> tuple[Slots, Distinct, Any]:
        """Sum the values of each row, in float32 or wider: an array `(ids, *dim)`, or a pair of it and one `(ids,)`.

        The last result is 1 where gradients crowded so that devices had to share the rows of others.
        """

    @abc.abstractmethod
    def gather(self, leaf: Weight, ids: Int[Array, " distinct"], dim: tuple[int, ...]) -> Shaped[Array, "distinct ..."]:
        """Read the rows of distinct ids; zero where there is none. `dim` is that of the table's rows."""

    @abc.abstractmethod
    def store(
        self,
        leaf: Weight,
        ids: Int[Array, " distinct"],
        values: Shaped[Array, "distinct ..."],
        dim: tuple[int, ...],
        mode: WriteMode = "set",
    ) -> Weight:
        """Set the rows of distinct ids, or add to them."""

    @abc.abstractmethod
    def add(self, leaf: Weight, ids: Int[Array, " ids"], values: Float[Array, "ids *dim"], distinct: bool) -> Weight:
        """Add to rows, in float32 or wider; `distinct` says that the ids are laid out as `combine` gives them."""

    def step_by_kernel(
        self,
        plain: Sequence[Array],
        arrays: Sequence[Array],
        ids: Int[Array, " ids"],
        values: Float[Array, "ids *dim"],
        how: Any,
    ) -> list[Array]:
        """Run a step of an optimizer by a kernel, where there is one; else return the plain result of it.

        The arrays are the weight and the state of a table, and `how` is a `_kernels.step.Step`.
        """
        return list(plain)

    @abc.abstractmethod
    def laid_out(self, leaf: Shaped[Array, "stored ..."], dim: tuple[int, ...]) -> Shaped[Array, "stored ..."]:
        """Lay an array with an entry for each stored row out as the weight."""

    @abc.abstractmethod
    def everywhere(self, array: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """Copy an array to every device that has rows."""

    # ---- Bags.

    def pools(self, table: Any, bags: tuple[int, ...], length: int, weighted: bool) -> bool:
        """Whether `pooled` sums bags of one length, where their rows are."""
        return False

    def pooled(
        self,
        table: Any,
        pool: Callable[..., Array],
        ids: Int[Array, "*bags length"],
        counted: Bool[Array, "*bags length"],
        weights: Float[Array, "*bags length"] | None,
    ) -> Float[Array, "*bags dim"]:
        """Sum the rows of bags; `pool(table, ids, counted, weights)` does so of a dense table."""
        raise NotImplementedError

    def bags_by_kernel(
        self,
        plain: Float[Array, "*bags_dim"],
        table: Any,
        ids: Int[Array, "*batch"],
        counted: Bool[Array, "*batch"],
        weights: Float[Array, "*batch"] | None,
        offsets: Int32[Array, " bags_and_1"] | None,
    ) -> Float[Array, "*bags_dim"]:
        """Sum the rows of bags by a kernel, where there is one; else return the plain sums."""
        return plain

    @abc.abstractmethod
    def summed_by(
        self, bags: Int32[Array, " ids"], terms: Float[Array, "ids *dim"], number: int
    ) -> Float[Array, "bags *dim"]:
        """Sum terms by the bag that they belong to, in rising order; the bags are laid out as the ids."""

    # ---- Heads, which read all rows.

    @abc.abstractmethod
    def own_rows(self, stored: int) -> "OwnRows":
        """The rows that a device reads, of which it has so many stored."""

    @abc.abstractmethod
    def of_device(self, tokens: int, stored: int) -> tuple[int, int]:
        """How many of some tokens, and of the stored rows, a device sees to."""

    @abc.abstractmethod
    def aligned(self, weight: Weight, *arrays: Array) -> tuple[Array, ...]:
        """Make a weight, and arrays of tokens, fit for `of_tokens`, with derivatives that are whole."""

    @abc.abstractmethod
    def of_tokens(
        self,
        function: Callable[..., PyTree],
        weight: Weight,
        batch: int,
        arrays: Sequence[Array],
        fills: Sequence[float],
    ) -> tuple[Array, ...]:
        """Call `function(weight, *arrays)`, which returns 3 arrays of the batch's shape, where the rows are.

        Args:
          function: Called with what a device has of the weight. It joins by `OwnRows` what owners find.
          weight: The weight.
          batch: How many axes the batch has.
          arrays: What there is for each token.
          fills: What stands for a token that there is not, one for each array.

        Returns:
          The arrays, laid out as the tokens.
        """

    @abc.abstractmethod
    def of_rows_and_tokens(
        self,
        function: Callable[..., PyTree],
        weight: Weight,
        batch: int,
        arrays: Sequence[Array],
        fills: Sequence[float],
    ) -> tuple[Weight, Array]:
        """As `of_tokens`, for a function that returns an array like the weight, and a sum over its rows like the first.

        Returns:
          Both, the latter summed over all rows, in the dtype of the first array.
        """

    @abc.abstractmethod
    def logits(
        self,
        of_rows: Callable[[Array, Array, Array], Array],
        weight: Weight,
        x: Float[Array, "*batch_dim"],
    ) -> Float[Array, "*batch rows"]:
        """The logits of all rows in the order of their ids; `of_rows(ids, rows, x)` gives those of some rows."""


def storage_on_mesh(call: str, split: Split, shape: Sequence[int]) -> Storage:
    """Check how a table of a shape, `(rows, *dim)`, is to be split, and make its storage.

    By name, since the core leans on no other package.
    """
    return importlib.import_module("embax._mesh.storage").storage_of(call, split, shape)
