"""CompositionalTable: a vector for each of very many ids, combined from rows of two small tables.

For instance, 1,000,000 ids with 1,000 remainders: id 123,456 combines row 123 of `quotient` and row 456 of `remainder`.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Key, Shaped
from numpy.typing import ArrayLike

from .._base import check as _check
from .._core import ids as _ids
from .._core.containers import flax_state as _flax
from .._core.lookup import read
from .._core.table import Initializer, OutOfRange, Table, with_weight

Combine = Literal["mul", "add", "concat"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("quotient", "remainder"),
    meta_fields=("ids", "combine", "padding_idx"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class CompositionalTable:
    """A vector for each of very many ids, combined from a row for its quotient and a row for its remainder.

    `vector[id] = combine(quotient[id // m], remainder[id % m])`, where `m` is the number of rows of `remainder`. No two
    ids share both parts, so each has a vector of its own, while only `m + ids / m` rows are stored: 63,246 rows for 1e9
    ids, with `m` near the square root. In return, ids with a common quotient or remainder are not independent.

    A pytree of two Tables, as `embax.value_and_grad` and `embax.optim` take them. Use `create` to make one.

    Args:
      quotient: The Table of quotients.
      remainder: The Table of remainders.
      ids: The number of ids.
      combine: `"mul"`, `"add"` or `"concat"`, which concatenates the parts.
      padding_idx: An id, 0 or more, that reads zero and has no gradient. Default: none.

    Example:
      >>> import embax, jax
      >>> table = embax.CompositionalTable.create(jax.random.key(0), ids=1_000_000_000, dim=16)
      >>> table.quotient, table.remainder
      (Table(float32[31623,16]), Table(float32[31623,16]))
      >>> table([[0, 999_999_999]]).shape
      (1, 2, 16)

    References:
      Shi et al., Compositional embeddings using complementary partitions for memory-efficient recommendation systems,
      2020, https://arxiv.org/abs/1909.02107, section 3 (quotient-remainder).
    """

    quotient: Table
    remainder: Table
    ids: int
    combine: Combine = "mul"
    padding_idx: int | None = None

    @classmethod
    def create(
        cls,
        key: Key[Array, ""],
        ids: int,
        dim: int,
        *,
        remainders: int | None = None,
        combine: Combine = "mul",
        init: Initializer | None = None,
        dtype: DTypeLike = jnp.float32,
        padding_idx: int | None = None,
        out_of_range: OutOfRange = "error",
    ) -> "CompositionalTable":
        """Make the two tables of fresh rows.

        Args:
          key: A JAX random key.
          ids: The number of ids, 1 or more.
          dim: The size of a vector; even for `"concat"`, where each part has half of it.
          remainders: The number of rows of the table of remainders. Default: the square root of `ids`, rounded up,
            which stores the fewest rows.
          combine: How the parts are combined.
          init: As in `Table.create`. Default: normal, such that vectors have a norm near 1.
          dtype: The dtype of the weights.
          padding_idx: An id that reads zero and has no gradient; negative ids count from the end.
          out_of_range: As in `Table`.

        Returns:
          The table.

        Raises:
          TypeError: If a size is not a whole number, or tables of integers get no `init`.
          ValueError: If an argument is outside its range, or `dim` is odd for `"concat"`.

        Example:
          >>> import embax, jax
          >>> embax.CompositionalTable.create(jax.random.key(0), ids=10_000, dim=8, remainders=500).quotient
          Table(float32[20,8])
        """
        call = "embax.CompositionalTable.create"
        combine = _check.choice(f"{call}(combine=...)", combine, Combine)
        dim = _check.size(f"{call}(dim=...)", dim)
        ids = _at_least_one(f"{call}(ids=...)", ids)
        if remainders is None:
            remainders = math.isqrt(ids - 1) + 1
        remainders = _at_least_one(f"{call}(remainders=...)", remainders)
        if combine == "concat" and dim % 2:
            raise ValueError(f"`{call}(dim=...)` must be even for 'concat', got {dim}. Each part has half of it.")
        if padding_idx is not None:
            padding_idx = _check.row(f"{call}(padding_idx=...)", padding_idx, ids)
        if init is None:
            if not jnp.issubdtype(dtype, jnp.inexact):
                raise TypeError(
                    f"`{call}(init=...)` must be given for tables of integers, got None for {jnp.dtype(dtype)}. "
                    "Pass init(key, shape, dtype)."
                )
            # Such that each entry of a vector has the variance 1 / dim.
            wide = max(dim, 1)
            variance = {"mul": wide**-0.5, "add": 0.5 / wide, "concat": 1 / wide}
            init = jax.nn.initializers.normal(stddev=math.sqrt(variance[combine]))
        width = dim // 2 if combine == "concat" else dim
        tables = [
            Table.create(part, rows, width, init=init, dtype=dtype, out_of_range=out_of_range)
            for part, rows in zip(jax.random.split(key), (-(-ids // remainders), remainders), strict=True)
        ]
        return cls(*tables, ids=ids, combine=combine, padding_idx=padding_idx)

    def __call__(self, ids: ArrayLike) -> Shaped[Array, "*batch_dim"]:
        """Combine the vector of each id.

        Args:
          ids: Ids in `[-ids, ids)`, in any form that `lookup` takes.

        Returns:
          The vectors, `(*ids.shape, dim)`.

        Raises:
          TypeError: If the ids are not of an integer dtype.
          IndexError: If a concrete id is out of range, and `out_of_range` is `"error"`.
          ValueError: If there are more than 2**31 - 1 ids, and `jax_enable_x64` is off.
        """
        own = with_weight(self.quotient, jax.ShapeDtypeStruct((self.ids, 0), self.quotient.dtype))
        return _vectors(self, _ids.prepare("embax.CompositionalTable(ids)", ids, own))


@functools.partial(jax.jit, inline=True)  # one program for an eager call
def _vectors(table: CompositionalTable, ids: _ids.Ids) -> Shaped[Array, "*batch_dim"]:
    number = _ids.resolve(ids, table.ids, table.quotient.out_of_range)
    exists = (number >= 0) & (number < table.ids)
    padding = jnp.zeros(number.shape, bool) if table.padding_idx is None else number == table.padding_idx
    exists &= ~padding
    m = table.remainder.rows
    quotient, remainder = (_unclipped(part) for part in (table.quotient, table.remainder))
    quotient = read(quotient, jnp.where(exists, number // m, quotient.rows), None, ~padding)
    remainder = read(remainder, jnp.where(exists, number % m, m), None, ~padding)
    if table.combine == "concat":
        out = jnp.concatenate([quotient, remainder], axis=-1)
    else:
        out = quotient * remainder if table.combine == "mul" else quotient + remainder
    return jnp.where(padding[..., None], jnp.zeros((), out.dtype), out)


def _unclipped(table: Table) -> Table:
    """Turn clipping off in a part: ids are clipped already, and the sentinel of padding must not be."""
    return dataclasses.replace(table, out_of_range="nan") if table.out_of_range == "clip" else table


def _at_least_one(argument: str, value: object) -> int:
    number = _check.size(argument, value)
    if number < 1:
        raise ValueError(f"`{argument}` must be 1 or more, got {number}. Pass a larger number.")
    return number


_flax.register_fields(CompositionalTable, "quotient", "remainder")
