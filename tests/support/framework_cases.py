"""The one table of cases that all frameworks run, and how their results are compared."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from cases import IDS, RULES, WEIGHT, cotangent
from frameworks import ALL

from embax import RowGrad

with_all = pytest.mark.parametrize("framework", ALL.values(), ids=ALL)

# Of the two kinds of gradient, a case has one, in turn; exhaustive runs have the other one, too.
KINDS = "gradient", "row_gradient"
with_turns = pytest.mark.parametrize("turn", [0, pytest.param(1, marks=pytest.mark.exhaustive)])


def kinds_in_turn(names, turn):
    """The kind of gradient of each case."""
    return {name: KINDS[(n + turn) % 2] for n, name in enumerate(names)}


def share(framework, names, turn):
    """Every second case, with its kind of gradient: of the four frameworks, two have a case, each by another kind."""
    number = list(ALL.values()).index(framework) + turn
    return {name: KINDS[(n // 2 + number // 2) % 2] for n, name in enumerate(names) if (n + number) % 2 == 0}


def with_shares(names):
    """Each framework with its share of the cases; exhaustive runs give it that of every other framework."""
    return pytest.mark.parametrize(
        ("framework", "name", "turn"),
        [
            pytest.param(
                framework, name, turn, marks=[pytest.mark.exhaustive] if turn else [], id=f"{label}-{name}-{kind}"
            )
            for label, framework in ALL.items()
            for turn in range(len(ALL))
            for name, kind in share(framework, names, turn).items()
        ],
    )


class Case(NamedTuple):
    """Ids to be read from a weight by rules."""

    ids: Any = IDS["matrix"]
    rules: dict[str, Any] = {}  # noqa: RUF012 (nobody writes to it)
    weight: Any = WEIGHT
    cotangent: Any = None  # of the rows that are read; drawn where there is none
    traced: bool = False  # whether the ids are unknown when the layer is called

    @property
    def cotangents(self):
        """The cotangent in the dtype of the weight."""
        values = cotangent(self.ids, self.weight) if self.cotangent is None else self.cotangent
        return values.astype(self.weight.dtype)


POLICIES = "error", "clip", "nan", "zero"
# Few shapes, so that one compiled program serves many cases.
TALL = np.random.default_rng(3).normal(size=(200, 3)).astype(np.float32)
SIGNED, UNSIGNED = np.array([127, -1, -128]), np.array([199, 0, 128])
BAD_IDS = np.array([[0, 7, -8, 6], [7, 2**31 - 1, -(2**31), -7]])
FEW_BAD_IDS = np.array([0, -1, 1, -2])


def _not_finite(bad):
    """A cotangent that is bad where IDS["negative"] names the last row."""
    is_last = np.isin(IDS["negative"], [-1, 6])[:, None]
    return np.where(is_last, bad, np.ones((6, 3))).astype(np.float32)


CASES = {
    **{f"rules_{name}": Case(rules=rules) for name, rules in RULES.items()},
    **{f"ids_{name}": Case(IDS[name], RULES["all"]) for name in ("scalar", "negative", "empty", "empty_matrix")},
    "int": Case(-2, RULES["all"]),
    "numpy_scalar": Case(np.int16(-2), RULES["all"]),
    "list": Case(IDS["matrix"].tolist(), RULES["all"]),
    "list_of_nothing": Case([], RULES["all"]),
    "list_of_lists_of_nothing": Case([[], []], RULES["all"]),
    "jax": Case(jnp.asarray(IDS["matrix"]), RULES["all"]),
    "jax_scalar": Case(jnp.asarray(2), RULES["all"]),
    "jax_empty": Case(jnp.zeros((2, 0), jnp.int32), RULES["all"]),
    **{dtype: Case(SIGNED.astype(dtype), weight=TALL) for dtype in ("int8", "int16", "int64")},
    **{dtype: Case(UNSIGNED.astype(dtype), weight=TALL) for dtype in ("uint8", "uint16", "uint32", "uint64")},
    "int8_jax": Case(jnp.asarray(SIGNED, jnp.int8), weight=TALL),
    "uint8_jax": Case(jnp.asarray(UNSIGNED, jnp.uint8), weight=TALL),
    "int8_traced": Case(SIGNED.astype("int8"), weight=TALL, traced=True),
    "uint8_traced": Case(UNSIGNED.astype("uint8"), weight=TALL, traced=True),
    **{f"bad_{policy}": Case(BAD_IDS, {"out_of_range": policy}) for policy in POLICIES[1:]},
    **{f"bad_{policy}_all": Case(BAD_IDS, {**RULES["all"], "out_of_range": policy}) for policy in POLICIES[1:]},
    **{f"bad_{policy}_traced": Case(BAD_IDS, {"out_of_range": policy}, traced=True) for policy in POLICIES},
    "bad_all_traced": Case(BAD_IDS, RULES["all"], traced=True),
    "bad_nan_cotangent": Case(BAD_IDS[0, 1], {"out_of_range": "nan"}, cotangent=np.full(3, np.nan, np.float32)),
    **{f"one_row_{policy}": Case(FEW_BAD_IDS, {"out_of_range": policy}, WEIGHT[:1]) for policy in POLICIES[1:]},
    "one_row_traced": Case(FEW_BAD_IDS, {}, WEIGHT[:1], traced=True),
    **{f"no_rows_{policy}": Case(FEW_BAD_IDS, {"out_of_range": policy}, WEIGHT[:0]) for policy in ("nan", "zero")},
    "no_rows_traced": Case(FEW_BAD_IDS, {}, WEIGHT[:0], traced=True),
    "no_rows_no_ids": Case([], {"max_norm": 1.0, "scale_grad_by_freq": True, "out_of_range": "clip"}, WEIGHT[:0]),
    "no_width": Case(rules=RULES["all"], weight=WEIGHT[:, :0]),
    "more_axes": Case(rules=RULES["all"], weight=WEIGHT.reshape(7, 3, 1)),
    "padding_nan": Case(IDS["negative"], {"padding_idx": -1}, cotangent=_not_finite(np.nan)),
    "padding_inf": Case(IDS["negative"], {"padding_idx": -1}, cotangent=_not_finite(np.inf)),
    "padding_nan_all": Case(IDS["negative"], {**RULES["all"], "padding_idx": 6}, cotangent=_not_finite(np.nan)),
    "freeze_nan": Case(rules=RULES["freeze"], cotangent=np.full((2, 4, 3), np.nan, np.float32)),
    "bfloat16": Case(rules=RULES["all"], weight=jnp.asarray(WEIGHT, jnp.bfloat16)),
    "float16": Case(rules=RULES["all"], weight=jnp.asarray(WEIGHT, jnp.float16)),
}
INTEGERS = np.arange(21).reshape(7, 3)
INTEGER_CASES = {
    "integers": Case(rules={"padding_idx": 2}, weight=INTEGERS),
    **{f"integers_{policy}": Case(BAD_IDS, {"out_of_range": policy}, INTEGERS, traced=True) for policy in POLICIES},
}

# Of gradients, by dtype: a few roundings of sums of a few numbers, in float32 before they are stored.
TOLERANCE = {
    "float32": {"rtol": 2e-6, "atol": 1e-6},
    "bfloat16": {"rtol": 2**-8, "atol": 2**-8},
    "float16": {"rtol": 2**-11, "atol": 2**-11},
    "int32": {"rtol": 0},
}


def dense(gradient):
    """A gradient as an array, whichever way it is given; rows are added up by NumPy, which compiles nothing."""
    if not isinstance(gradient, RowGrad):
        return getattr(gradient, "weight", gradient)
    out = np.zeros((gradient.rows + 1, *gradient.dim))
    np.add.at(out, np.asarray(gradient.ids), np.asarray(gradient.values, float))
    return out[:-1].astype(gradient.dtype)


def assert_same(actual, expected):
    """Bit for bit, signs of zeros included; one NaN is as good as another."""
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected, strict=True)
    np.testing.assert_array_equal(np.copysign(1, actual), np.copysign(1, expected))


def assert_close(actual, expected, scale=1.0, dtype="float32"):
    assert actual.dtype == dtype
    tolerance = {name: scale * value for name, value in TOLERANCE[dtype].items()}
    np.testing.assert_allclose(np.asarray(actual, float), np.asarray(expected, float), **tolerance)
