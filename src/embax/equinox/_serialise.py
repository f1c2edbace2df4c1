"""Equinox's files of leaves, with the rows of tables in row order."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from .._core.table import Table, has_weight, with_weight

File: TypeAlias = str | Path | BinaryIO
IsLeaf: TypeAlias = Callable[[PyTree], bool] | None


def tree_serialise_leaves(path_or_file: File, pytree: PyTree, is_leaf: IsLeaf = None) -> None:
    """Write the leaves of a tree to a file, like `equinox.tree_serialise_leaves`, with tables in row order.

    So the file of a sharded model equals the file of the dense model, byte for byte, and each loads into the other.
    `equinox.tree_serialise_leaves` writes stored rows, which only a model of the same layout can read. Each table
    passes through one device; for larger tables, use `embax.checkpoint`.

    Args:
      path_or_file: As in `equinox.tree_serialise_leaves`.
      pytree: As in `equinox.tree_serialise_leaves`.
      is_leaf: As in `equinox.tree_serialise_leaves`; a Table is always a leaf.

    Example:
      >>> import embax.equinox, io, jax
      >>> mesh = jax.make_mesh((jax.device_count(),), ("x",))
      >>> model = embax.equinox.Embedding(10, 3, key=jax.random.key(0))
      >>> sharded = embax.shard(model, mesh, "x", "rows-cyclic")
      >>> file = io.BytesIO()
      >>> embax.equinox.tree_serialise_leaves(file, sharded)
      >>> _ = file.seek(0)
      >>> embax.equinox.tree_deserialise_leaves(file, model).table
      Table(float32[10,3])
    """

    def write(file: BinaryIO, node: object) -> None:
        if not isinstance(node, Table):
            eqx.default_serialise_filter_spec(file, node)
        elif has_weight(node):
            eqx.default_serialise_filter_spec(file, node.storage.to_rows(node.weight))

    eqx.tree_serialise_leaves(path_or_file, pytree, write, _tables_or(is_leaf))


def tree_deserialise_leaves(path_or_file: File, like: PyTree, is_leaf: IsLeaf = None) -> PyTree:
    """Read a file of `tree_serialise_leaves`, or Equinox's file of a dense model, into the layout of another tree.

    Args:
      path_or_file: As in `equinox.tree_deserialise_leaves`.
      like: As in `equinox.tree_deserialise_leaves`; its tables determine the shapes and layouts.
      is_leaf: As in `equinox.tree_deserialise_leaves`; a Table is always a leaf.

    Returns:
      A tree like `like`, with the values of the file.

    Raises:
      RuntimeError: As `equinox.tree_deserialise_leaves`, and if a table in the file has another shape or dtype.

    Example:
      >>> import embax.equinox, equinox as eqx, io, jax
      >>> file = io.BytesIO()
      >>> eqx.tree_serialise_leaves(file, embax.equinox.Embedding(10, 3, key=jax.random.key(0)))
      >>> _ = file.seek(0)
      >>> mesh = jax.make_mesh((jax.device_count(),), ("x",))
      >>> like = embax.shard(embax.equinox.Embedding(10, 3, key=jax.random.key(1)), mesh, "x")
      >>> embax.equinox.tree_deserialise_leaves(file, like).table.placement.layout
      'rows'
    """

    def read(file: BinaryIO, node: object) -> PyTree:
        if not isinstance(node, Table):
            return eqx.default_deserialise_filter_spec(file, node)
        if not has_weight(node):
            return node
        rows = eqx.default_deserialise_filter_spec(file, jax.ShapeDtypeStruct((node.rows, *node.dim), node.dtype))
        if rows.shape != (node.rows, *node.dim) or rows.dtype != node.dtype:
            raise RuntimeError(
                f"`embax.equinox.tree_deserialise_leaves(like=...)` must have the tables of the file, got {node!r} for "
                f"one of {rows.dtype}{list(rows.shape)}. Read it in this shape; embax.resize changes its rows."
            )
        in_order: Any = np.asarray(rows)
        return with_weight(node, node.storage.from_rows(in_order))

    return eqx.tree_deserialise_leaves(path_or_file, like, read, _tables_or(is_leaf))


def _tables_or(is_leaf: IsLeaf) -> Callable[[PyTree], bool]:
    return lambda node: isinstance(node, Table) or (is_leaf is not None and is_leaf(node))
