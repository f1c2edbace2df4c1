"""Annotations: the tests execute them, and `Any` stands only where anything is meant."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from embax._base.distinct import combine
from embax._core.lookup import lookup
from embax._core.table import Table

SOURCE = Path(__file__).parents[2] / "src" / "embax"


def test_a_wrong_shape_or_dtype_in_a_call_of_an_internal_function_fails():
    rows, values = jnp.arange(4), jnp.zeros((4, 2))
    assert combine(None, rows, values, 5)[1].values.shape == (4, 2)
    with pytest.raises(TypeCheckError, match="combine"):
        combine(None, rows[:3], values, 5)
    with pytest.raises(TypeCheckError, match="combine"):
        combine(None, rows.astype(jnp.float32), values, 5)


def test_a_wrong_shape_in_a_traced_call_fails():
    with pytest.raises(TypeCheckError, match="combine"):
        jax.eval_shape(lambda ids, values: combine(None, ids, values, 5), jnp.arange(3), jnp.zeros((4, 2)))


def test_public_functions_check_their_arguments_themselves():
    with pytest.raises(TypeError, match=r"`embax.lookup\(ids=...\)` must be of an integer dtype"):
        lookup(Table(np.zeros((3, 2), np.float32)), np.zeros(2, np.float32))


def test_any_is_rare():
    lines = [line for path in SOURCE.rglob("*.py") for line in path.read_text().splitlines()]
    found = sum(len(re.findall(r"\bAny\b", line)) for line in lines if not line.startswith(("from ", "import ")))
    assert found <= 15 * len(lines) / 1000
