"""Embedding: a drop-in for brainstate's layer, whose State is read by `embax.lookup`."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import brainstate
import brainunit
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, DTypeLike, Key, PyTree, Shaped
from numpy.typing import ArrayLike

from .._base import check as _check
from .._base.arrays import as_jax
from .._core import ids as _ids
from .._core.containers.held import held, table_of
from .._core.containers.stored_rows import StoredRows
from .._core.containers.write_back import clipped_table
from .._core.lookup import read
from .._core.resize import resize
from .._core.table import Initializer, OutOfRange, Table, rules_of, with_weight
from .._heads.attend import attend
from .._layers.layer import TableLayer
from ._layers import link
from ._store import inside_brainstate_transform
from ._weight import Init, in_unit, initial_weight, split_unit, with_unit, zero_row


class Embedding(brainstate.nn.Module, TableLayer):
    """A lookup table of vectors, with the interface of `brainstate.nn.Embedding`.

    `embedding(indices)` reads one row of `weight` for each index, by the rules of `embax.lookup`. The rules are
    attributes, which may be changed between calls. If the table is sharded, `weight.value` is a `StoredRows`: the
    stored rows together with their layout.

    With `max_norm`, a call also stores the clipped rows, both eagerly and under brainstate's own transformations
    (`jit`, `grad`, `for_loop`, `cond`, `vmap`, `vmap2`, ...). Under raw JAX transformations alone nothing can be
    stored, and only the output is clipped. A raw transformation *inside* a brainstate one cannot be detected: pass
    `write_back=False` there, and call `renormalize` outside. Storing copies the table once; under
    `embax.brainstate.jit` it costs only the rows that are read. A frozen table is never written.

    Args:
      num_embeddings: The number of rows, 0 or more.
      embedding_size: The size of a row, or the sizes of its axes.
      embedding_init: An initialiser: brainstate's `init(shape)`, or JAX's `init(key, shape, dtype)`, recognised by a
        first parameter named `key`. Or an array, NumPy array, nested list, number or brainunit Quantity that broadcasts
        to `(num_embeddings, *embedding_size)`. Default: `brainstate.nn.init.LecunUniform()`.
      padding_idx: A row in `[0, num_embeddings)` that starts at zero, never gets a gradient and is never renormalised.
      max_norm: Rows are read clipped to this norm: a number in the unit of the table, or a Quantity. Default: no limit.
      norm_type: The p of that norm, above 0 or infinity, dimensionless.
      scale_grad_by_freq: Divide the gradient of a row by the number of times it is read in the call.
      freeze: The weight gets no gradient and is never written.
      name: The name of the module.
      param_type: The type that holds the weight: `brainstate.ParamState`, another State, or `brainstate.FakeState`,
        which transformations ignore.
      out_of_range: What an index without a row reads: `"error"`, `"clip"`, `"nan"` or `"zero"`, as in `embax.Table`.
      dtype: The dtype of the output. Default: the weight's.
      write_back: With `max_norm`, whether a call stores the rows that it clips.

    Raises:
      TypeError: If an argument is of the wrong type, or `max_norm` is given for a table of integers.
      ValueError: If an argument is outside its range, or `embedding_init` returns another shape.

    Example:
      >>> import brainstate, embax, jax.numpy as jnp
      >>> embedding = embax.Embedding(num_embeddings=10, embedding_size=3)
      >>> embedding.weight.value.shape
      (10, 3)

      Indices may have any shape; negative ones count from the end:

      >>> embedding(jnp.array([1, 3, -1])).shape
      (3, 3)
      >>> embedding(jnp.array([[1, 2, 3, 4], [5, 6, 7, 8]])).shape
      (2, 4, 3)

      A padding row is zero and gets no gradient:

      >>> embedding = embax.Embedding(10, 3, padding_idx=0)
      >>> indices = jnp.array([0, 2, 0, 5])
      >>> embedding(indices)[0]
      Array([0., 0., 0.], dtype=float32)
      >>> loss = lambda: embedding(indices).sum()
      >>> brainstate.transform.grad(loss, embedding.weight)()[jnp.array([0, 2])]
      Array([[0., 0., 0.],
             [1., 1., 1.]], dtype=float32)

      A limit to the norm applies to rows that are read, and then to the stored rows:

      >>> embedding = embax.Embedding(2, 2, embedding_init=jnp.array([[3.0, 4.0], [6.0, 8.0]]), max_norm=1.0)
      >>> embedding(0)
      Array([0.6, 0.8], dtype=float32)
      >>> embedding.weight.value
      Array([[0.6, 0.8],
             [6. , 8. ]], dtype=float32)

      Existing vectors, frozen, in a state or without one:

      >>> vectors = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
      >>> embedding = embax.Embedding.from_pretrained(vectors)
      >>> embedding(jnp.array([1]))
      Array([[4., 5., 6.]], dtype=float32)
      >>> list(embedding.states())
      [('weight',)]
      >>> embedding = embax.Embedding.from_pretrained(vectors, param_type=brainstate.FakeState)
      >>> list(embedding.states())
      []
    """

    __module__ = "embax.brainstate"
    _SIZE = "embedding_size"  # the constructor's argument for the size of a row

    def __init__(
        self,
        num_embeddings: int,
        embedding_size: int | Sequence[int],
        embedding_init: Init = brainstate.nn.init.LecunUniform(),  # noqa: B008 (it has no state)
        padding_idx: int | None = None,
        max_norm: float | brainunit.Quantity | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        freeze: bool = False,
        name: str | None = None,
        param_type: Callable[[PyTree], brainstate.State] = brainstate.ParamState,
        *,
        out_of_range: OutOfRange = "error",
        dtype: DTypeLike | None = None,
        write_back: bool = True,
    ):
        super().__init__(name=name)  # pyright: ignore[reportCallIssue] (brainstate hides it from type checkers)
        self.num_embeddings = _check.size("embax.Embedding(num_embeddings=...)", num_embeddings)
        self.embedding_size = _sizes(embedding_size)
        self.out_size = self.embedding_size
        self.padding_idx = _padding_row(padding_idx, self.num_embeddings)
        self.max_norm = max_norm
        self.norm_type = norm_type
        self.scale_grad_by_freq = bool(scale_grad_by_freq)
        self.freeze = bool(freeze)
        self.out_of_range: OutOfRange = out_of_range
        self.dtype = None if dtype is None else jnp.dtype(dtype)
        self.write_back = bool(write_back)
        weight = initial_weight(embedding_init, (self.num_embeddings, *self.embedding_size))
        if self.padding_idx is not None:
            weight = zero_row(weight, self.padding_idx)
        self._table(*split_unit(weight))  # checks the rules
        self.weight = param_type(weight)

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "weight":  # also for copies and tied layers
            link(value, self)

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride] (brainstate's order)
        cls,
        embeddings: PyTree,
        padding_idx: int | None = None,
        max_norm: float | brainunit.Quantity | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        freeze: bool = True,
        name: str | None = None,
        param_type: Callable[[PyTree], brainstate.State] = brainstate.ParamState,
        **options: Any,
    ) -> Self:
        """Make a layer from existing vectors, frozen by default.

        Args:
          embeddings: The weight, `(rows, *dim)`: an array, NumPy array, nested list or Quantity. Its dtype and its
            padding row are kept.
          padding_idx: As in the constructor, except that the row keeps its values.
          max_norm: As in the constructor.
          norm_type: As in the constructor.
          scale_grad_by_freq: As in the constructor.
          freeze: As in the constructor.
          name: As in the constructor.
          param_type: As in the constructor.
          **options: `out_of_range`, `dtype` and `write_back`, and further arguments of a subclass's constructor.

        Returns:
          The layer.

        Raises:
          TypeError: As the constructor, and for an unknown option.
          ValueError: As the constructor, and for fewer than 2 axes.

        Example:
          >>> import embax, numpy as np
          >>> embedding = embax.Embedding.from_pretrained(np.eye(3), padding_idx=0, out_of_range="clip")
          >>> embedding([0, 7])
          Array([[1., 0., 0.],
                 [0., 0., 1.]], dtype=float32)
        """
        return cls._of_weight(
            embeddings,
            padding_idx=padding_idx,
            max_norm=max_norm,
            norm_type=norm_type,
            scale_grad_by_freq=scale_grad_by_freq,
            freeze=freeze,
            name=name,
            param_type=param_type,
            **options,
        )

    @classmethod
    def from_table(cls, table: Table, **options: Any) -> Self:
        return cls._of_weight(held(table), **{**rules_of(table), **options})

    @classmethod
    def _of_weight(cls, embeddings: PyTree, **options: Any) -> Self:
        mantissa, unit = split_unit(embeddings)
        weight = mantissa if isinstance(mantissa, StoredRows) else as_jax(mantissa)
        if weight.ndim < 2:
            raise ValueError(
                f"`embax.{cls.__name__}.from_pretrained(embeddings=...)` must have 2 axes or more, (rows, *dim), got "
                f"shape {weight.shape}. Reshape it."
            )
        weight = with_unit(weight, unit)
        layer = cls(num_embeddings=weight.shape[0], embedding_init=weight, **{cls._SIZE: weight.shape[1:]}, **options)
        if layer.padding_idx is not None:
            layer.weight.value = weight  # restores the padding row, which the constructor zeroed
        return layer

    @property
    def table(self) -> Table:
        """The weight and the rules by which it is read; a TypeError if it has a unit, which a Table cannot hold."""
        weight, unit = split_unit(self.weight.value)
        if unit is not None:
            raise TypeError(
                f"`embax.{type(self).__name__}.table` must be of a weight without a unit, got one in {unit}. "
                "Make a Table of weight.value.mantissa."
            )
        return self._table(weight, None)

    def attend(self, x: ArrayLike | brainunit.Quantity, *, mask_padding: bool = False) -> PyTree:
        weight, unit = split_unit(self.weight.value)
        vectors, unit_of_x = split_unit(x)
        logits = attend(self._table(weight, unit), vectors, mask_padding=mask_padding)
        for part in (unit, unit_of_x):
            logits = logits if part is None else logits * part
        return logits

    def update(self, indices: ArrayLike) -> Shaped[Array, "*batch_dim"] | brainunit.Quantity:
        """Read one row for each index; calling the layer does the same.

        Args:
          indices: Row numbers in `[-num_embeddings, num_embeddings)`: an array of any integer dtype and any shape, a
            nested list or a scalar.

        Returns:
          The rows, `(*indices.shape, *embedding_size)`, in the unit of the table.

        Raises:
          TypeError: If the indices are not of an integer dtype.
          IndexError: If a concrete index has no row and `out_of_range` is `"error"`.

        Example:
          >>> import embax
          >>> embax.Embedding(10, 3).update([[0, 1], [2, 3]]).shape
          (2, 2, 3)
        """
        weight, unit = split_unit(self.weight.value)
        table = self._table(weight, unit)
        ids = _ids.prepare("embax.Embedding.update(indices=...)", indices, table)
        rows = read(table, ids, self.dtype)
        if self.write_back and self._may_store(table, ids):
            self._store(table, ids, unit)
        return with_unit(rows, unit)

    def renormalize(self, indices: ArrayLike) -> None:
        """Store the rows of these indices clipped to `max_norm`, see `embax.renormalize`.

        For a layer with `write_back=False`. Does nothing without `max_norm`, or if the table is frozen.

        Args:
          indices: Row numbers, as in `update`.

        Raises:
          TypeError: If the indices are not of an integer dtype.
          IndexError: If a concrete index has no row and `out_of_range` is `"error"`.
          brainstate.TraceContextError: Inside a raw JAX transformation, which does not allow to write states.

        Example:
          >>> import embax, jax.numpy as jnp
          >>> embedding = embax.Embedding(
          ...     2, 2, embedding_init=jnp.array([[3.0, 4.0], [6.0, 8.0]]), max_norm=1.0, write_back=False
          ... )
          >>> rows = embedding([0, 1])
          >>> embedding.renormalize([0])
          >>> embedding.weight.value
          Array([[0.6, 0.8],
                 [6. , 8. ]], dtype=float32)
        """
        weight, unit = split_unit(self.weight.value)
        table = self._table(weight, unit)
        self._store(table, _ids.prepare("embax.Embedding.renormalize(indices=...)", indices, table), unit)

    def resize(self, rows: int, key: Key[Array, ""] | None = None, *, init: Initializer | None = None) -> None:
        """Change the number of rows, like `embax.resize`; rows keep their ids.

        For a vocabulary that grows in mid-training. Call it outside of transformations; the state object stays the
        same. Then convert the optimizer's state by `optimizer.carry_over(weights)`.

        Args:
          rows: The new number of rows, 0 or more.
          key: A JAX random key for the fresh rows. Default: a key of `brainstate.random`.
          init: The initialiser of fresh rows, as in `embax.Table.create`, in the unit of the weight.

        Raises:
          TypeError: As `embax.resize`.
          ValueError: As `embax.resize`.

        Example:
          >>> import embax
          >>> embedding = embax.Embedding(10, 3)
          >>> embedding.resize(12)
          >>> embedding(11).shape
          (3,)
        """
        weight, unit = split_unit(self.weight.value)
        key = brainstate.random.split_key() if key is None else key
        table = resize(self._table(weight, unit), rows, key, init=init)
        self.weight.value = with_unit(held(table), unit)
        self.num_embeddings = table.rows

    def _table(self, weight: PyTree, unit: brainunit.Unit | None) -> Table:
        return table_of(
            weight,
            padding_idx=self.padding_idx,
            max_norm=in_unit(self.max_norm, unit),
            norm_type=self.norm_type,
            scale_grad_by_freq=self.scale_grad_by_freq,
            freeze=self.freeze,
            out_of_range=self.out_of_range,
        )

    def _may_store(self, table: Table, ids: _ids.Ids) -> bool:
        if table.max_norm is None or table.freeze:
            return False
        # Under `jit`, constants are not tracers, but a new array such as `jnp.zeros(())` is.
        leaves = table.weight, ids, jnp.zeros(())
        tracers = [leaf for leaf in leaves if isinstance(leaf, Tracer)]
        if not tracers:
            return True
        if not isinstance(self.weight, brainstate.State):  # no transformation carries its value out
            return False
        try:
            self.weight.check_valid_trace(str)  # a state made in the current trace may be written
        except brainstate.TraceContextError:
            return inside_brainstate_transform(tracers[0])
        return True

    def _store(self, table: Table, ids: _ids.Ids, unit: brainunit.Unit | None) -> None:
        if table.max_norm is not None and not table.freeze:
            self.weight.value = with_unit(held(with_weight(table, clipped_table(table, ids))), unit)


def _sizes(embedding_size: int | Sequence[int]) -> tuple[int, ...]:
    sizes = np.ravel(np.asarray(embedding_size)).tolist()
    if not sizes:
        raise ValueError("`embax.Embedding(embedding_size=...)` must have an axis or more, got none. Pass an int.")
    return tuple(_check.size("embax.Embedding(embedding_size=...)", size) for size in sizes)


def _padding_row(padding_idx: object, rows: int) -> int | None:
    if padding_idx is None:
        return None
    padding_idx = _check.integer("embax.Embedding(padding_idx=...)", padding_idx)
    if not 0 <= padding_idx < rows:
        raise ValueError(
            f"`embax.Embedding(padding_idx=...)` must be in [0, {rows}), got {padding_idx}. Name a row from the start."
        )
    return padding_idx
