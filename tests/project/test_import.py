"""What `import embax` loads, and its lazy names."""

import subprocess
import sys

import pytest

import embax

FOREIGN = "optax brainstate brainunit flax equinox safetensors rich typer pyarrow matplotlib usearch gensim".split()


def modules_after(code):
    """The foreign libraries that a fresh interpreter has loaded after this code."""
    script = f"{code}\nimport sys\nprint(*(name for name in {['jax', *FOREIGN]} if name in sys.modules))"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()


def test_import_loads_neither_a_framework_nor_optax():
    code = "import embax, jax; embax.lookup(embax.Table(jax.numpy.ones((2, 2))), [0])"
    assert modules_after(code) == ["jax"]


def test_import_alone_loads_nothing():
    assert modules_after("import embax") == []


def test_every_lazy_name_is_there():
    for name in embax.__all__:
        assert getattr(embax, name) is not None


def test_lazy_names_load_their_library_and_no_other_framework():
    loaded = modules_after("import embax; embax.Embedding")
    assert "brainstate" in loaded
    assert {"flax", "equinox"}.isdisjoint(loaded)  # though the layer can be converted to theirs


def test_unknown_names_are_an_attribute_error():
    with pytest.raises(AttributeError, match="No embax attribute Embeding"):
        embax.Embeding  # noqa: B018


def test_dir_lists_the_public_names():
    assert {"Table", "lookup", "renormalize", "resize", "Embedding"} <= set(dir(embax))
    assert not [name for name in dir(embax) if name.startswith("_")]
