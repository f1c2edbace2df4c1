"""One test for each known defect of brainstate.nn.Embedding, named after it: the drop-in layer has none of them."""

import warnings

import brainstate
import brainunit
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import embax

WEIGHT = np.arange(1.0, 13.0, dtype=np.float32).reshape(6, 2)


def layer(weight=WEIGHT, **options):
    """A layer of these rows, all of them kept as they are."""
    return embax.Embedding.from_pretrained(weight, freeze=False, **options)


def gradient(embedding, indices, scale=1.0):
    loss = lambda: (scale * embedding(indices)).sum()  # noqa: E731
    return brainstate.transform.jit(brainstate.transform.grad(loss, embedding.weight))()


def norms(embedding):
    return np.linalg.norm(np.asarray(embedding.weight.value, np.float64), axis=1)


@pytest.mark.parametrize("transform", ["jit", "grad", "vmap", "for_loop"])
def test_padding_idx_with_max_norm_under_a_transform(transform):
    embedding = layer(padding_idx=0, max_norm=1.0)
    indices = jnp.array([[0, 1], [2, 0]])
    calls = {
        "jit": brainstate.transform.jit(embedding),
        "grad": lambda ids: brainstate.transform.jit(
            brainstate.transform.grad(lambda: (embedding(ids).sum(), embedding(ids)), embedding.weight, has_aux=True)
        )()[1],
        "vmap": brainstate.transform.vmap(embedding),
        "for_loop": lambda ids: brainstate.transform.for_loop(embedding, ids),
    }
    rows = np.asarray(calls[transform](indices))
    np.testing.assert_array_equal(rows[0, 0], WEIGHT[0])
    np.testing.assert_allclose(np.linalg.norm([rows[0, 1], rows[1, 0]], axis=-1), 1, rtol=2e-7)  # float32


def test_max_norm_under_brainstate_jit_bounds_the_stored_rows_after_50_steps():
    embedding = layer(max_norm=1.0)
    indices = jnp.arange(6)

    @brainstate.transform.jit
    def step():
        embedding.weight.value += 1.0 - gradient(embedding, indices)

    for _ in range(50):
        step()
    brainstate.transform.jit(embedding)(indices)
    assert norms(embedding).max() <= 1 + 1e-6  # float32


def test_max_norm_reads_and_writes_the_touched_rows_only():
    """128 ids: the compiled step's temporary memory is the same for 10^4 and 10^5 rows, and the table is not copied."""

    def memory(rows):
        embedding = embax.Embedding(rows, 64, embedding_init=1.0, max_norm=1.0)
        compiled = embax.brainstate.jit(embedding).lower(jnp.arange(128)).compile()
        return compiled.memory_analysis()

    small, large = memory(10**4), memory(10**5)
    assert small.temp_size_in_bytes == large.temp_size_in_bytes < 128 * 64 * 4 * 8
    assert large.alias_size_in_bytes == 10**5 * 64 * 4  # the table's buffer is the new table's


@pytest.mark.parametrize(
    ("dtype", "row", "rtol"),
    [
        (jnp.bfloat16, [300, 400], 0),  # the nearest bfloat16
        (jnp.float16, [300, 400], 0),  # the nearest float16
        (jnp.float32, [3e8, 4e8], 2e-7),  # float32
        (jnp.float32, [3e30, 4e30], 2e-7),  # float32
    ],
)
def test_max_norm_of_large_rows(dtype, row, rtol):
    embedding = layer(jnp.array([row], dtype), max_norm=1.0)
    expected = np.asarray(jnp.array([0.6, 0.8], dtype))
    np.testing.assert_allclose(embedding(0), expected, rtol=rtol)
    np.testing.assert_allclose(embedding.weight.value[0], expected, rtol=rtol)


def test_id_at_or_above_rows_is_an_error_or_reads_no_row():
    embedding = layer()
    with pytest.raises(IndexError, match=r"in \[-6, 6\), the table having 6 rows, got 6 at position \(1,\)"):
        embedding([0, 6])
    assert np.isnan(brainstate.transform.jit(embedding)(jnp.array(6))).all()
    embedding.out_of_range = "clip"
    np.testing.assert_array_equal(embedding(6), WEIGHT[5])
    np.testing.assert_array_equal(gradient(embedding, 6)[5], [1, 1])  # the row that is read is the row that learns


def test_id_below_minus_rows_is_an_error_or_reads_no_row():
    embedding = layer()
    with pytest.raises(IndexError, match="got -7 at position"):
        embedding([-7])
    assert np.isnan(brainstate.transform.jit(embedding)(jnp.array(-7))).all()
    embedding.out_of_range = "zero"
    np.testing.assert_array_equal(embedding([-7]), [[0, 0]])
    assert not gradient(embedding, [-7]).any()


def test_id_minus_one_is_the_padding_row_at_the_end():
    embedding = layer(padding_idx=5)
    np.testing.assert_array_equal(gradient(embedding, [-1, 4])[4:], [[1, 1], [0, 0]])


