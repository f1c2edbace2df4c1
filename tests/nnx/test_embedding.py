"""The layer for Flax NNX: what `nnx.Embed` takes and gives, under NNX's transformations and on meshes."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from meshes import usual_and_rest

from embax import Ragged, Table
from embax.nnx import Embedding, EmbeddingBag

WEIGHT = np.arange(1.0, 13.0, dtype=np.float32).reshape(6, 2)
IDS = np.array([[0, 2], [-1, 2]])
TOUCHED = [0, 2, 5]
RULES = {"padding_idx": 1, "max_norm": 1.0, "out_of_range": "clip"}


def layer(weight=WEIGHT, **options):
    """A layer of these rows, all of them kept as they are."""
    return Embedding.from_pretrained(weight, **{"freeze": False, **options})


def weight_of(embedding):
    return np.asarray(embedding.embedding.get_value())


def assert_stored(embedding, touched):
    """The rows that were read are clipped to 1, the others as they were."""
    expected = WEIGHT.copy()
    expected[touched] /= np.linalg.norm(WEIGHT[touched], axis=1, keepdims=True)
    assert isinstance(embedding.embedding, nnx.Param)
    assert isinstance(embedding.embedding.get_value(), jax.Array)
    np.testing.assert_allclose(weight_of(embedding), expected, rtol=2e-7)  # float32


# One edit: nnx.Embed -> embax.nnx.Embedding


@pytest.mark.parametrize(("features", "dtype"), [(3, jnp.float32), (3, jnp.bfloat16)])
def test_the_same_seed_gives_the_weights_of_nnx_embed(features, dtype):
    ours, theirs = (cls(5, features, param_dtype=dtype, rngs=nnx.Rngs(7)) for cls in (Embedding, nnx.Embed))
    assert ours.embedding.get_value().dtype == dtype
    np.testing.assert_array_equal(weight_of(ours), theirs.embedding.get_value())
    np.testing.assert_array_equal(ours(IDS % 5), theirs(jnp.asarray(IDS % 5)))


@pytest.mark.parametrize("name", ["__init__", "__call__", "attend"])
def test_embedding_takes_every_argument_of_nnx_embed(name):
    ours, theirs = (inspect.signature(getattr(cls, name)).parameters for cls in (Embedding, nnx.Embed))
    assert set(theirs) <= set(ours)
    positional = [name for name, parameter in theirs.items() if parameter.kind == parameter.POSITIONAL_OR_KEYWORD]
    assert list(ours)[: len(positional)] == positional


def promote_to_float16(arrays, *, dtype, inexact=True):
    return tuple(array.astype(jnp.float16) for array in arrays)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": jnp.bfloat16},
        {"param_dtype": jnp.bfloat16},
        {"param_dtype": jnp.float16, "dtype": jnp.float32},
        {"promote_dtype": promote_to_float16},
        {"promote_dtype": nnx.nn.dtypes.promote_dtype, "dtype": jnp.bfloat16},
        {"embedding_init": nnx.initializers.ones_init()},
    ],
    ids=lambda options: "-".join(options) or "none",  # the same in every process
)
def test_options_of_nnx_embed_mean_the_same(options):
    ours, theirs = (cls(5, 3, rngs=nnx.Rngs(0), **options) for cls in (Embedding, nnx.Embed))
    ids = jnp.array([[0, 4], [-1, 2]])
    rows, expected = ours(inputs=ids), theirs(inputs=ids)
    assert rows.dtype == expected.dtype
    np.testing.assert_array_equal(rows, expected)
    assert ours.embedding.get_value().dtype == theirs.embedding.get_value().dtype
    assert (ours.num_embeddings, ours.features) == (theirs.num_embeddings, theirs.features) == (5, 3)


@pytest.mark.parametrize("options", [{}, {"dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16}], ids=str)
def test_attend_equals_nnx_embed(options):
    ours, theirs = (cls(5, 3, rngs=nnx.Rngs(0), **options) for cls in (Embedding, nnx.Embed))
    query = jnp.linspace(0.0, 1.0, 6).reshape(2, 3)
    logits = ours.attend(query)
    with jax.numpy_dtype_promotion("standard"):
        expected = theirs.attend(query)
    assert logits.dtype == expected.dtype
    rtol = 1e-2 if expected.dtype == jnp.bfloat16 else 1e-6  # of the dtype
    np.testing.assert_allclose(logits.astype(jnp.float32), expected.astype(jnp.float32), rtol=rtol)


def test_attend_takes_the_query_by_name():
    np.testing.assert_array_equal(layer().attend(query=jnp.ones(2)), WEIGHT.sum(axis=1))


def test_metadata_of_the_param():
    ours, theirs = (cls(5, 3, rngs=nnx.Rngs(0), embedding_metadata={"tag": "t"}) for cls in (Embedding, nnx.Embed))
    assert ours.embedding.get_metadata() == theirs.embedding.get_metadata()
    assert ours.embedding.tag == "t"


def test_one_draw_from_the_stream_params():
    rngs = nnx.Rngs(params=3, dropout=4)
    Embedding(5, 3, rngs=rngs)
    assert (int(rngs.params.count[...]), int(rngs.dropout.count[...])) == (1, 0)


def test_rows_of_several_axes():
    embedding = Embedding(5, (2, 3), rngs=nnx.Rngs(0), padding_idx=-1)
    assert (embedding.features, weight_of(embedding).shape) == ((2, 3), (5, 2, 3))
    assert embedding(IDS % 5).shape == (2, 2, 2, 3)
    assert not embedding([4]).any()
    assert weight_of(embedding)[:4].all()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ((-1, 3), {}, ValueError, r"embax.nnx.Embedding\(num_embeddings=...\)` must not be negative, got -1"),
        ((5, -3), {}, ValueError, r"embax.nnx.Embedding\(features=...\)` must not be negative, got -3"),
        ((5, "ab"), {}, TypeError, r"embax.nnx.Embedding\(features=...\)` must be a whole number, got 'a'"),
        ((5, 3), {"padding_idx": 5}, ValueError, r"padding_idx=...\)` must be a row of the table, in \[-5, 5\), got 5"),
        ((5, 3), {"max_norm": 0}, ValueError, r"max_norm=...\)` must be positive, got 0"),
        ((5, 3), {"norm_type": "2"}, TypeError, r"norm_type=...\)` must be a positive number, got '2'"),
        ((5, 3), {"freeze": 1}, TypeError, r"freeze=...\)` must be a bool, got 1"),
        ((5, 3), {"scale_grad_by_freq": None}, TypeError, r"scale_grad_by_freq=...\)` must be a bool, got None"),
        ((5, 3), {"out_of_range": "wrap"}, ValueError, r"out_of_range=...\)` must be one of 'error', .* got 'wrap'"),
        ((5, 3), {"paddding": 0}, TypeError, "unexpected keyword argument 'paddding'"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, options, error, match):
    with pytest.raises(error, match=match):
        Embedding(*arguments, rngs=nnx.Rngs(0), **options)


def test_bad_ids():
    embedding = layer()
    with pytest.raises(TypeError, match=r"embax.nnx.Embedding\(inputs=...\)` must be of an integer dtype, got float32"):
        embedding(jnp.ones(2))
    with pytest.raises(IndexError, match=r"embax.nnx.Embedding\(inputs=...\)` must be in \[-6, 6\).* got 6 at pos"):
        embedding([0, 6])


def test_rules_may_be_changed_between_calls():
    embedding = layer()
    embedding.max_norm, embedding.out_of_range, embedding.write_back = 1.0, "zero", False
    np.testing.assert_allclose(jnp.linalg.norm(embedding([0, 5, 9]), axis=-1), [1, 1, 0], rtol=2e-7)  # float32
    np.testing.assert_array_equal(weight_of(embedding), WEIGHT)
    embedding.freeze = "yes"
    with pytest.raises(TypeError, match=r"freeze=...\)` must be a bool, got 'yes'"):
        embedding([0])


# Checkpoints and states of nnx.Embed


def states_of_nnx_embed():
    embed = nnx.Embed(6, 2, rngs=nnx.Rngs(3))
    return embed, nnx.state(embed)


def test_state_of_nnx_embed_is_accepted():
    embed, state = states_of_nnx_embed()
    embedding = Embedding(6, 2, rngs=nnx.Rngs(0), **RULES)
    assert jax.tree.structure(nnx.state(embedding)) == jax.tree.structure(state)
    nnx.update(embedding, state)
    merged = nnx.merge(nnx.graphdef(Embedding(6, 2, rngs=nnx.Rngs(0), **RULES)), state)
    for loaded in embedding, merged:
        np.testing.assert_array_equal(weight_of(loaded), embed.embedding.get_value())
        assert (loaded.padding_idx, loaded.max_norm, loaded.out_of_range) == (1, 1.0, "clip")
        assert isinstance(loaded, Embedding)
    # And back.
    nnx.update(embed, nnx.state(layer()))
    np.testing.assert_array_equal(embed(jnp.arange(6)), WEIGHT)


def test_checkpoint_of_nnx_embed_is_accepted(tmp_path):
    embed, state = states_of_nnx_embed()
    embedding = nnx.eval_shape(lambda: Embedding(6, 2, rngs=nnx.Rngs(0), **RULES))
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "embed", state)
        checkpointer.wait_until_finished()
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), nnx.state(embedding))
        nnx.update(embedding, checkpointer.restore(tmp_path / "embed", target))
    np.testing.assert_array_equal(weight_of(embedding), embed.embedding.get_value())
    assert embedding.table.padding_idx == 1
    np.testing.assert_allclose(np.linalg.norm(embedding([0, 9]), axis=1), [1, 1], rtol=1e-6)  # float32


def test_split_merge_and_clone_keep_the_rules():
    embedding = layer(padding_idx=1, max_norm=3.0, norm_type=1.0, scale_grad_by_freq=True, write_back=False)
    graphdef, params = nnx.split(embedding, nnx.Param)
    for copy in nnx.merge(graphdef, params), nnx.clone(embedding):
        assert copy is not embedding
        assert repr(copy.table) == repr(embedding.table)
        assert copy.write_back is False
    assert hash(graphdef) == hash(nnx.graphdef(nnx.clone(embedding)))
    embedding.max_norm = 2.0
    assert graphdef != nnx.graphdef(embedding)


# NNX's transformations


def broadcast(embedding):
    lanes = nnx.vmap(lambda embedding, ids: embedding(ids), in_axes=(None, 0))
    return lambda ids: lanes(embedding, jnp.asarray(ids))


def scanned(embedding):
    steps = nnx.scan(lambda embedding, ids: (embedding, embedding(ids)), in_axes=(nnx.Carry, 0))
    return lambda ids: steps(embedding, jnp.asarray(ids))[1]


def looped(embedding):
    def step(i, carry):
        embedding, ids, out = carry
        return embedding, ids, out.at[i].set(embedding(ids[i]))

    return lambda ids: nnx.fori_loop(0, 2, step, (embedding, jnp.asarray(ids), jnp.zeros((2, 2, 2))))[2]


def branched(embedding):
    return lambda ids: nnx.cond(
        jnp.array(True), lambda e, ids: e(ids), lambda e, ids: jnp.zeros((2, 2, 2)), embedding, jnp.asarray(ids)
    )


def with_gradient(embedding):
    def loss(embedding, ids):
        rows = embedding(ids)
        return rows.sum(), rows

    return lambda ids: nnx.grad(loss, has_aux=True)(embedding, jnp.asarray(ids))[1]


def of_module(transform):
    return lambda embedding: lambda ids: transform(lambda e, ids: e(ids))(embedding, jnp.asarray(ids))


TRANSFORMS = {
    "eager": lambda embedding: embedding,
    "jit": of_module(nnx.jit),
    "remat": of_module(nnx.remat),
    "jit of remat": of_module(lambda call: nnx.jit(nnx.remat(call))),
    "vmap": broadcast,
    "scan": scanned,
    "fori_loop": looped,
    "cond": branched,
    "grad": with_gradient,
}


# Outside of jit, each operation of remat is a program of its own.
@pytest.mark.parametrize(
    "transform", [pytest.param(x, marks=pytest.mark.exhaustive if x == "remat" else ()) for x in TRANSFORMS]
)
def test_rows_are_stored_clipped_under_every_transformation_of_nnx(transform):
    embedding = layer(max_norm=1.0)
    rows = TRANSFORMS[transform](embedding)(IDS)
    np.testing.assert_allclose(rows, WEIGHT[IDS] / np.linalg.norm(WEIGHT[IDS], axis=-1, keepdims=True), rtol=2e-7)
    assert_stored(embedding, TOUCHED)


def test_the_other_branch_of_a_cond_stores_nothing():
    embedding = layer(max_norm=1.0)
    nnx.cond(jnp.array(False), lambda e: e([0]), lambda e: jnp.zeros((1, 2)), embedding)
    np.testing.assert_array_equal(weight_of(embedding), WEIGHT)


RAW = {
    "jit": lambda embedding: jax.jit(lambda ids: embedding(ids)),
    "vmap": lambda embedding: jax.vmap(embedding),
    "scan": lambda embedding: lambda ids: jax.lax.scan(lambda _, ids: (None, embedding(ids)), None, ids)[1],
    "checkpoint": lambda embedding: jax.checkpoint(lambda ids: embedding(ids)),
    "grad": lambda embedding: (
        lambda ids: jax.grad(lambda scale: ((embedding(ids) * scale).sum(), embedding(ids)), has_aux=True)(1.0)[1]
    ),
}


@pytest.mark.parametrize("transform", RAW)
def test_raw_transformations_clip_rows_and_store_nothing(transform):
    embedding = layer(max_norm=1.0)
    rows = RAW[transform](embedding)(jnp.asarray(IDS))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=-1), np.ones((2, 2)), rtol=2e-7)  # float32
    np.testing.assert_array_equal(weight_of(embedding), WEIGHT)


def test_functional_jit_hands_the_stored_rows_out():
    graphdef, state = nnx.split(layer(max_norm=1.0))

    @jax.jit
    def call(state, ids):
        embedding = nnx.merge(graphdef, state)
        return embedding(ids), nnx.state(embedding)

    rows, state = call(state, IDS)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=-1), np.ones((2, 2)), rtol=2e-7)  # float32
    assert_stored(nnx.merge(graphdef, state), TOUCHED)


@pytest.mark.parametrize("options", [{"write_back": False}, {"freeze": True}, {"max_norm": None}], ids=str)
def test_frozen_layers_and_write_back_false_store_nothing(options):
    embedding = layer(**{"max_norm": 1.0, **options})
    before = embedding.embedding.get_value()
    embedding(IDS)
    assert embedding.embedding.get_value() is before


def test_the_padding_row_is_not_stored_clipped():
    embedding = layer(max_norm=1.0, padding_idx=2)
    embedding(IDS)
    assert_stored(embedding, [0, 5])


def test_lanes_with_modules_of_their_own():
    create = nnx.vmap(lambda key: Embedding(6, 2, rngs=nnx.Rngs(params=key), padding_idx=0), in_axes=0, out_axes=0)
    embeddings = create(jax.random.split(jax.random.key(0), 3))
    assert weight_of(embeddings).shape == (3, 6, 2)
    embeddings.embedding.set_value(jnp.asarray(np.stack([WEIGHT, WEIGHT + 1, WEIGHT + 2])))
    embeddings.max_norm = 1.0
    ids = np.array([[0, 1], [1, 2], [5, 5]])
    rows = nnx.vmap(lambda embedding, ids: embedding(ids))(embeddings, ids)
    for lane in range(3):
        alone = layer(WEIGHT + lane, max_norm=1.0, padding_idx=0)
        np.testing.assert_allclose(rows[lane], alone(ids[lane]), rtol=2e-7)  # float32
        np.testing.assert_allclose(weight_of(embeddings)[lane], weight_of(alone), rtol=2e-7)


def test_stacked_layers_run_under_scan():
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(key):
        return Embedding(6, 2, rngs=nnx.Rngs(params=key))

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(embedding, total):
        return total + embedding([1]).sum()

    embeddings = create(jax.random.split(jax.random.key(0), 3))
    np.testing.assert_allclose(run(embeddings, jnp.array(0.0)), weight_of(embeddings)[:, 1].sum(), rtol=1e-5)  # float32


def test_no_call_compiles_anew():
    calls = 0

    @nnx.jit
    def call(embedding, ids):
        nonlocal calls
        calls += 1
        return embedding(ids)

    embedding = layer(max_norm=1.0, out_of_range="nan")
    for _ in range(3):
        call(embedding, jnp.arange(3))
    call(nnx.clone(embedding), jnp.arange(3) + 1)
    assert calls == 1
    embedding.max_norm = 0.5
    assert jnp.linalg.norm(call(embedding, jnp.arange(3))[0]) <= 0.5 + 1e-6
    assert calls == 2


def test_eval_shape_needs_no_memory():
    embedding = nnx.eval_shape(lambda: Embedding(10**12, 2, rngs=nnx.Rngs(0), out_of_range="nan"))
    assert embedding.embedding.get_value() == jax.ShapeDtypeStruct((10**12, 2), jnp.float32)
    embedding = nnx.eval_shape(lambda: Embedding(6, 2, rngs=nnx.Rngs(0), padding_idx=-1))
    assert repr(embedding.table) == "Table(float32[6,2], padding_idx=5)"
    assert nnx.eval_shape(lambda e: e(jnp.arange(3)), embedding).shape == (3, 2)


def test_gradient_by_nnx_follows_the_rules():
    loss = lambda embedding: embedding([1, 2, 2, 9]).sum()  # noqa: E731
    by_rules = layer(padding_idx=1, scale_grad_by_freq=True, out_of_range="zero")
    frozen = layer(freeze=True, out_of_range="zero")
    differentiate = nnx.jit(lambda by_rules, frozen: (nnx.grad(loss)(by_rules), nnx.value_and_grad(loss)(frozen)))
    gradient, (value, of_frozen) = differentiate(by_rules, frozen)
    np.testing.assert_array_equal(gradient["embedding"].get_value(), np.eye(6)[2][:, None] * np.ones((1, 2)))
    assert value == WEIGHT[[1, 2, 2]].sum()
    assert not np.asarray(of_frozen["embedding"].get_value()).any()


# Meshes


@functools.cache
def mesh(kind):
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))


ANNOTATIONS = {
    "metadata": {"embedding_metadata": {"out_sharding": ("model", None)}},
    "with_partitioning": {"embedding_init": nnx.with_partitioning(nnx.initializers.ones_init(), ("model", None))},
}
KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)


@pytest.mark.parametrize(
    ("how", "kind"),
    usual_and_rest(
        [("metadata", AxisType.Auto), ("with_partitioning", AxisType.Explicit)],
        itertools.product(ANNOTATIONS, [AxisType.Auto, AxisType.Explicit]),
    ),
)
def test_annotations_of_the_sharding(how, kind):
    with jax.set_mesh(mesh(kind)):
        ours, theirs = (cls(8, 4, rngs=nnx.Rngs(0), **ANNOTATIONS[how]) for cls in (Embedding, nnx.Embed))
        assert ours.embedding.get_metadata() == theirs.embedding.get_metadata()
        padded = Embedding(8, 4, rngs=nnx.Rngs(0), padding_idx=1, **ANNOTATIONS[how])
        for embedding in ours, padded:
            weight = embedding.embedding.get_value()
            assert weight.sharding.spec[0] == "model"
            assert weight.sharding.is_equivalent_to(theirs.embedding.get_value().sharding, 2)
            specs = nnx.get_partition_spec(nnx.state(embedding))
            assert specs["embedding"].get_value() == PartitionSpec("model", None)
        assert not weight_of(padded)[1].any()
        np.testing.assert_array_equal(weight_of(padded)[2:], weight_of(ours)[2:])
        inside = nnx.jit(lambda: Embedding(8, 4, rngs=nnx.Rngs(0), padding_idx=1, **ANNOTATIONS[how]))()
        assert inside.embedding.get_value().sharding.is_equivalent_to(weight.sharding, 2)
        np.testing.assert_allclose(weight_of(inside), weight_of(padded), rtol=1e-6)  # float32


@KINDS
def test_sharded_table_reads_and_stores_like_a_dense_one(kind):
    weight = np.arange(32.0, dtype=np.float32).reshape(8, 4)
    with jax.set_mesh(mesh(kind)):
        ids = jax.device_put(np.array([1, 7, 2, 7]), jax.NamedSharding(mesh(kind), PartitionSpec("data")))
        embedding = Embedding(8, 4, rngs=nnx.Rngs(0), max_norm=1.0, **ANNOTATIONS["metadata"])
        sharding = embedding.embedding.get_value().sharding
        embedding.embedding.set_value(jax.device_put(weight, sharding))
        rows = nnx.jit(lambda embedding, ids: embedding(ids))(embedding, ids)
        stored = embedding.embedding.get_value()
    expected = weight.copy()
    expected[[1, 2, 7]] /= np.linalg.norm(weight[[1, 2, 7]], axis=1, keepdims=True)
    np.testing.assert_allclose(rows, expected[[1, 7, 2, 7]], rtol=2e-7)  # float32
    np.testing.assert_allclose(stored, expected, rtol=2e-7)
    assert stored.sharding.is_equivalent_to(sharding, 2)
    if kind == AxisType.Explicit:
        assert rows.sharding.spec == PartitionSpec("data", None)


@pytest.mark.parametrize(
    ("compiled", "kind"),
    usual_and_rest(
        [(False, AxisType.Explicit), (True, AxisType.Auto)],
        itertools.product([False, True], [AxisType.Auto, AxisType.Explicit]),
    ),
)
def test_out_sharding(compiled, kind):
    with jax.set_mesh(mesh(kind)):
        ours, theirs = (cls(8, 4, rngs=nnx.Rngs(0), **ANNOTATIONS["metadata"]) for cls in (Embedding, nnx.Embed))
        call = lambda embedding: embedding(jnp.arange(4), out_sharding=PartitionSpec("data", None))  # noqa: E731
        rows, expected = ((nnx.jit(call) if compiled else call)(embedding) for embedding in (ours, theirs))
        np.testing.assert_array_equal(rows, expected)
        if kind == AxisType.Explicit:
            assert rows.sharding.spec == expected.sharding.spec == PartitionSpec("data", None)


# Bags


def test_bags():
    bag = EmbeddingBag.from_pretrained(WEIGHT, mode="sum", padding_idx=0)
    np.testing.assert_array_equal(bag([[1, 2], [0, 0]]), [WEIGHT[1] + WEIGHT[2], [0, 0]])
    last = EmbeddingBag.from_pretrained(WEIGHT, include_last_offset=True)
    assert (last.mode, last.include_last_offset) == ("mean", True)
    half = EmbeddingBag(6, 2, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)

    @nnx.jit
    def others(bag, last, half):
        return {
            "offsets": bag(jnp.array([1, 2, 5]), offsets=[0, 2]),
            "ragged": bag(Ragged.from_lists([[1, 2], []])),
            "weights": bag([[1, 2]], per_sample_weights=[[2.0, 0.5]]),
            "last": last([1, 2, 5, 3], offsets=[0, 2, 3]),
            "dtype": half([[1, 2]]),
        }

    out = others(bag, last, half)
    np.testing.assert_array_equal(out["offsets"], [WEIGHT[1] + WEIGHT[2], WEIGHT[5]])
    np.testing.assert_array_equal(out["ragged"], [WEIGHT[1] + WEIGHT[2], [0, 0]])
    np.testing.assert_array_equal(out["weights"], [2 * WEIGHT[1] + WEIGHT[2] / 2])
    np.testing.assert_array_equal(out["last"], [(WEIGHT[1] + WEIGHT[2]) / 2, WEIGHT[5]])
    assert out["dtype"].dtype == jnp.bfloat16


BAGS = {  # arrays and offsets, and the rows that they name
    "offsets": (lambda bag: bag(jnp.array([0, 2, 5, 1, 3]), offsets=jnp.array([0, 1, 3])), [0, 1, 2, 3, 5]),
    "ragged": (lambda bag: bag(Ragged(jnp.array([0, 2, 4, -9]), jnp.array([0, 1, 2]))), [0, 2]),
}


@pytest.mark.parametrize(
    ("bags", "compiled"), usual_and_rest([("offsets", True), ("ragged", False)], itertools.product(BAGS, [True, False]))
)
def test_bags_store_the_rows_that_are_in_one(bags, compiled):
    bag = EmbeddingBag.from_pretrained(WEIGHT, freeze=False, max_norm=1.0, mode="sum", out_of_range="clip")
    call, rows = BAGS[bags]
    (nnx.jit(call) if compiled else call)(bag)
    assert_stored(bag, rows)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda: EmbeddingBag(6, 2, mode="min", rngs=nnx.Rngs(0)),
            ValueError,
            r"nnx.EmbeddingBag\(mode=...\)` .*'min'",
        ),
        (
            lambda: EmbeddingBag(6, 2, include_last_offset=1, rngs=nnx.Rngs(0)),
            TypeError,
            r"embax.nnx.EmbeddingBag\(include_last_offset=...\)` must be a bool, got 1",
        ),
        (
            lambda: EmbeddingBag(-6, 2, rngs=nnx.Rngs(0)),
            ValueError,
            r"nnx.EmbeddingBag\(num_embeddings=...\)` must not",
        ),
        (lambda: EmbeddingBag(6, 2), TypeError, "rngs"),
        (
            lambda: EmbeddingBag.from_pretrained(WEIGHT)(Ragged.from_lists([[1]]), offsets=[0]),
            TypeError,
            r"nnx.EmbeddingBag\(offsets=...\)` must be None for a Ragged, got \[0\]",
        ),
        (
            lambda: EmbeddingBag.from_pretrained(np.ones((2, 2), int))([[1]]),
            TypeError,
            r"nnx.EmbeddingBag` must have a table of a float dtype, got int32",
        ),
        (
            lambda: EmbeddingBag.from_pretrained(WEIGHT)([[6]]),
            IndexError,
            r"nnx.EmbeddingBag\(input=...\)` must be in \[-6, 6\)",
        ),
        (
            lambda: EmbeddingBag.from_pretrained(WEIGHT)(1),
            ValueError,
            r"input=...\)` must have an axis of ids, got a sc",
        ),
        (lambda: EmbeddingBag.from_pretrained(WEIGHT)([[0.5]]), TypeError, r"input=...\)` must be of an integer dtype"),
        (
            lambda: EmbeddingBag.from_pretrained(WEIGHT, mode="max")([[1]], per_sample_weights=[[1.0]]),
            TypeError,
            r"nnx.EmbeddingBag\(per_sample_weights=...\)` must be None in mode 'max'",
        ),
        (
            lambda: EmbeddingBag.from_pretrained(WEIGHT)([[1]], per_sample_weights=[[1]]),
            TypeError,
            r"per_sample_weights=...\)` must be of a float dtype, got int32",
        ),
        (
            lambda: EmbeddingBag.from_pretrained(WEIGHT)([[1]], per_sample_weights=[1.0]),
            ValueError,
            r"per_sample_weights=...\)` must be one for each id, \(1, 1\), got shape \(1,\)",
        ),
    ],
)
def test_bags_bad_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_repr_and_type():
    embedding = layer(padding_idx=1)
    assert isinstance(embedding.table, Table)
    assert "padding_idx=1" in repr(embedding)
    assert type(embedding).__module__ == EmbeddingBag.__module__ == "embax.nnx"
