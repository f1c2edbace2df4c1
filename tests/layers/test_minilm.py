"""The example that loads a transformer's tokens: the same rows in every framework, from the real file."""

import sys

import numpy as np
import safetensors.numpy
from real import MINILM

import embax
from examples import load_example


def test_every_framework_reads_the_rows_of_the_file():
    example = load_example("minilm")
    weight = safetensors.numpy.load_file(MINILM / "model" / "model.safetensors")[example.TENSOR]
    table = embax.Table(weight, padding_idx=0, freeze=True)
    layers = example.layers(table)
    assert set(layers) == {"brainstate", "Flax NNX", "Equinox"}
    for layer in layers.values():
        np.testing.assert_array_equal(layer([2332, 0, -1]), weight[[2332, 0, -1]])
        assert (layer.table.padding_idx, layer.table.freeze) == (0, True)


def test_example_prints_the_nearest_tokens(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["minilm.py"])
    load_example("minilm").main()
    printed = capsys.readouterr().out
    assert printed.count("True") == 4  # the table is frozen, and three layers read as the function does
    assert "king: kings, queen" in printed
