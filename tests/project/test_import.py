"""What `import embax` loads, and its lazy names."""

import subprocess
import sys

import pytest

import embax

FOREIGN = "optax brainstate brainunit flax equinox safetensors rich typer pyarrow matplotlib usearch gensim".split()


STEPS = {
    "import": "import embax",
    "lookup": "import jax; embax.lookup(embax.Table(jax.numpy.ones((2, 2))), [0])",
    "layer": "embax.Embedding",
}


@pytest.fixture(scope="module")
def loaded():
    """The foreign libraries that a fresh interpreter has loaded after each step, taken one after the other."""
    seen = f"print(*(name for name in {['jax', *FOREIGN]} if name in sys.modules))"
    script = "import sys\n" + "\n".join(f"{step}\n{seen}" for step in STEPS.values())
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    return dict(zip(STEPS, map(str.split, out.splitlines()), strict=True))


def test_import_alone_loads_nothing(loaded):
    assert loaded["import"] == []


def test_a_lookup_loads_neither_a_framework_nor_optax(loaded):
    assert loaded["lookup"] == ["jax"]


def test_every_lazy_name_is_importable():
    for name in embax.__all__:
        assert getattr(embax, name) is not None


def test_lazy_names_load_their_library_and_no_other_framework(loaded):
    assert "brainstate" in loaded["layer"]
    assert {"flax", "equinox"}.isdisjoint(loaded["layer"])  # though the layer can be converted to theirs


def test_commands_about_files_load_no_jax(tmp_path):
    (tmp_path / "v.txt").write_text("the 1 2\nking 3 4\n")
    script = (
        "import sys; from embax import cli\n"
        "for arguments in (['convert', 'v.txt', 'v.safetensors'], ['info', 'v.safetensors']):\n"
        "    try: cli.main(arguments)\n"
        "    except SystemExit as done: assert not done.code\n"
        "print(sorted({'jax', 'ml_dtypes', 'scipy'} & set(sys.modules)))"
    )
    run = [sys.executable, "-c", script]
    out = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


def test_unknown_names_are_an_attribute_error():
    with pytest.raises(AttributeError, match="No embax attribute Embeding"):
        embax.Embeding  # noqa: B018


def test_dir_lists_the_public_names():
    assert {"Table", "lookup", "renormalize", "resize", "Embedding"} <= set(dir(embax))
    assert not [name for name in dir(embax) if name.startswith("_")]
