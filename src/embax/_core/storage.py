"""Storage: where the rows of a table are, and how they are read, written and summed. The contract of all storages.

A Table is a weight, its rules and a storage. The weight is one array, and its first axis counts *stored* rows. Only the
storage knows their order, their devices, and whether there are more stored rows than rows. All other code names rows by
ids in `[0, rows)`, with the sentinel `rows` for no row, and asks the storage.

For instance, five rows in three storages:

    dense                        stored rows 0 1 2 3 4
    sharded, cyclic, 2 devices   stored rows 0 2 4 | 1 3 .      the last one is padding
    reversed                     stored rows 4 3 2 1 0

A storage is frozen, hashable, compared by value, and static in the pytree of a Table. `leaf` below is the weight, or
any array with an entry for each stored row, such as an optimizer's state. All methods work on traced arrays, under
every transformation of JAX, unless their docstring says otherwise.
"""

import abc
import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from jaxtyping import Array, Bool, Float, Int, Int32, PyTree, Shaped

from .._base.by_bag import Held
from .._base.distinct import Distinct, Slots
from .containers.stored_rows import StoredRows
from .layout import Split

if TYPE_CHECKING:
    from .own_rows import OwnRows

WriteMode = Literal["set", "add"]
Weight = Shaped[Array, "stored *dim"]


