"""Annotations: tests execute them, and `Any` stands only where anything is meant.

`make test` runs these tests, and some others, with jaxtyping's import hook, which checks each call. Where they run
without it, a function is checked here as the hook does it.
"""

import inspect
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from annotations import checked
from jaxtyping import Int, TypeCheckError, jaxtyped

import embax
from embax._base import distinct
from embax._core import lookup

SOURCE = Path(embax.__file__).parent
IDS, VALUES = jnp.arange(4), np.zeros((4, 2), np.float32)


def executed(function):
    if os.environ.get("EMBAX_ANNOTATIONS"):
        return function
    return jaxtyped(typechecker=checked)(inspect.unwrap(function))  # the hook comes before `jax.jit`


combine = executed(distinct.combine)


def test_a_wrong_shape_or_dtype_in_a_call_inside_fails():
    values = jnp.asarray(VALUES)
    assert combine(None, IDS, values, 5)[1].values.shape == (4, 2)
    with pytest.raises(TypeCheckError, match="combine"):
        combine(None, IDS[:3], values, 5)
    with pytest.raises(TypeCheckError, match="combine"):
        combine(None, IDS.astype(jnp.float32), values, 5)


def test_a_wrong_shape_in_a_traced_call_fails():
    with pytest.raises(TypeCheckError, match="combine"):
        jax.eval_shape(lambda ids, values: combine(None, ids, values, 5), IDS[:3], VALUES)


def test_a_wrong_shape_in_a_signature_fails():
    def two_axes(ids: Int[jax.Array, " ids"]) -> Int[jax.Array, "ids dim"]:
        return ids

    with pytest.raises(TypeCheckError, match=r"return value of .*two_axes"):
        jaxtyped(typechecker=checked)(two_axes)(IDS)


def test_public_functions_check_their_arguments_themselves():
    with pytest.raises(TypeError, match=r"`embax.lookup\(ids=...\)` must be of an integer dtype"):
        executed(lookup.lookup)(embax.Table(VALUES), np.zeros(2, np.float32))


def test_any_is_rare():
    lines = [line for path in SOURCE.rglob("*.py") for line in path.read_text("utf-8").splitlines()]
    lines = [line for line in lines if not line.lstrip().startswith(("from ", "import "))]
    assert sum(len(re.findall(r"\bAny\b", line)) for line in lines) <= 15 * len(lines) / 1000
