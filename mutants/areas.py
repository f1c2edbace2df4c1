"""The areas that mutants are drawn from: which sources belong to each, and which tests look after it."""

from pathlib import Path

PACKAGE = Path("src/embax")
# Patterns under the package.
SOURCES = {
    "core": (
        "_base/axes.py",
        "_base/check.py",
        "_base/dtypes.py",
        "_core/ids.py",
        "_core/lookup.py",
        "_core/dense.py",
        "_core/table.py",
        "_core/containers/write_back.py",
    ),
    "gradients": (
        "_base/distinct.py",
        "_core/containers/held_rows.py",
        "_core/read_rows.py",
        "_gradients/*.py",
        "_gradients/_analysis/*.py",
        "brainstate/_grad.py",
        "nnx/_grad.py",
    ),
    "bags": ("_bags/*.py", "_features/*.py", "_base/row_blocks.py"),
    "optimizers": ("optim/*.py", "brainstate/_optimizer.py", "nnx/_optimizer.py"),
    "heads": ("_heads/*.py",),
    "sharding": ("_mesh/*.py", "checkpoint/*.py", "sharding/*.py"),
    "files": ("_base/text/strings.py", "files/**/*.py", "vectors/_vectors.py", "vocabulary/*.py"),
}

# Folders and files under tests.
TESTS = {
    "core": ("base", "core", "layers/test_write_back.py"),
    "gradients": ("base", "gradients", "nnx/test_grad.py", "brainstate/test_grad.py"),
    "bags": ("bags", "features"),
    "optimizers": ("optim", "nnx/test_optimizer.py", "brainstate/test_optimizer.py"),
    "heads": ("heads",),
    "sharding": ("sharding", "mesh", "checkpoint"),
    "files": ("files", "vocabulary", "vectors/test_vectors.py", "layers/test_from_vectors.py"),
}


def sources(area):
    """The files of an area, in the order of their names."""
    return sorted({path for pattern in SOURCES[area] for path in PACKAGE.glob(pattern)})
