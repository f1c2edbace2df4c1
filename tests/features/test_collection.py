"""Collection: the same numbers as separate tables, ids that stay in their own table, errors, one gather."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bag_cases import MODES, assert_same_bits, dense, put_together
from hlo import compiled_as_for_users

import embax
from embax import Collection, Feature, Ragged, Table
from embax._kernels.library import has

DIM = 3


def weight(rows, dim=DIM, dtype="float32", seed=0):
    return np.random.default_rng(seed + rows).normal(size=(rows, dim)).astype(jnp.dtype(dtype))


# Like tables, of which some have padding, and tables that are like no other.
TABLES = {
    "a": Table(weight(5)),
    "b": Table(weight(7), padding_idx=0),
    "wide": Table(weight(6, 8)),
    "c": Table(weight(1)),
    "d": Table(weight(4), padding_idx=-1),
    "half": Table(weight(5, dtype="bfloat16"), padding_idx=(0, 2)),
    "half_2": Table(weight(9, dtype="bfloat16")),
    "norm": Table(weight(5), max_norm=0.5, padding_idx=1),
    "often": Table(weight(5), scale_grad_by_freq=True),
    "often_2": Table(weight(6), scale_grad_by_freq=True, padding_idx=3),
    "clip": Table(weight(3), out_of_range="clip"),
    "zero": Table(weight(3), out_of_range="zero"),
    "frozen": Table(weight(3), freeze=True),
    "whole": Table(jnp.arange(6).reshape(3, 2)),
}
# The features of each table: what ways of reading it takes. Of the first ones some share a gather.
WAYS = {
    "a": ["rows", "bags", "weighted", "largest"],
    "b": ["rows", "more bags", "weighted", "ragged", "largest"],
    "d": ["bags", "ragged weighted"],
    "norm": ["rows", "ragged"],
    "wide": ["weighted"],
    "c": ["ragged"],
    "half": ["ragged"],
    "often": ["bags"],
    "often_2": ["ragged"],
    "clip": ["more bags"],
    "zero": ["bags"],
    "frozen": ["bags"],
    "whole": ["rows"],
}
# Those of an exhaustive run.
WAYS_TOO = {
    "d": ["ragged"],
    "norm": ["bags", "largest"],
    "c": ["rows"],
    "half": ["weighted"],
    "half_2": ["rows", "largest"],
    "often_2": ["bags"],
    "clip": ["rows"],
    "zero": ["largest"],
}


def ids_of(table, shape, seed=0):
    """Ids of a table, negative ones among them, and some without a row where it allows them."""
    beyond = 0 if table.out_of_range == "error" else 2
    return np.random.default_rng(seed).integers(-table.rows - beyond, table.rows + beyond, shape)


def ragged(table, lengths, unused=3, seed=0):
    """Bags behind which stands junk."""
    ids = ids_of(table, sum(lengths), seed)
    junk = np.resize([10_000, -10_000, 0, 1], unused)
    return Ragged(np.concatenate([ids, junk]).astype(np.int32), np.cumsum([0, *lengths]))


def features_and_inputs(ways_of):
    features, batch, weights = [], {}, {}
    rng = np.random.default_rng(5)
    for i, (name, table) in enumerate(TABLES.items()):
        ways = {
            "rows": lambda i=i, table=table: (None, ids_of(table, (2, 3) if i % 2 else (), i)),
            # Of two tables in a row, each has an option that the other lacks.
            "bags": lambda i=i, table=table: (MODES[i % 4], ids_of(table, (4, 5), i)),
            "more bags": lambda i=i, table=table: (MODES[(i + 2) % 4], ids_of(table, (2, 2, 5), i)),
            "weighted": lambda i=i, table=table: (MODES[i % 3], ids_of(table, (3, 2), i), rng.normal(size=(3, 2))),
            "ragged": lambda i=i, table=table: (MODES[1 - i % 2], ragged(table, [3, 0, 20], seed=i)),
            "largest": lambda i=i, table=table: ("max", ragged(table, [1, 4, 0, 2], unused=3 * (i % 2), seed=i)),
            "ragged weighted": lambda i=i, table=table: ("sqrtn", ragged(table, [2, 3], seed=i), rng.normal(size=8)),
        }
        for way in ways_of.get(name, []):
            mode, ids, *of_ids = ways[way]()
            feature = Feature(f"{name}, {way}, {mode}", name, mode)
            features.append(feature)
            batch[feature.name] = ids
            if of_ids:
                weights[feature.name] = of_ids[0].astype(np.float32)
    return features, batch, weights


FEATURES, BATCH, WEIGHTS = features_and_inputs(WAYS)


def separately(tables, features, batch, weights):
    """What the collection gives, from calls of the separate tables."""
    return {
        f.name: embax.lookup(tables[f.table], batch[f.name])
        if f.mode is None
        else embax.embedding_bag(tables[f.table], batch[f.name], weights.get(f.name), f.mode)
        for f in features
    }


def of_features(features, *trees):
    """The parts of the trees that belong to some of the features."""
    return [{f.name: tree[f.name] for f in features if f.name in tree} for tree in trees]


def test_tables_that_differ_in_rows_and_padding_only_are_stored_as_one():
    stacks = put_together(TABLES, FEATURES).stacks
    assert [stack.rows for stack in stacks] == [17, 6, 14, 5, 11, 3, 3, 3, 3]
    assert [stack.padding_idx for stack in stacks] == [(5, 16), None, (0, 2), 1, 8, None, None, None, None]


def test_outputs_of_weights_equal_separate_tables_bit_for_bit():
    # Outside of jit, in which XLA fuses products with sums as it likes best.
    features = [feature for feature in FEATURES if feature.table in "ab" and feature.name in WEIGHTS]
    batch, weights = of_features(features, BATCH, WEIGHTS)
    tables = {name: TABLES[name] for name in "ab"}
    assert_same_bits(Collection(tables, features)(batch, weights), separately(tables, features, batch, weights))


@pytest.mark.parametrize("ways_of", [WAYS, pytest.param(WAYS_TOO, marks=pytest.mark.exhaustive)], ids=["", "too"])
def test_outputs_equal_separate_tables_under_jit(ways_of):
    features, batch, weights = features_and_inputs(ways_of)

    @jax.jit
    def run(tables, batch, weights):
        return Collection(tables, features)(batch, weights), separately(tables, features, batch, weights)

    actual, expected = run(TABLES, batch, weights)
    for name in {f.name for f in features if f.table == "norm"} | weights.keys():
        # XLA sums norms up, and fuses products with sums, as it likes best: float32. Rounding to bfloat16 hides that.
        if actual[name].dtype != jnp.float32:
            continue
        np.testing.assert_allclose(actual.pop(name), expected.pop(name), rtol=1e-6, atol=1e-6, err_msg=name)
    assert_same_bits(actual, expected)


def test_outputs_do_not_depend_on_the_order_of_tables_features_and_batch():
    features = [feature for feature in FEATURES if feature.table in "bc" and feature.name not in WEIGHTS]
    (batch,) = of_features(features, BATCH)
    names, order = [feature.name for feature in features], []

    @jax.jit
    def run(tables, batch):
        one = Collection(tables, features)(batch)
        other = Collection(dict(reversed(tables.items())), features[::-1])(dict(reversed(batch.items())))
        order.extend(other)
        return one, other

    one, other = run({k: x for k, x in TABLES.items() if k in "abcd"}, batch)
    assert order == names[::-1]
    assert_same_bits(other, one)


def test_gradients_equal_separate_tables():
    names = ("b", "norm", "often_2", "frozen")
    ways_of = {"b": ["weighted", "ragged", "largest"], "norm": ["ragged"]} | {name: WAYS[name] for name in names[2:]}
    features, batch, weights = features_and_inputs(ways_of)
    tables, rng = {name: TABLES[name] for name in names}, np.random.default_rng(3)
    shapes = jax.eval_shape(lambda tables: separately(tables, features, batch, weights), tables)
    factors = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in shapes.items()}

    def loss(tables, weights):
        if isinstance(tables, Collection):
            out = tables(batch, weights)
        else:
            out = separately(tables, features, batch, weights)
        return sum((x * factors[name]).sum() for name, x in out.items())

    @jax.jit
    def run(tables, weights):
        ours, ours_of_weights = jax.grad(loss, argnums=(0, 1))(Collection(tables, features), weights)
        return (ours.tables, ours_of_weights), jax.grad(loss, argnums=(0, 1))(tables, weights)

    (ours, ours_of_weights), (theirs, theirs_of_weights) = run(tables, weights)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)  # float32
    for name in names:
        close(ours[name].weight, theirs[name].weight, err_msg=name)
        assert np.any(theirs[name].weight) == (name != "frozen")
    assert weights
    for name in weights:
        close(ours_of_weights[name], theirs_of_weights[name], err_msg=name)


@pytest.mark.parametrize("policy", ["error", "nan", "zero", "clip"])
def test_an_id_without_a_row_never_reads_the_next_table(policy):
    values = {"a": 1.0, "b": 7.0, "c": 9.0}
    tables = {k: Table(np.full((3, 2), v, np.float32), out_of_range=policy) for k, v in values.items()}
    modes = [None, *MODES]
    collection = put_together(tables, [Feature(f"{k}_{mode}", k, mode) for k in tables for mode in modes])
    good, bad = np.array([[0], [1], [2], [-1]]), np.array([[0], [3], [-4], [2**31 - 1]])
    batch = {f.name: bad if f.table == "b" else good for f in collection.features}

    @jax.jit
    def run(traced):
        return collection(traced), None if policy == "error" else collection(batch)

    traced, concrete = run(batch)
    wrong = {"error": np.nan, "nan": np.nan, "zero": 0.0, "clip": 7.0}[policy]
    for mode in modes:
        of_a, of_b, of_c = (np.asarray(traced[f"{k}_{mode}"]).reshape(4, 2) for k in tables)
        np.testing.assert_array_equal(of_b[:, 0], [7, wrong, wrong, wrong], err_msg=str(mode))
        np.testing.assert_array_equal(of_a, np.ones((4, 2)), err_msg=str(mode))
        np.testing.assert_array_equal(of_c, np.full((4, 2), 9), err_msg=str(mode))
        if policy == "error":
            with pytest.raises(IndexError, match=r"embax.Collection\(batch\['fb'\]\)` must be in \[-3, 3\)"):
                Collection(tables, [Feature("fb", "b", mode)])({"fb": bad})
    if policy != "error":
        assert_same_bits(concrete, traced)


def test_padding_of_a_ragged_is_not_read_and_gets_no_gradient():
    tables = {k: Table(np.full((3, 2), v, np.float32)) for k, v in (("a", 1.0), ("b", 7.0))}
    features = [Feature("fa", "a", "sum"), Feature("fb", "b", "mean")]
    batch = {"fa": Ragged([0, 1, 9, -9, 2], [0, 2, 2]), "fb": Ragged([2, 2, 1], [0, 1])}

    @jax.jit
    def run(tables):
        collection = Collection(tables, features)

        def loss(collection):
            out = collection(batch)
            return out["fa"].sum() + out["fb"].sum(), out

        gradient, out = embax.grad(loss, has_aux=True)(collection)
        return out, gradient.tables

    out, gradient = run(tables)
    np.testing.assert_array_equal(out["fa"], [[2, 2], [0, 0]])
    np.testing.assert_array_equal(out["fb"], [[7, 7]])
    gradient = dense(gradient)
    np.testing.assert_array_equal(gradient["a"], [[1, 1], [1, 1], [0, 0]])
    np.testing.assert_array_equal(gradient["b"], [[0, 0], [0, 0], [1, 1]])
    with pytest.raises(IndexError, match=r"batch\['fb'\]"):
        jax.eval_shape(lambda tables: Collection(tables, features)(batch | {"fb": Ragged([3, 2, 1], [0, 1])}), tables)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), pytest.param((0, 0), marks=pytest.mark.exhaustive)], ids=str)
def test_empty_batches_and_tables(shape):
    tables = TABLES | {"none": Table(jnp.zeros((0, DIM)))}
    modes = {"a": ["sum"], "b": MODES, "norm": ["mean", "max"], "none": ["sqrtn", "max"]}
    features = [Feature(f"{k}_{mode}", k, mode) for k in modes for mode in [None, *(modes[k] if shape[1:] else [])]]
    batch = {feature.name: np.zeros(shape, np.int32) for feature in features}
    own = {name: tables[name] for name in modes}
    assert_same_bits(
        *jax.jit(lambda tables: (Collection(tables, features)(batch), separately(tables, features, batch, {})))(own)
    )


def test_nothing_at_all():
    assert Collection({}, [])({}) == {}


def test_empty_raggeds():
    features = [Feature("mean", "norm", "mean"), Feature("max", "b", "max")]
    empty = Ragged([], [0]), Ragged([], [0, 0, 0]), Ragged([9, 9], [0, 0])
    batches = [{feature.name: bags for feature in features} for bags in empty]

    @jax.jit
    def run(tables):
        collection = Collection(tables, features)
        return [(collection(batch), separately(tables, features, batch, {})) for batch in batches]

    for ours, theirs in run({name: TABLES[name] for name in ("b", "norm")}):
        assert_same_bits(ours, theirs)


def test_vmap_over_the_batch():
    features = [Feature(f"{k}_{mode}", k, mode) for k in ("b", "d") for mode in (None, "sum", "max")]
    batch = {f.name: ids_of(TABLES[f.table], (4, 2, 3)) for f in features}

    @jax.jit
    def run(tables, batch):
        collection = Collection(tables, features)
        return jax.vmap(collection)(batch), collection(batch)

    assert_same_bits(*run(TABLES, batch))


def test_is_a_pytree():
    collection = put_together(TABLES, FEATURES)
    leaves, structure = jax.tree.flatten(collection)
    assert len(leaves) == len(collection.stacks)
    again = structure.unflatten(leaves)
    assert again.features == tuple(FEATURES)
    assert jax.tree.structure(again) == structure == jax.tree.structure(put_together(TABLES, FEATURES))
    assert hash(structure) == hash(jax.tree.structure(again))
    assert structure != jax.tree.structure(put_together(TABLES, FEATURES[1:]))
    np.testing.assert_array_equal(again["d"].weight, TABLES["d"].weight)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(collection)]
    assert paths[:2] == [".stacks[0].weight", ".stacks[1].weight"]
    assert repr(Collection({k: TABLES[k] for k in "ab"}, FEATURES[:1])) == (
        "Collection(a: 5 rows, b: 7 rows; 1 features; stored as Table(float32[12,3], padding_idx=5))"
    )


ONE = {"a": Table(jnp.ones((3, 2)))}
READ, SUM, MAX = Feature("f", "a"), Feature("f", "a", "sum"), Feature("f", "a", "max")


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, "names of their own, got 'f' 2 times", lambda: Collection(ONE, [READ, SUM])),
        (ValueError, "got 'b' for 'f'. There are 'a'", lambda: Collection(ONE, [Feature("f", "b")])),
        (TypeError, "must be Tables, got ArrayImpl for 'a'", lambda: Collection({"a": jnp.ones((3, 2))}, [READ])),
        (ValueError, r"Feature\(mode=...\)` must be one of 'sum'", lambda: Feature("f", "a", "median")),
        (KeyError, "has no table 'x'. There are 'a'", lambda: Collection(ONE, [READ])["x"]),
        (ValueError, "must have the features 'f', got none", lambda: Collection(ONE, [READ])({})),
        (ValueError, "'f', got 'f', 'g'", lambda: Collection(ONE, [READ])({"f": [0], "g": [0]})),
        (ValueError, "weights for 'g'", lambda: Collection(ONE, [SUM])({"f": [[0]]}, {"g": [[1.0]]})),
        (TypeError, "is not pooled, got list", lambda: Collection(ONE, [READ])({"f": [0]}, {"f": [1.0]})),
        (TypeError, "is not pooled, got Ragged", lambda: Collection(ONE, [READ])({"f": Ragged([0], [0, 1])})),
        (TypeError, r"weights\['f'\].*mode 'max'", lambda: Collection(ONE, [MAX])({"f": [[0]]}, {"f": [[1.0]]})),
        (TypeError, r"weights\['f'\].*float dtype", lambda: Collection(ONE, [SUM])({"f": [[0]]}, {"f": [[1]]})),
        (ValueError, r"weights\['f'\].*one for each id", lambda: Collection(ONE, [SUM])({"f": [[0]]}, {"f": [1.0]})),
        (TypeError, r"batch\['f'\].*integer dtype", lambda: Collection(ONE, [READ])({"f": [0.5]})),
        (ValueError, r"batch\['f'\].*an axis of ids", lambda: Collection(ONE, [SUM])({"f": 0})),
        (TypeError, "a table of floats, got int32 for 'f'", lambda: Collection({"a": TABLES["whole"]}, [SUM])),
    ],
)
def test_errors(error, match, call):
    with pytest.raises(error, match=match):
        call()


def like_tables(mode, length, number=6, rows=50):
    tables = {f"t{i}": Table(jax.ShapeDtypeStruct((rows, 8), jnp.float32)) for i in range(number)}
    features = [Feature(name, name, mode) for name in tables]
    collection = jax.eval_shape(lambda tables: Collection(tables, features), tables)
    return collection, {name: jax.ShapeDtypeStruct((16, length), jnp.int32) for name in tables}


@pytest.mark.parametrize(
    ("mode", "length"), [(None, 3), ("mean", 3), ("max", 3), pytest.param("sum", 1, marks=pytest.mark.exhaustive)]
)
def test_stacked_tables_need_the_gathers_of_one(mode, length):
    def count(number):
        text = compiled_as_for_users(lambda c, b: c(b), *like_tables(mode, length, number)).as_text()
        return text.count(" gather(") + text.count('custom_call_target="embax_'), text

    (gathers, text), (of_one, _) = count(6), count(1)
    assert "f32[300,8]" in text
    # XLA sums bags place by place, each place being a gather within one fusion; a kernel sums them at once.
    by_places = mode in ("sum", "mean") and not has("pool")
    assert gathers == of_one == (length if by_places else 1) + (mode == "max") * (of_one - 1)


@pytest.mark.skipif(not has("pool"), reason="kernels are not installed, or switched off")
@pytest.mark.parametrize("kind", ["rows", "bags", "ragged"])
def test_a_kernel_writes_each_feature_by_itself(kind):
    collection, batch = like_tables(None if kind == "rows" else "sum", 3)
    if kind == "ragged":
        offsets = jax.ShapeDtypeStruct((17,), jnp.int32)
        batch = {name: jax.eval_shape(Ragged, jax.ShapeDtypeStruct((48,), jnp.int32), offsets) for name in batch}
    program = compiled_as_for_users(lambda c, b: c(b), collection, batch)
    (call,) = (line for line in program.as_text().splitlines() if 'custom_call_target="embax_' in line)
    number = 48 if kind == "rows" else 16
    assert call.split(" custom-call(")[0].count(f"f32[{number},8]") == 6
    # No array of all results, nor a mask of ids all of which count.
    assert f"f32[{6 * number},8]" not in program.as_text()
    assert kind == "ragged" or "pred[96" not in program.as_text()


def test_a_step_has_one_scatter_into_the_stack_and_one_into_the_slots():
    collection, batch = like_tables("sum", 3)
    tx = embax.optim.lift(optax.sgd(0.1, momentum=0.9))

    def step(collection, state, batch):
        gradient = embax.grad(lambda c: sum(jnp.square(x).sum() for x in c(batch).values()))(collection)
        updates, state = tx.update(gradient, state, collection)
        return embax.apply_updates(collection, updates), state

    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        text = compiled_as_for_users(
            step, collection, jax.eval_shape(tx.init, collection), batch, donate=(0, 1)
        ).as_text()
    write = 'custom_call_target="embax_put"' if has("put") else " scatter("
    scatters = [line.split(" = ")[1].split("{")[0] for line in text.splitlines() if write in line]
    assert scatters.count("f32[300,8]") == 2  # the weight, and the momentum
    assert scatters.count("s32[300]") == (0 if has("combine") else 1)  # a kernel needs no slots
