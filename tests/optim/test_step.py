"""One call for a step: the same as update and apply_updates, by one kernel where there is one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from kernels_used import in_program

import embax
from embax import optim
from embax._kernels.library import has

RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.normal(size=(40, 6)).astype(np.float32)
BATCHES = RANDOM.integers(0, 40, (50, 24)).astype(np.int32)
RATE = optax.linear_schedule(0.05, 0.01, 20)

OPTIMIZERS = {
    "sgd": lambda **rules: optim.sgd(0.05, **rules),
    "adagrad": lambda **rules: optim.adagrad(0.05, **rules),
    "adam": lambda **rules: optim.adam(RATE, **rules),
    "rowwise_adagrad": lambda **rules: optim.rowwise_adagrad(RATE, **rules),
    "rowwise_adam": lambda **rules: optim.rowwise_adam(0.05, **rules),
}
# optax's optimizers of the same names.
OF_OPTAX = {
    "sgd": optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.05)),
    "adagrad": optax.chain(optax.scale_by_rss(0.1, 1e-7), optax.add_decayed_weights(0.1), optax.sgd(0.05)),
    "adam": optax.adamw(RATE, weight_decay=0.1),
}

NARROW = {"bfloat16": tuple(OPTIMIZERS), "float16": ("sgd", "rowwise_adagrad")}


@pytest.fixture(autouse=True)
def _as_optax_needs_it():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def params_of(dtype="float32", **rules):
    return {"table": embax.Table(WEIGHT.astype(jnp.dtype(dtype)), padding_idx=3, **rules), "scale": jnp.ones(6)}


def loss(params, ids):
    return ((embax.lookup(params["table"], ids).astype(jnp.float32) * params["scale"] - 1) ** 2).sum() / 10


@jax.jit  # so that it is traced once for all optimizers
def gradient_of(params, ids):
    return embax.grad(loss)(params, ids)


def by_step(tx, params, state, ids):
    return optim.step(tx, gradient_of(params, ids), state, params)


def by_two_calls(tx, params, state, ids):
    updates, state = tx.update(gradient_of(params, ids), state, params)
    return embax.apply_updates(params, updates), state


def run(how, txs, params, batches):
    """The parameters and the state of each optimizer after a step for each batch, all by one program."""

    @jax.jit
    def all_steps(params, batches):
        def one(of_all, ids):
            return {name: how(txs[name], *of_one, ids) for name, of_one in of_all.items()}, None

        return jax.lax.scan(one, {name: (params, tx.init(params)) for name, tx in txs.items()}, batches)[0]

    return all_steps(params, batches)


def all_with(names=tuple(OPTIMIZERS), **rules):
    return {name: OPTIMIZERS[name](**rules) for name in names}


@functools.cache
def three_steps(how):
    """Of each optimizer without decay and with it."""
    txs = {f"{name} {decay}": tx for decay in (0.0, 0.1) for name, tx in all_with(weight_decay=decay).items()}
    return run(how, txs, params_of(), BATCHES[:3])


@functools.cache
def fifty_steps(how, dtype):
    params = params_of(dtype)
    params["scale"] = params["scale"].astype(dtype)
    return run(how, all_with(weight_decay=0.01), params, BATCHES)


@functools.cache
def one_step_of_narrow_tables(how, dtype):
    """Of float16, by the optimizers whose `eps` is not zero in it."""
    return run(how, all_with(NARROW[dtype]), params_of(dtype), BATCHES[:1])


@functools.cache
def three_steps_of_optax():
    return run(by_two_calls, {name: optim.lift(tx) for name, tx in OF_OPTAX.items()}, params_of(), BATCHES[:3])


def close(found, expected, ulp):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        if jnp.issubdtype(one.dtype, jnp.floating):
            scale = np.max(np.abs(np.asarray(other, np.float64)), initial=1e-3)
            off = np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64))
            assert np.max(off, initial=0) <= ulp * jnp.finfo(one.dtype).eps * scale
        else:
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_equals_update_and_apply_updates(name, decay):
    found, expected = (three_steps(how)[f"{name} {decay}"] for how in (by_step, by_two_calls))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    close(found, expected, 30)
    table = found[0]["table"].weight
    np.testing.assert_array_equal(table[3], WEIGHT[3])
    untouched = np.setdiff1d(np.arange(40), BATCHES[:3])
    assert untouched.size
    np.testing.assert_array_equal(table[untouched], WEIGHT[untouched])


@pytest.mark.parametrize("name", OF_OPTAX)
def test_optimizers_equal_optax(name):
    close(three_steps(by_step)[f"{name} 0.1"][0], three_steps_of_optax()[name][0], 30)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fifty_steps_are_as_exact_as_update_and_apply_updates(name):
    def weight(how, dtype):
        return np.asarray(fifty_steps(how, dtype)[name][0]["table"].weight, np.float64)

    with jax.enable_x64(True):
        exact = weight(by_two_calls, "float64")

    def error(how):
        return np.sqrt(np.mean((weight(how, "float32") - exact) ** 2))

    assert error(by_step) <= 1.2 * error(by_two_calls) + 1e-9


@pytest.mark.parametrize(("name", "dtype"), [(name, dtype) for dtype, names in NARROW.items() for name in names])
def test_a_step_of_a_narrow_table(name, dtype):
    found, expected = (one_step_of_narrow_tables(how, dtype)[name] for how in (by_step, by_two_calls))
    close(found[0]["table"], expected[0]["table"], 4)


@pytest.mark.skipif(not has("step_adam"), reason="kernels are not installed, or switched off")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_one_kernel_behind_the_lookup(name):
    tx = OPTIMIZERS[name](weight_decay=0.1)
    params = params_of()
    kernels = in_program(functools.partial(by_step, tx), params, tx.init(params), BATCHES[0])
    assert kernels == ["take", f"step_{name}"]


def sum_of_reads(params, ids):
    rows, bags = embax.lookup(params["rows"], ids), embax.embedding_bag(params["bags"], ids.reshape(6, 4), mode="mean")
    return ((rows - 1) ** 2).sum() + (bags**3).sum()


def test_a_step_for_ids_that_count_from_the_end_equals_one_for_row_numbers():
    """Also where ids have no row, and in one program with the gradient or in one behind it."""
    params = {name: embax.Table(jnp.asarray(WEIGHT), out_of_range="zero") for name in ("rows", "bags")}
    numbers = np.stack([BATCHES[0], BATCHES[1]])
    numbers[:, 5], ids = 40, np.where(numbers % 3, numbers, numbers - 40)
    ids[:, 5:7], numbers[:, 6] = (77, -41), 40

    def by_one_program(tx, params, state, ids):
        return optim.step(tx, embax.grad(sum_of_reads)(params, ids), state, params)

    def behind_a_program(tx, params, state, ids):
        return optim.step(tx, jax.jit(embax.grad(sum_of_reads))(params, ids), state, params)

    found, behind, expected = (
        run(how, all_with(), params, batches)
        for how, batches in ((by_one_program, ids), (behind_a_program, ids), (by_one_program, numbers))
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    jax.tree.map(np.testing.assert_array_equal, behind, expected)
    table = found["adam"][0]["rows"].weight
    untouched = np.setdiff1d(np.arange(40), numbers)
    assert untouched.size
    np.testing.assert_array_equal(table[untouched], WEIGHT[untouched])
    assert (np.asarray(table)[np.setdiff1d(numbers, [40])] != WEIGHT[np.setdiff1d(numbers, [40])]).any(1).all()


@pytest.mark.skipif(not has("step_adam"), reason="kernels are not installed, or switched off")
def test_the_program_of_a_step_leaves_ids_to_the_kernels():
    tx, params = optim.adagrad(0.1), {name: embax.Table(jnp.asarray(WEIGHT)) for name in ("rows", "bags")}

    def train(params, state, ids):
        return optim.step(tx, embax.grad(sum_of_reads)(params, ids), state, params)

    compiled = jax.jit(train, donate_argnums=(0, 1)).lower(params, tx.init(params), BATCHES[0]).compile()
    text = compiled.as_text()
    made = set(re.findall(r"= s32\[\d[^ ]* (\w+)\(", text))
    assert made <= {"parameter", "bitcast", "constant"}


@pytest.mark.skipif(not has("step_adam"), reason="kernels are not installed, or switched off")
@pytest.mark.parametrize("dim", [(16,), (2, 8)], ids=str)
def test_a_donated_step_copies_no_table(dim):
    tx, rows = optim.adam(0.1), 100_000
    table = embax.Table(jnp.zeros((rows, *dim)))

    def train(table, state, batches):
        def one(carry, ids):
            table, state = carry
            gradient = embax.grad(lambda table: (embax.lookup(table, ids) ** 2).sum())(table)
            return optim.step(tx, gradient, state, table), None

        return jax.lax.scan(one, (table, state), batches)[0]

    batches = jax.ShapeDtypeStruct((3, 256), np.int32)
    compiled = jax.jit(train, donate_argnums=(0, 1)).lower(table, tx.init(table), batches).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 20 * 256 * 16 * 4


def test_step_falls_back_to_two_calls_for_other_transformations():
    tx = optax.chain(optim.clip_by_global_norm(0.1), optim.sgd(0.05))
    found, expected = (run(how, {"": tx}, params_of(), BATCHES[:2]) for how in (by_step, by_two_calls))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("name", ["sgd", "rowwise_adam"])
def test_tables_that_are_not_trained_by_rows(name):
    """A frozen one, one of integers, one with a dense gradient, one that is None, and an array that is read as one."""
    tx = OPTIMIZERS[name](tables=lambda path, leaf: "chosen" in jax.tree_util.keystr(path))
    params = {
        "frozen": embax.Table(jnp.asarray(WEIGHT), freeze=True),
        "dense": embax.Table(jnp.asarray(WEIGHT)),
        "none": None,
        "chosen": jnp.asarray(WEIGHT),
        "rows": embax.Table(jnp.asarray(WEIGHT)),
    }
    rows = embax.RowGrad([1, 5], jnp.ones((2, 6)), rows=40)
    gradients = {
        "frozen": embax.RowGrad([2], jnp.ones((1, 6)), rows=40),
        "dense": embax.Table(jnp.ones((40, 6))),
        "none": None,
        "chosen": rows,
        "rows": rows,
    }

    def two_calls(params, state):
        updates, state = tx.update(gradients, state, params)
        return embax.apply_updates(params, updates), state

    state = tx.init(params)
    expected = jax.jit(two_calls)(params, state)
    found = jax.jit(lambda params, state: optim.step(tx, gradients, state, params))(params, state)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    close(found, expected, 8)


def test_step_equals_update_and_apply_updates_without_jit():
    tx, params = optim.adagrad(0.1), params_of()
    found, expected = (how(tx, params, tx.init(params), BATCHES[0]) for how in (by_step, by_two_calls))
    close(found, expected, 8)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_negative_decay_is_refused(name):
    with pytest.raises(ValueError, match=rf"embax.optim.{name}\(weight_decay=...\)` must be"):
        OPTIMIZERS[name](weight_decay=-0.1)


def test_an_argument_out_of_range_is_refused():
    for make, name in (
        (lambda: optim.adagrad(0.1, initial_accumulator=-1), "adagrad(initial_accumulator"),
        (lambda: optim.adagrad(0.1, eps=-1), "adagrad(eps"),
        (lambda: optim.adam(0.1, eps=-1), "adam(eps"),
        (lambda: optim.adam(0.1, b2=1), "adam(b2"),
    ):
        with pytest.raises(ValueError, match="must be") as caught:
            make()
        assert f"`embax.optim.{name}=...)`" in str(caught.value)
