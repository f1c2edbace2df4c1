"""The areas that mutants are drawn from: which sources belong to each, and which folder of tests looks after it."""

from pathlib import Path

PACKAGE = Path("src/embax")
# Patterns under the package. The tests of an area are in the folder of tests of its name.
SOURCES = {
    "core": ("_check.py", "_ids.py", "_index.py", "_lookup.py", "_table.py", "_write_back.py", "_mesh.py"),
    "gradients": (
        "_apply.py",
        "_calls.py",
        "_dedupe.py",
        "_differentiate.py",
        "_equations.py",
        "_forms.py",
        "_grad.py",
        "_held.py",
        "_linear.py",
        "_program.py",
        "_read_rows.py",
        "_report_dense.py",
        "_rows.py",
        "_terms.py",
        "brainstate/_grad.py",
        "nnx/_grad.py",
    ),
    "bags": (
        "_bag.py",
        "_collection.py",
        "_compositional.py",
        "_hash.py",
        "_pool.py",
        "_ragged.py",
        "_row_blocks.py",
        "_stacks.py",
    ),
    "optimizers": ("optim/*.py", "brainstate/_optimizer.py", "nnx/_optimizer.py"),
    "heads": ("_attend.py", "_candidates.py", "_cross_entropy.py", "_labels.py", "_sampled_softmax.py"),
    "sharding": (
        "_exchange.py",
        "_layouts.py",
        "_moves.py",
        "_placed*.py",
        "_placement.py",
        "checkpoint/*.py",
        "sharding/*.py",
    ),
    "files": ("_ngrams.py", "_strings.py", "_subwords.py", "files/*.py", "vectors.py", "vocabulary.py"),
}


def sources(area):
    """The files of an area, in the order of their names."""
    return sorted({path for pattern in SOURCES[area] for path in PACKAGE.glob(pattern)})
