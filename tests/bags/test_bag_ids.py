"""embedding_bag of ids without a row: what a policy reads, errors of concrete ids, checkify's of traced ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from bag_cases import MODES, UNEQUAL, UNEQUAL_MATCH
from cases import WEIGHT
from jax.experimental import checkify

import embax
from embax import Ragged, Table, embedding_bag

TOLERANCE = {"rtol": 5e-6, "atol": 5e-6}  # float32
exhaustive = pytest.mark.exhaustive


# Policies, and the modes under them.
POLICIES = [("error", ["sum"]), ("nan", ["max"]), ("zero", ["sqrtn"]), ("clip", ["mean", "max"])]
POLICIES_TOO = [(policy, [mode for mode in MODES if mode not in modes]) for policy, modes in POLICIES]


@pytest.mark.parametrize(
    ("out_of_range", "modes"), [*POLICIES, *(pytest.param(*too, marks=exhaustive) for too in POLICIES_TOO)]
)
def test_traced_ids_without_a_row(out_of_range, modes):
    lists = [[1, 7], [2, 3], [-8, -8, 2], [99]]
    rules = {"out_of_range": out_of_range, "padding_idx": 1}

    def pool(table, bags, mode):
        out = embedding_bag(table, bags, mode=mode)
        return jnp.nansum(out), out

    @jax.jit
    def run(table, bags):
        return {mode: jax.value_and_grad(pool, has_aux=True)(table, bags, mode) for mode in modes}

    reads_nan = out_of_range in ("error", "nan")
    for mode, ((_, out), gradient) in run(Table(WEIGHT, **rules), Ragged.from_lists(lists).pad_to(20)).items():
        expected = reference.embedding_bag(WEIGHT, lists, None, mode, **rules)
        np.testing.assert_allclose(out, expected, **TOLERANCE, err_msg=mode)
        assert np.isnan(out).all(axis=1).tolist() == [reads_nan, False, reads_nan, reads_nan], mode
        cotangent = np.where(np.isnan(expected), 0, 1)
        expected, _ = reference.embedding_bag_gradient(WEIGHT, lists, cotangent, None, mode, **rules)
        np.testing.assert_allclose(gradient.weight, expected, **TOLERANCE, err_msg=mode)


@pytest.mark.parametrize("mode", ["sum", "max"])
def test_concrete_ids_without_a_row_are_an_error(mode):
    with pytest.raises(IndexError, match=r"embedding_bag\(bags=...\)` must be in .* got 7 at position \(2,\)"):
        embedding_bag(Table(WEIGHT), Ragged.from_lists([[1, 2], [7]]), mode=mode)
    with pytest.raises(IndexError, match=r"got -8 at position \(0, 1\)"):
        embedding_bag(Table(WEIGHT), [[1, -8]], mode=mode)


def test_concrete_ids_without_a_row_may_stand_behind_the_last_bag():
    values, offsets = np.array([1, 2, 7, -8]), np.array([0, 2])

    def pool(ids, offsets, mode="max"):
        return embedding_bag(Table(WEIGHT), Ragged(ids, offsets), mode=mode)

    @jax.jit
    def inside(traced_ids, traced_offsets):
        # Inside of jit, ids or offsets or both may be concrete.
        return {
            "both": pool(values, offsets),
            "both, sum": pool(values, offsets, "sum"),
            "ids": pool(values, traced_offsets),
            "ids, sum": pool(values, traced_offsets, "sum"),
            "offsets": pool(traced_ids, offsets),
        }

    # Made outside, it is concrete inside, too.
    of_jax = jnp.array(values)
    of_closure = jax.jit(lambda offsets_: [pool(of_jax, offsets), pool(of_jax, offsets_)])
    out = inside(values, offsets) | dict(zip(["JAX, both", "JAX, ids"], of_closure(offsets), strict=True))
    out |= {"eager": pool(values, offsets), "eager, of JAX": pool(of_jax, offsets)}
    for case, pooled in out.items():
        expected = reference.embedding_bag(WEIGHT, [[1, 2]], None, "sum" if case.endswith("sum") else "max")
        np.testing.assert_allclose(pooled, expected, **TOLERANCE, err_msg=case)


def test_clip_in_a_table_without_rows():
    table, modes = Table(jnp.zeros((0, 3)), out_of_range="clip"), ["mean", "max"]
    empty = Ragged([9, 9], [0, 0, 0]), Ragged([], [0, 0, 0]), np.zeros((2, 0), int)
    one = Ragged([9, 9], [0, 1, 1])

    @jax.jit
    def inside(traced, traced_one):
        of_nothing = [embedding_bag(table, bags, mode="mean") for bags in traced]
        of_nothing += [embedding_bag(table, bags, mode="max") for bags in empty]
        of_one = {mode: embedding_bag(table, traced_one, mode=mode) for mode in modes}
        # How many ids there are is unknown while the offsets are traced, so that they read no row, as under "error".
        rows = [
            embax.grad(lambda table, mode=mode: embedding_bag(table, traced_one, mode=mode).sum())(table).ids
            for mode in modes
        ]
        return of_nothing, of_one, rows

    of_nothing, of_one, rows = inside(empty, one)
    for out in [*of_nothing, embedding_bag(table, empty[0], mode="max")]:
        np.testing.assert_array_equal(out, np.zeros((2, 3)))
    for mode, ids in zip(modes, rows, strict=True):
        np.testing.assert_array_equal(of_one[mode], [[np.nan] * 3, [0] * 3], err_msg=mode)
        assert ids.tolist() == [0, 0], mode
    for mode in MODES:
        pool = functools.partial(embedding_bag, table, mode=mode)
        for call in lambda: pool(one), jax.jit(lambda: pool(one)), lambda: pool([[9]]), lambda: jax.jit(pool)([[9]]):  # noqa: B023
            with pytest.raises(ValueError, match=r"must be empty for a table without rows, got 1 ids and out_of_ran"):
                call()


# ---- checkify: programs of several calls, each with bags of an id of its own.


def checked(calls, errors):
    """A function of a table and an id for each call, that gives the message of the error that checkify finds."""

    def run(table, ids):
        return [call(table, id_) for call, id_ in zip(calls, ids, strict=True)]

    program = jax.jit(checkify.checkify(run, errors=errors))
    return lambda table, ids: program(table, [np.int32(id_) for id_ in ids])[0].get()


def assert_names_bad_ids(calls, table, good, errors):
    """Each of the calls by itself is found to have an id without a row, and none is where there is no such id."""
    find = checked(list(calls.values()), errors)
    assert find(table, [good] * len(calls)) is None
    for i, name in enumerate(calls):
        for bad in 7, -8:
            ids = [good] * len(calls)
            ids[i] = bad
            assert f"index {bad} is out of bounds" in find(table, ids), name


# Bags of some ids, of which the argument is one: padding first and last; room behind the last bag, where anything may
# stand; longer than the pieces that they are cut into.
HERE = 1000  # stands for the argument
CHECKED = {
    "matrix": lambda id_: put_in([[2, 1, 0], [2, 2, -1], [HERE, 4, 2]], id_),
    "room": lambda id_: Ragged(put_in([1, 2, 2, HERE, 3, 99, -99, 2], id_), jnp.array([0, 2, 2, 5])),
    "long": lambda id_: Ragged(put_in([4] * 20 + [HERE] + [2] * 20 + [7] * 90, id_), jnp.array([0, 0, 41])),
}
CHECKED_RULES = {"none": {}, "clipped": {"padding_idx": 2, "max_norm": 1.5}}
CHECKED_RULES["all"] = {**CHECKED_RULES["clipped"], "scale_grad_by_freq": True}


def put_in(ids, id_):
    ids = np.array(ids, np.int32)
    return jnp.where(ids == HERE, id_, ids)


def test_checkify_names_an_id_without_a_row():
    calls = {
        (mode, layout): lambda table, id_, mode=mode, layout=layout: jax.jit(
            lambda bags: embedding_bag(table, bags, mode=mode)
        )(CHECKED[layout](id_))
        for mode, layout in [("sum", "matrix"), ("max", "room")]
    }
    assert_names_bad_ids(calls, Table(WEIGHT), 5, checkify.index_checks)


def derivatives(mode, bags_of):
    """What is differentiated in each way, of a table and what bags are made of."""

    def weights_of(bags):
        ids = bags.values if isinstance(bags, Ragged) else bags
        return jnp.ones(ids.shape) if mode == "sqrtn" else None

    def loss(table, bags, weights):
        return jnp.sin(embedding_bag(table, bags, weights, mode)).sum()

    def dense(table, given):
        bags = bags_of(given)
        return jax.grad(loss, (0, 2) if mode == "sqrtn" else 0)(table, bags, weights_of(bags))

    def by_rows(table, given):
        bags = bags_of(given)
        return embax.grad(loss)(table, bags, weights_of(bags)).values

    def forward(table, given):
        bags = bags_of(given)
        return jax.jvp(lambda table: loss(table, bags, weights_of(bags)), (table,), (table,))

    return {"dense": dense, "by rows": by_rows, "forward": forward}


# The ways through the code: sums by places, in a loop (of clipped rows) or not, and of pieces;
# the largest.
MAIN_WAYS = {
    ("sum", "matrix", "none"): ["dense"],
    ("max", "matrix", "clipped"): ["dense"],
    ("mean", "room", "all"): ["by rows"],
    ("sqrtn", "long", "clipped"): ["dense"],
}
ALL_WAYS = [(mode, layout, rules) for mode in MODES for layout in CHECKED for rules in ("none", "all")]


@pytest.mark.parametrize(
    ("mode", "layout", "rules", "kinds"),
    [
        *(pytest.param(*way, kinds, id="-".join(way)) for way, kinds in MAIN_WAYS.items()),
        *(
            pytest.param(*way, ["dense", "by rows", "forward"], id="-".join([*way, "all kinds"]), marks=exhaustive)
            for way in ALL_WAYS
        ),
    ],
)
def test_checkify_finds_bad_ids_and_nothing_else(mode, layout, rules, kinds):
    table, calls = Table(np.abs(WEIGHT) + 0.1, **CHECKED_RULES[rules]), derivatives(mode, CHECKED[layout])
    assert_names_bad_ids({kind: calls[kind] for kind in kinds}, table, 5, checkify.all_checks)


@pytest.mark.parametrize("offsets", [[0], [0, 0, 0]], ids=["no_bags", "no_ids"])
def test_checkify_reports_no_error_for_empty_bags(offsets):
    def bags_of(_):
        return Ragged(jnp.array([9, 2]), jnp.array(offsets))

    kinds = [("mean", "by rows"), ("max", "dense")]
    calls = [derivatives(mode, bags_of)[kind] for mode, kind in kinds]
    assert checked(calls, checkify.index_checks)(Table(WEIGHT, **CHECKED_RULES["clipped"]), [0] * len(calls)) is None


@pytest.mark.parametrize("lists", UNEQUAL)
def test_error_for_lists_of_different_lengths_names_ragged(lists):
    table = Table(WEIGHT)
    features = [embax.Feature("bags", "t", "sum"), embax.Feature("rows", "t")]
    collection = jax.eval_shape(lambda table: embax.Collection({"t": table}, features), table)
    calls = {
        r"embedding_bag\(bags=": lambda: embedding_bag(table, lists),
        r"Collection\(batch\['bags'\]": lambda: collection({"bags": lists, "rows": [1]}),
        r"Collection\(batch\['rows'\]": lambda: collection({"bags": [[1]], "rows": lists}),
        r"lookup\(ids=": lambda: embax.lookup(table, lists),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"embax.{name}.*{UNEQUAL_MATCH}"):
            call()
    with pytest.raises(ValueError, match=r"weights=\.\.\.\)` must be one for each id, got lists of different lengths"):
        embedding_bag(table, [[1, 2], [2, 3]], weights=[[1.0, 2.0], [3.0]])
    with pytest.raises(TypeError, match=r"integer dtype, got object.*embax\.Ragged\.from_lists"):
        embedding_bag(table, np.array([[1, 2], [3]], object))
