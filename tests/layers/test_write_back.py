"""Where a clipped row is stored: under every brainstate transformation, and nowhere that it cannot be."""

import itertools

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import usual_and_rest

import embax

WEIGHT = np.arange(1.0, 13.0, dtype=np.float32).reshape(6, 2)
IDS = np.array([[0, 2], [-1, 2]])
TOUCHED = [0, 2, 5]


def layer(**options):
    return embax.Embedding(6, 2, embedding_init=WEIGHT, max_norm=1.0, **options)


def clipped(weight=WEIGHT):
    return weight / np.maximum(1, np.linalg.norm(weight, axis=-1, keepdims=True))


def assert_stored(embedding, touched):
    expected = WEIGHT.copy()
    expected[touched] = clipped()[touched]
    value = embedding.weight.value
    assert isinstance(value, jax.Array)
    assert value.shape == WEIGHT.shape
    np.testing.assert_allclose(value, expected, rtol=2e-7)  # float32


def loss_gradient(embedding):
    return brainstate.transform.grad(lambda ids: embedding(ids).sum(), embedding.weight)


def loop(embedding):
    return lambda ids: brainstate.transform.for_loop(embedding, jnp.asarray(ids))


def scan(embedding):
    def step(carry, ids):
        return carry + embedding(ids).sum(), None

    return lambda ids: brainstate.transform.scan(step, jnp.zeros(()), jnp.asarray(ids))


def cond(embedding):
    return lambda ids: brainstate.transform.cond(True, embedding, lambda ids: jnp.zeros((2, 2, 2)), jnp.asarray(ids))


TRANSFORMS = {
    "eager": lambda embedding: embedding,
    "jit": brainstate.transform.jit,
    "embax.jit": embax.brainstate.jit,
    "grad": loss_gradient,
    "jit of grad": lambda embedding: brainstate.transform.jit(loss_gradient(embedding)),
    "for_loop": loop,
    "jit of for_loop": lambda embedding: brainstate.transform.jit(loop(embedding)),
    "scan": scan,
    "cond": cond,
    "checkpoint": brainstate.transform.checkpoint,
    "vmap": brainstate.transform.vmap,
    "vmap2": brainstate.transform.vmap2,
    "jit of vmap": lambda embedding: brainstate.transform.jit(brainstate.transform.vmap(embedding)),
    "vmap of vmap": lambda embedding: brainstate.transform.vmap(brainstate.transform.vmap(embedding)),
    "jit of grad of vmap": lambda embedding: brainstate.transform.jit(
        brainstate.transform.grad(lambda ids: brainstate.transform.vmap(embedding)(ids).sum(), embedding.weight)
    ),
    "hessian": lambda embedding: brainstate.transform.hessian(lambda ids: embedding(ids).sum(), embedding.weight),
    "jit of jacfwd": lambda embedding: brainstate.transform.jit(
        brainstate.transform.jacfwd(lambda ids: embedding(ids), embedding.weight)
    ),
    "jit of jacrev": lambda embedding: brainstate.transform.jit(
        brainstate.transform.jacrev(lambda ids: embedding(ids), embedding.weight)
    ),
}


# The hessian is one derivative inside of another, which takes the longest. Outside of jit, each operation of a gradient
# is a program of its own.
COSTLY = ["hessian", "grad"]
# Where nothing is stored, these show what others do.
FEW = ["grad", "cond", "checkpoint", "vmap2", "jit of jacfwd", "jit of jacrev"]
NESTED = ["jit of for_loop", "jit of vmap", "vmap of vmap", "jit of grad of vmap", "hessian"]


def all_but(rest):
    """All transformations; those of the rest in exhaustive runs."""
    return [pytest.param(name, marks=pytest.mark.exhaustive) if name in rest else name for name in TRANSFORMS]


@pytest.mark.parametrize("transform", all_but(COSTLY))
def test_call_stores_clipped_rows(transform):
    embedding = layer()
    TRANSFORMS[transform](embedding)(IDS)
    assert_stored(embedding, TOUCHED)


@pytest.mark.parametrize("transform", all_but([*NESTED, *FEW]))
def test_write_back_off_leaves_the_table(transform):
    embedding = layer(write_back=False)
    TRANSFORMS[transform](embedding)(IDS)
    assert_stored(embedding, [])


@pytest.mark.parametrize("transform", all_but([*NESTED, *FEW]))
def test_frozen_table_is_never_written(transform):
    embedding = layer(freeze=True)
    before = embedding.weight.value
    TRANSFORMS[transform](embedding)(IDS)
    embedding.renormalize(IDS)
    assert embedding.weight.value is before


RAW = {
    "jit": jax.jit,
    "vmap": jax.vmap,
    "jit of vmap": lambda embedding: jax.jit(jax.vmap(embedding)),
    "checkpoint": jax.checkpoint,
    "scan": lambda embedding: lambda ids: jax.lax.scan(lambda carry, ids: (carry, embedding(ids)), 0, ids)[1],
    "jvp of ids closed over": lambda embedding: (
        lambda ids: jax.jvp(lambda scale: scale * embedding(ids), (jnp.ones(()),), (jnp.ones(()),))[0]
    ),
}


@pytest.mark.parametrize("transform", RAW)
def test_raw_jax_transform_clips_the_output(transform):
    embedding = layer()
    np.testing.assert_allclose(RAW[transform](embedding)(jnp.asarray(IDS)), clipped()[IDS], rtol=2e-7)  # float32


