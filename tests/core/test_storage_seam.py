"""No code but that of the storages asks which storage a table has: it calls what all of them do."""

import ast
from pathlib import Path

import pytest

import embax

ROOT = Path(embax.__file__).parent
# The storages themselves; and moves between layouts, which have to know both.
STORAGES = (
    "_core/dense.py",
    "_core/one_array.py",
    "_core/own_rows.py",
    "_core/storage.py",
    "_mesh/",
    "sharding/",
    "checkpoint/",
)

# Attributes that tell storages apart: of a Table, of the contract, and of a Placement.
TELLING = {
    *("placement", "is_local", "mesh"),
    *("cyclic", "shards", "column_shards", "copies", "owner_axes", "copy_axes", "batch_spec", "owner_spec"),
}
CLASSES = {"Dense", "DENSE", "OneArray", "Sharded", "Placement"}

# What reads one all the same, by the expression, and why.
KNOWN = {
    "_core/table.py": {"self.storage.placement": "a public property for users, which embax.sharding shows"},
    "_core/lookup.py": {"table.storage.is_local": "what a second read of a row costs"},
    "_bags/pool.py": {"table.storage.is_local": "whether to read rows one by one, or all of a bag at once"},
    "_core/read_rows.py": {
        "spec.storage.is_local": "whether lanes of vmap are read lane by lane",
        "weight.sharding.mesh": "of an array of JAX",
        "aval.sharding.mesh": "of an array of JAX",
        "ids.sharding.mesh": "of an array of JAX",
        "spec.weight.sharding.mesh": "of an array of JAX",
    },
    "_base/axes.py": {"sharding.mesh": "of an array of JAX"},
    "_base/loops.py": {"sharding.mesh": "of an array of JAX"},
    "_kernels/primitive.py": {
        "jax.typeof(array).sharding.mesh": "of an array of JAX",
        "axes.mesh": "of a program that is lowered",
    },
    "_gradients/_analysis/forms.py": {"kind.storage != DENSE": "whether rows are those of an array, by their places"},
    "_gradients/_analysis/terms.py": {
        "jax.typeof(x).sharding.mesh": "of an array of JAX",
        "whole.mesh": "of the sharding of an array of JAX",
    },
    "optim/_carry_over.py": {"getattr(x.sharding, 'mesh', None)": "of an array of JAX"},
    "_heads/sampled_softmax.py": {"sharding.mesh": "of an array of JAX"},
    "train/_parts.py": {"self.mesh": "that over which `embax train` makes its tables"},
    "train/_arguments.py": {"given.mesh": "that over which `embax train` makes its tables"},
    "train/_word2vec.py": {"given.mesh": "that over which `embax train` makes its tables"},
    "train/_engines/xla.py": {"self._parts.mesh": "that over which `embax train` makes its tables"},
}


def questions(tree):
    """List the expressions of a module that ask which storage there is."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in TELLING and isinstance(node.ctx, ast.Load):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass", "type", "getattr"):
            names = {x.id for x in ast.walk(node) if isinstance(x, ast.Name)}
            texts = {x.value for x in ast.walk(node) if isinstance(x, ast.Constant)}
            of_type = ast.unparse(node.func) == "type" and "storage" in ast.unparse(node)
            if names & CLASSES or texts & TELLING or of_type:
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Compare):
            names = {x.id for part in (node.left, *node.comparators) for x in ast.walk(part) if isinstance(x, ast.Name)}
            if names & CLASSES:
                found.append(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("_mesh"):
            found.append(ast.unparse(node))
    return found


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(STORAGES):
            yield name, ast.parse(path.read_text())


def test_only_listed_code_asks_which_storage_a_table_has():
    found = {name: set(questions(tree)) for name, tree in modules()}
    assert len(found) > 100
    assert {name: asked for name, asked in found.items() if asked} == {name: set(KNOWN[name]) for name in KNOWN}


@pytest.mark.parametrize(
    "code",
    [
        "if table.placement is None: pass",
        "rows = leaf if storage.is_local else other(leaf)",
        "n = table.storage.placement.shards",
        "if isinstance(table.storage, Sharded): pass",
        "if table.storage == DENSE: pass",
        "if table.storage is not DENSE: pass",
        "if type(table.storage) is kind: pass",
        'if getattr(table, "placement", None): pass',
        "from .._mesh.placement import Placement",
    ],
)
def test_a_question_is_found(code):
    assert questions(ast.parse(code))


@pytest.mark.parametrize(
    "code",
    [
        "rows = table.storage.take(table.weight, ids, 0)",
        "same = one.storage == other.storage",
        "table = Table(weight, storage=DENSE)",
        "from .._core.storage import Storage",
    ],
)
def test_methods_of_all_storages_are_allowed(code):
    assert not questions(ast.parse(code))
