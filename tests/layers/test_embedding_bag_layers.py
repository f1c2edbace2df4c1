"""The layers of bags in every framework: what they have in common with embedding_bag."""

import inspect

import pytest
from bag_cases import UNEQUAL, UNEQUAL_MATCH
from cases import WEIGHT

import embax
import embax.equinox
import embax.nnx

LAYERS = {
    r"EmbeddingBag\.update\(input=": embax.EmbeddingBag,
    r"nnx\.EmbeddingBag\(input=": embax.nnx.EmbeddingBag,
    r"equinox\.EmbeddingBag\(input=": embax.equinox.EmbeddingBag,
}


def test_layers_average_bags_by_default():
    pools = [embax.embedding_bag, embax.EmbeddingBag.from_pretrained, *[layer.__init__ for layer in LAYERS.values()]]
    assert {inspect.signature(pool).parameters["mode"].default for pool in pools} == {"mean"}


@pytest.mark.parametrize("lists", UNEQUAL)
def test_error_for_lists_of_different_lengths_names_ragged(lists):
    for name, layer in LAYERS.items():
        with pytest.raises(ValueError, match=f"embax.{name}.*{UNEQUAL_MATCH}"):
            layer.from_pretrained(WEIGHT)(lists)