@pytest.mark.parametrize("transform", [name for name in RAW if name != "jvp of ids closed over"])
def test_raw_jax_transform_leaves_the_table(transform):
    embedding = layer()
    RAW[transform](embedding)(jnp.asarray(IDS))
    assert_stored(embedding, [])


CONSTANT = {"array": IDS, "jax_array": jnp.asarray(IDS), "list": IDS.tolist()}


def with_constant_ids(transforms):
    """Each transformation with one kind of ids, the kinds in turn; exhaustive runs try all of them."""
    usual = [(name, list(CONSTANT)[n % len(CONSTANT)]) for n, name in enumerate(transforms)]
    return pytest.mark.parametrize(("transform", "ids"), usual_and_rest(usual, itertools.product(transforms, CONSTANT)))


RAW_OF_SCALE = {"jit": jax.jit, "vmap": lambda f: jax.jit(jax.vmap(f)), "remat": jax.checkpoint}


@with_constant_ids(RAW_OF_SCALE)
def test_constant_ids_in_a_raw_transform_store_nothing(transform, ids):
    embedding = layer()
    scale = jnp.ones(3)
    out = RAW_OF_SCALE[transform](lambda scale: jnp.sum(embedding(CONSTANT[ids])) * scale)(scale)
    np.testing.assert_allclose(out, np.full(3, clipped()[IDS].sum()), rtol=1e-6)  # float32
    assert_stored(embedding, [])


BRAINSTATE = {
    "jit": lambda f: lambda x: brainstate.transform.jit(f)(x),
    "embax.jit": lambda f: lambda x: embax.brainstate.jit(f)(x),
    "for_loop": lambda f: lambda x: brainstate.transform.for_loop(f, x),
    "grad": lambda f: brainstate.transform.grad(lambda x: f(x).sum()),
    "vmap": brainstate.transform.vmap,
}


@with_constant_ids(BRAINSTATE)
def test_constant_ids_under_brainstate_are_stored(transform, ids):
    embedding = layer()
    BRAINSTATE[transform](lambda scale: jnp.sum(embedding(CONSTANT[ids])) * scale)(jnp.ones(3))
    assert_stored(embedding, TOUCHED)


def test_renormalize_stores_by_hand():
    embedding = layer(write_back=False)
    embedding.renormalize([0, 2, -1])
    assert_stored(embedding, TOUCHED)


def test_renormalize_in_a_raw_transform_is_refused():
    with pytest.raises(brainstate.TraceContextError, match="brainstate"):
        jax.jit(layer().renormalize)(jnp.asarray(IDS))


def test_renormalize_without_max_norm_still_checks_ids():
    embedding = embax.Embedding(6, 2)
    before = embedding.weight.value
    embedding.renormalize([1])
    assert embedding.weight.value is before
    with pytest.raises(IndexError, match=r"got 6 at position \(0,\)"):
        embedding.renormalize([6])


def test_two_calls_in_one_loss_both_reach_the_gradient():
    embedding = layer()
    gradient = brainstate.transform.grad(lambda: (embedding([0, 1]) + embedding([0, 2])).sum(), embedding.weight)()
    np.testing.assert_array_equal(gradient[:, 0], [2, 1, 1, 0, 0, 0])
    assert_stored(embedding, [0, 1, 2])


def test_fake_state_is_written_eagerly_only():
    embedding = layer(param_type=brainstate.FakeState)
    brainstate.transform.jit(embedding)(IDS)
    assert_stored(embedding, [])
    embedding(IDS)
    assert_stored(embedding, TOUCHED)


def test_layer_made_inside_a_raw_transform_works_there():
    rows = jax.jit(lambda ids: layer()(ids))(jnp.asarray(IDS))
    np.testing.assert_allclose(rows, clipped()[IDS], rtol=2e-7)  # float32


def test_vmap_over_tables_of_their_own_stores_each_lane():
    embedding = layer()
    embedding.weight.value = jnp.stack([WEIGHT, WEIGHT])
    lanes = {0: embedding.weight}
    brainstate.transform.vmap(embedding, in_states=lanes, out_states=lanes)(np.array([[0, 1], [5, 5]]))
    expected = np.stack([WEIGHT, WEIGHT])
    expected[0, [0, 1]], expected[1, 5] = clipped()[[0, 1]], clipped()[5]
    np.testing.assert_allclose(embedding.weight.value, expected, rtol=2e-7)  # float32


def test_bad_ids_store_nothing():
    embedding = layer()
    rows = brainstate.transform.jit(embedding)(jnp.array([6, -7]))
    assert np.isnan(rows).all()
    assert_stored(embedding, [])


def test_padding_row_is_never_stored_clipped():
    embedding = embax.Embedding.from_pretrained(WEIGHT, padding_idx=5, max_norm=1.0, freeze=False)
    brainstate.transform.jit(embedding)(IDS)
    assert_stored(embedding, [0, 2])


def test_stored_norm_stays_bounded_in_training():
    embedding = layer()

    @embax.brainstate.jit
    def step(ids):
        gradient = brainstate.transform.grad(lambda: -embedding(ids).sum(), embedding.weight)()
        embedding.weight.value -= 0.1 * gradient

    for _ in range(50):
        step(IDS)
    embedding(IDS)
    assert np.linalg.norm(embedding.weight.value[np.array(TOUCHED)], axis=1).max() <= 1 + 1e-6  # float32