class Storage(abc.ABC):
    """How the rows of a table are stored. Abstract; `Dense` is the plain one."""

    # Properties that other code may ask for, instead of asking which storage it is.
    is_local: ClassVar[bool]  # whether the device of an id can read its row itself, so that reading twice is cheap
    owners_add: ClassVar[bool]  # whether `combine` leaves each sum with the owner of its row, where `add` expects it
    in_blocks: ClassVar[bool]  # whether gathering and storing distinct rows in blocks saves memory
    pools_apart: ClassVar[bool]  # whether features with bags of different lengths are pooled one by one
    name: ClassVar[str] = "storage"  # its name in the repr of a Table
    placement: Any = None  # an `embax.sharding.Placement` if the table is on a mesh

    # ---- Rows and their places.

    @abc.abstractmethod
    def rows_of(self, stored: int) -> int:
        """The number of rows of a weight with `stored` stored rows."""

    @abc.abstractmethod
    def stored_rows(self, rows: int) -> int:
        """The number of stored rows that `rows` rows take, padding included."""

    @abc.abstractmethod
    def with_rows(self, rows: int) -> "Storage":
        """The same storage for another number of rows."""

    @abc.abstractmethod
    def check(self, weight: Weight) -> None:
        """Raise a ValueError if the weight does not fit this storage."""

    @abc.abstractmethod
    def positions(self, ids: Int[Array, "*batch"], rows: int) -> Int[Array, "*batch"]:
        """The stored position of each row; a number outside of the stored rows for an id without a row."""

    @property
    @abc.abstractmethod
    def descriptions(self) -> tuple[str, ...]:
        """The storage in words, each more precise than the one before; messages use the first that tells two apart."""

    @property
    @abc.abstractmethod
    def layout(self) -> PyTree:
        """A hashable value; tables whose storages have equal ones can be stacked into one table."""

    @property
    def noted(self) -> str | None:
        """The name under which an optimizer's state records the storage; None for row order."""
        return self.descriptions[0]

    @property
    def rows_at_once(self) -> int:
        """A table whose rows are a multiple of this needs no padding."""
        return 1

    @property
    def on_explicit_axes(self) -> bool:
        """Whether the rows are on a mesh whose axes are explicit."""
        return False

    # ---- Rows in and out.

    @abc.abstractmethod
    def take(
        self,
        leaf: Weight,
        ids: Int[Array, "*batch"],
        fill_value: float,
        *,
        linear: bool = False,
        given: Int[Array, "*batch"] | None = None,
    ) -> Shaped[Array, "*batch_dim"]:
        """Read a row for each id, laid out as the ids; `fill_value` where an id has no row.

        `linear` says that the leaf is a tangent: the read is transposed, or fused with the code that makes the tangent.
        `given` are the ids as `_ids.unwrapped` returns them, which a kernel may read instead.
        """

    def take_parts(
        self, plain: Sequence[Shaped[Array, "ids *dim"]], leaf: Weight, ids: Int[Array, " all_ids"], fill_value: float
    ) -> Sequence[Shaped[Array, "ids *dim"]]:
        """Read rows by a kernel into several arrays; without one, return the plain ones: `take`, cut by `parted`."""
        return plain

    @abc.abstractmethod
    def put(self, leaf: Weight, ids: Int[Array, " ids"], values: Shaped[Array, "ids *dim"], mode: WriteMode) -> Weight:
        """Set rows or add to rows; ids without a row are dropped. To set, values of equal ids must be equal."""

    @abc.abstractmethod
    def replace(
        self,
        leaf: Weight,
        ids: Int[Array, "*batch"],
        function: Callable[[Array, Array], Array],
        fill_value: float,
        given: Int[Array, "*batch"] | None = None,
    ) -> Weight:
        """Replace the rows of some ids by `function(ids, rows)`; the storage may reshape both for the call.

        `given` is as in `take`, so that this read is the same as a lookup's.
        """

    @abc.abstractmethod
    def to_rows(self, leaf: Weight) -> Shaped[Array, "rows *dim"]:
        """The rows in the order of their ids, in one array on one device."""

    @abc.abstractmethod
    def from_rows(self, values: Shaped[Array, "rows *dim"]) -> Weight:
        """Store rows given in the order of their ids, as a JAX or NumPy array."""

    def held(self, leaf: Weight) -> PyTree:
        """The value that a layer's parameter holds for a weight.

        Returns:
          A `StoredRows`, which keeps weight and storage together; the plain weight if it is in row order.
        """
        return StoredRows(leaf, self)

    # ---- Whole tables made of others; `self` is the storage of the result.

    @abc.abstractmethod
    def created(self, fresh: Callable[[], Shaped[Array, "rows *dim"]]) -> Weight:
        """Make and store the rows of `fresh()`, each device its own."""

    @abc.abstractmethod
    def overwritten(self, leaf: Weight, of: "Storage", others: Weight) -> Weight:
        """Replace the first rows by the first rows of another weight, as far as both have rows."""

    @abc.abstractmethod
    def resized(
        self, call: str, leaf: Weight, rows: int, fresh: Callable[[], Shaped[Array, "more *dim"]]
    ) -> tuple[Weight, "Storage"]:
        """Cut a weight to `rows` rows, or append fresh rows. Returns the weight and its storage."""

    @abc.abstractmethod
    def put_together(self, parts: Sequence[tuple["Storage", Weight]]) -> Weight:
        """Concatenate the rows of several weights."""

    @abc.abstractmethod
    def part(self, leaf: Weight, start: int, rows: int) -> tuple[Weight, "Storage"]:
        """Copy `rows` rows from `start` on, as a weight of its own."""

    # ---- What belongs to the ids of a batch.

    @abc.abstractmethod
    def flat(self, array: Shaped[Array, "..."], shape: tuple[int, ...]) -> Shaped[Array, "ids *dim"]:
        """Reshape an array with entries per id to `(ids, *dim)`, for `joined`."""

    @abc.abstractmethod
    def joined(self, arrays: Sequence[Shaped[Array, "ids ..."]], fill_value: Any) -> Shaped[Array, "total ..."]:
        """Concatenate arrays; each entry stays on its device. `fill_value` pads arrays that do not divide evenly."""

    @abc.abstractmethod
    def parted(self, array: Shaped[Array, "total ..."], lengths: Sequence[int]) -> list[Shaped[Array, "ids ..."]]:
        """Undo `joined`: split an array into the parts of given lengths, without padding."""

    # ---- The rows of a gradient, for optimizers. "Distinct" ids are laid out as `combine` returns them.

    def scratch(self, rows: int) -> Slots:
        """Memory that `combine` reuses from step to step, or None."""
        return None

    @abc.abstractmethod
    def combine(
        self, slots: Slots, ids: Int[Array, " ids"], values: PyTree, rows: int, dim: tuple[int, ...]
    ) -> tuple[Slots, Distinct, Any]:
        """Sum the values of equal ids, in float32 or wider.

        `values` is an array `(ids, *dim)`, a `ByBag`, or a pair of an array and one of shape `(ids,)`. The last
        result is 1 if so many ids had the same owner that other devices had to take over some of its sums.
        """

    @abc.abstractmethod
    def gather(self, leaf: Weight, ids: Int[Array, " distinct"], dim: tuple[int, ...]) -> Shaped[Array, "distinct ..."]:
        """Read the rows of distinct ids; zero where an id has no row. `dim` is the shape of the table's rows."""

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
        """Add to rows, in float32 or wider; `distinct` says that the ids are laid out as `combine` returns them."""

    def step_by_kernel(
        self,
        plain: Sequence[Array],
        arrays: Sequence[Array],
        ids: Int[Array, " ids"],
        values: Held,
        how: Any,
        given: Any = None,
    ) -> list[Array]:
        """Run a step of an optimizer by a kernel; return the plain result if there is no kernel.

        The values are an array `(ids, *dim)`, or a `ByBag`. The arrays are the weight and the state of a table, and
        `how` is a `_kernels.step.Step`. `given` is the `RowGrad.given` of the ids, or None.
        """
        return list(plain)

    @abc.abstractmethod
    def laid_out(self, leaf: Shaped[Array, "stored ..."], dim: tuple[int, ...]) -> Shaped[Array, "stored ..."]:
        """Shard an array with an entry for each stored row like the weight."""

    @abc.abstractmethod
    def everywhere(self, array: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """Replicate an array over all devices that have rows."""

    # ---- Bags.

    def pools(self, table: Any, bags: tuple[int, ...], length: int, weighted: bool) -> bool:
        """Whether bags of one length are to be summed by `pooled`, on the devices that own their rows."""
        return False

    def pooled(
        self,
        table: Any,
        pool: Callable[..., Array],
        ids: Int[Array, "*bags length"],
        counted: Bool[Array, "*bags length"],
        weights: Float[Array, "*bags length"] | None,
    ) -> Float[Array, "*bags_dim"]:
        """Sum the rows of bags; `pool(table, ids, counted, weights)` does it for a dense table."""
        raise NotImplementedError

    def reads_bags(self, tangent: Weight, ids: Int[Array, "*batch"]) -> bool:
        """Whether the tangent of bags is to be read by `read_bags`, so that the gradient has one value for each bag."""
        return False

    def bags_by_kernel(
        self,
        plain: Sequence[Float[Array, "*bags_dim"]],
        table: Any,
        ids: Int[Array, "*batch"],
        counted: Bool[Array, "*batch"],
        weights: Float[Array, "*batch"] | None,
        offsets: Int32[Array, " bags_and_1"] | None,
        given: Int[Array, "*batch"] | None = None,
        firsts: Sequence[int] = (0,),
    ) -> Sequence[Float[Array, "*bags_dim"]]:
        """Sum the rows of bags by a kernel; return the plain sums if there is no kernel.

        The sums are one array, or are cut into several: `firsts` is the first bag of each. `given` is as in `take`.
        """
        return plain

    @abc.abstractmethod
    def summed_by(
        self, bags: Int32[Array, " ids"], terms: Float[Array, "ids *dim"], number: int
    ) -> Float[Array, "bags *dim"]:
        """Sum terms by bag; `bags` is the bag of each term, in rising order, and is laid out as the ids."""

    # ---- Heads, which read all rows.

    @abc.abstractmethod
    def own_rows(self, stored: int) -> "OwnRows":
        """Access to the rows of one device, which holds `stored` stored rows."""

    @abc.abstractmethod
    def of_device(self, tokens: int, stored: int) -> tuple[int, int]:
        """How many of `tokens` tokens, and of `stored` stored rows, one device computes with."""

    @abc.abstractmethod
    def aligned(self, weight: Weight, *arrays: Array) -> tuple[Array, ...]:
        """Lay out a weight and arrays of tokens for `of_tokens`, so that their derivatives are summed over devices."""

    @abc.abstractmethod
    def of_tokens(
        self,
        function: Callable[..., PyTree],
        weight: Weight,
        batch: int,
        arrays: Sequence[Array],
        fills: Sequence[float],
    ) -> tuple[Array, ...]:
        """Call `function(weight, *arrays)` on each device that owns rows.

        Args:
          function: Called with a device's part of the weight; returns 3 arrays of the batch's shape. It joins the
            results of all owners by `OwnRows`.
          weight: The weight.
          batch: How many axes the batch has.
          arrays: Arrays with entries per token.
          fills: The padding value of each array, where tokens do not divide evenly.

        Returns:
          The 3 arrays, laid out as the tokens.
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
        """Call `function(weight, *arrays)` on each device that owns rows, for gradients of a head.

        The function returns an array like the weight, and one like `arrays[0]` that sums over the device's rows. The
        arguments are those of `of_tokens`.

        Returns:
          Both arrays, the second one summed over all rows and in the dtype of `arrays[0]`.
        """

    @abc.abstractmethod
    def logits(
        self,
        of_rows: Callable[[Array, Array, Array], Array],
        weight: Weight,
        x: Float[Array, "*batch_dim"],
    ) -> Float[Array, "*batch rows"]:
        """The logits of all rows in row order; `of_rows(ids, rows, x)` computes the logits of some rows."""


def storage_on_mesh(call: str, split: Split, shape: Sequence[int]) -> Storage:
    """Check how a table of the shape `(rows, *dim)` is to be split, and make its storage.

    Imported by name, since the core must not import `_mesh`.
    """
    return importlib.import_module("embax._mesh.storage").storage_of(call, split, shape)