def test_int8_ids_into_1000_rows():
    weight = np.arange(1000.0, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(layer(weight)(np.array([127, -1, -128], np.int8))[:, 0], [127, 999, 872])


@pytest.mark.parametrize("index", [np.uint32(2**32 - 1), np.int64(2**32 + 1)])
def test_ids_wider_than_int32_are_out_of_range(index):
    with pytest.raises(IndexError, match=f"got {index}"):
        layer()(index)
    embedding = layer(out_of_range="zero")
    np.testing.assert_array_equal(embedding(index), [0, 0])
    assert not gradient(embedding, index).any()


def test_empty_list_is_an_empty_batch():
    embedding = layer(max_norm=1.0, scale_grad_by_freq=True, padding_idx=0)
    assert embedding([]).shape == (0, 2)
    assert not gradient(embedding, []).any()


def test_zero_rows_are_quiet_and_out_of_range():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embedding = embax.Embedding(0, 2)
        assert embedding([]).shape == (0, 2)
    with pytest.raises(IndexError, match="the table having 0 rows"):
        embedding(0)


@pytest.mark.parametrize("cotangent", [np.nan, np.inf, -np.inf])
def test_padding_row_gets_no_gradient_from_a_cotangent_that_is_not_finite(cotangent):
    embedding = layer(padding_idx=0)
    np.testing.assert_array_equal(gradient(embedding, [0, 0], scale=cotangent), np.zeros((6, 2)))


def test_scale_grad_by_freq_counts_negative_and_bad_ids_rightly():
    embedding = layer(scale_grad_by_freq=True, out_of_range="zero")
    result = gradient(embedding, [5, -1, 0, 6, 6, -7])
    np.testing.assert_array_equal(result[:, 0], [1, 0, 0, 0, 0, 1])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_scale_grad_by_freq_with_70000_duplicates(dtype):
    embedding = layer(jnp.zeros((2, 1), dtype), scale_grad_by_freq=True)
    np.testing.assert_array_equal(gradient(embedding, np.zeros(70_000, np.int32)), [[1], [0]])


def test_4096_gradients_of_one_in_bfloat16():
    embedding = layer(jnp.zeros((2, 1), jnp.bfloat16))
    np.testing.assert_array_equal(gradient(embedding, np.zeros(4096, np.int32)), [[4096], [0]])


def test_forward_mode():
    embedding = layer(padding_idx=0)
    jacobian = brainstate.transform.jit(brainstate.transform.jacfwd(lambda: embedding([0, 1]), embedding.weight))()
    np.testing.assert_array_equal(np.asarray(jacobian).sum((0, 1))[:2], [[0, 0], [1, 1]])
    read = lambda weight: embax.lookup(embax.Table(weight, padding_idx=0), [0, 1])  # noqa: E731
    _, plain = jax.jit(lambda weight: jax.jvp(read, (weight,), (weight / weight,)))(WEIGHT)
    np.testing.assert_array_equal(plain, [[0, 0], [1, 1]])


def test_quantity_table_keeps_its_unit_everywhere():
    weight = WEIGHT * brainunit.mV
    embedding = layer(weight, padding_idx=1, max_norm=5.0)
    rows = embedding([1, 5])
    assert brainunit.get_unit(rows) == brainunit.mV
    np.testing.assert_allclose(rows.mantissa[0], WEIGHT[1])
    np.testing.assert_allclose(np.linalg.norm(rows.mantissa[1]), 5, rtol=2e-7)  # float32
    stored = embedding.weight.value
    assert brainunit.get_unit(stored) == brainunit.mV
    np.testing.assert_allclose(np.linalg.norm(stored.mantissa[5]), 5, rtol=2e-7)  # float32
    result = gradient(embedding, [0, 1], scale=1 / brainunit.mV)
    np.testing.assert_array_equal(brainunit.get_mantissa(result)[:2], [[1, 1], [0, 0]])


def test_embedding_init_of_every_kind_and_shape():
    for init in (WEIGHT, jnp.asarray(WEIGHT), WEIGHT.tolist()):
        value = embax.Embedding(6, 2, embedding_init=init).weight.value
        assert isinstance(value, jax.Array)
        assert value.dtype == jnp.float32
        np.testing.assert_array_equal(value, WEIGHT)
    np.testing.assert_array_equal(embax.Embedding(3, 2, embedding_init=0.5).weight.value, np.full((3, 2), 0.5))
    with pytest.raises(ValueError, match=r"broadcasts to \(5, 2\), got \(6, 2\)"):
        embax.Embedding(5, 2, embedding_init=WEIGHT)
    with pytest.raises(ValueError, match="must be an initialiser or an array, got None"):
        embax.Embedding(5, 2, embedding_init=None)


def test_attributes_changed_after_construction_are_honoured():
    embedding = layer()
    embedding.padding_idx = 3
    np.testing.assert_array_equal(gradient(embedding, [2, 3])[2:4], [[1, 1], [0, 0]])
    embedding.scale_grad_by_freq = True
    np.testing.assert_array_equal(gradient(embedding, [2, 2])[2], [1, 1])
    embedding.max_norm, embedding.norm_type = 1.0, 1.0
    np.testing.assert_allclose(np.abs(embedding(5)).sum(), 1, rtol=2e-7)  # float32
    embedding.out_of_range = "nan"
    assert np.isnan(embedding(6)).all()
    embedding.freeze = True
    assert not gradient(embedding, [2]).any()


def test_adamw_leaves_a_padding_row_of_zeros():
    """The layer's own part: gradient and start are exactly zero, so that nothing moves the row, decay included."""
    embedding = embax.Embedding(6, 2, padding_idx=0)
    optimizer = optax.adamw(0.1, weight_decay=0.1)

    @brainstate.transform.jit
    def train():
        state = optimizer.init(embedding.weight.value)
        for _ in range(3):
            updates, state = optimizer.update(gradient(embedding, [0, 1]), state, embedding.weight.value)
            embedding.weight.value = optax.apply_updates(embedding.weight.value, updates)

    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        train()
    np.testing.assert_array_equal(embedding.weight.value[0], [0, 0])


def test_repr_is_clean():
    text = repr(layer(padding_idx=0))
    assert "0x" not in text
    assert "padding_idx=0" in text
