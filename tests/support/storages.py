"""The storages that the suite of the contract runs: a table of rows in order, stored in each way.

A new storage is a file and a line in STORAGES.
"""

import dataclasses

import jax
from meshes import mesh_of
from reversed_rows import Reversed

import embax

STORAGES = {
    "dense": lambda table: table,
    "rows": lambda table: embax.shard(table, mesh_of({"x": 2}), "x", "rows-cyclic"),
    "columns": lambda table: embax.shard(table, mesh_of({"x": 2}), "x", "columns"),
    "reversed": lambda table: stored(table, Reversed()),
}
OTHERS = [name for name in STORAGES if name != "dense"]
# Other layouts, for exhaustive runs.
MORE = {
    "blocks of rows": lambda table: embax.shard(table, mesh_of({"x": 2}), "x"),
    "replicated": lambda table: embax.shard(table, mesh_of({"x": 2}), "x", "replicated"),
    "rows and columns": lambda table: embax.shard(table, mesh_of({"x": 2, "y": 2}), "x", "rows-cyclic", columns="y"),
}


def stored(table, storage):
    """A table whose rows are in order, in another storage of one device."""
    return dataclasses.replace(table, weight=storage.from_rows(table.weight), storage=storage)


def by_rows(tree):
    """Every table of a tree by its rows, in their order."""

    def is_table(node):
        return isinstance(node, embax.Table)

    def rows(node):
        return node.storage.to_rows(node.weight) if is_table(node) else node

    return jax.tree.map(rows, tree, is_leaf=is_table)
