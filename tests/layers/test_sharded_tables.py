"""Sharded tables and what holds or exports a weight alone: rows in the order of their ids, or an error."""

import jax.numpy as jnp
import numpy as np
import pytest
from meshes import LAYOUTS, mesh_of

import embax
import embax.equinox
import embax.nnx
from embax import Table

WEIGHT = np.arange(80, dtype=np.float32).reshape(10, 8)
LAYERS = {
    f"{package}.{name}": getattr(module, name)
    for package, module in {"brainstate": embax, "nnx": embax.nnx, "equinox": embax.equinox}.items()
    for name in ("Embedding", "EmbeddingBag")
}


def sharded(layout, **rules):
    sizes, how = LAYOUTS[layout]
    return embax.shard(Table(WEIGHT, **rules), mesh_of(sizes), **how)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("layout", ["rows", "rows-cyclic", "columns", "replicated"])
def test_layers_refuse_a_sharded_table_and_take_it_off_the_mesh(layer, layout):
    table = sharded(layout)
    with pytest.raises(ValueError, match=r"from_table\(table=...\)` must not be given a sharded table.*embax\.unshard"):
        layer.from_table(table)
    assert layer.from_table(embax.unshard(table)).table.rows == 10


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_dicts_have_the_rows_in_their_order(layout):
    table = sharded(layout)
    state = embax.to_state_dict({"a": table, "b": Table(jnp.asarray(WEIGHT))}, prefix="model.")
    assert list(state) == ["model.a.weight", "model.b.weight"]
    for weight in state.values():
        assert isinstance(weight, np.ndarray)
        assert weight.flags.writeable
        np.testing.assert_array_equal(weight, WEIGHT)
    np.testing.assert_array_equal(embax.from_state_dict(embax.to_state_dict(table)).weight, WEIGHT)
