"""What lift refuses, and why: what mixes rows or gathers steps, and gradients that do not fit. And what it accepts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib
from optim_steps import take_step

from embax import RowGrad, Table
from embax.optim import lift

ROWS, DIM = 23, 3

warmup = optax.linear_schedule(0.0, 1.0, 100)

MIXES_ROWS = {
    "sm3": lambda: optax.sm3(0.1),
    "dog": lambda: optax.contrib.dog(0.1),
    "dowg": lambda: optax.contrib.dowg(0.1),
    "dadapt_adamw": lambda: optax.contrib.dadapt_adamw(0.1),
    "prodigy": lambda: optax.contrib.prodigy(0.1),
    "mechanize": lambda: optax.contrib.mechanize(optax.sgd(0.1)),
    "adafactor": lambda: optax.adafactor(0.1),
    "adafactor_unfactored": lambda: optax.adafactor(0.1, factored=False),
    "lamb": lambda: optax.lamb(0.1),
    "lars": lambda: optax.lars(0.1),
    "fromage": lambda: optax.fromage(0.1),
    "trust_ratio": lambda: optax.chain(optax.scale_by_trust_ratio(), optax.sgd(0.1)),
    "param_block_rms": lambda: optax.scale_by_param_block_rms(),
    "adaptive_grad_clip": lambda: optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(0.1)),
    "clip_by_block_rms": lambda: optax.chain(optax.clip_by_block_rms(0.01), optax.sgd(0.1)),
    "clip_after_adam": lambda: optax.chain(optax.scale_by_adam(), optax.clip_by_global_norm(0.5)),
    "noisy_sgd": lambda: optax.noisy_sgd(0.1, key=0),
    "add_noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, key=0), optax.sgd(0.1)),
    "muon": lambda: contrib.muon(0.1),
    "lbfgs": lambda: optax.lbfgs(linesearch=None),
    "flatten": lambda: optax.flatten(optax.adam(0.1)),
    "lamb_warmup": lambda: optax.lamb(warmup),
    "lars_warmup": lambda: optax.lars(warmup),
    "block_rms_warmup": lambda: optax.chain(optax.clip_by_block_rms(0.01), optax.sgd(warmup)),
    "lamb_cosine": lambda: optax.lamb(optax.warmup_cosine_decay_schedule(0.0, 1.0, 10, 1_000)),
    "lamb_late": lambda: optax.lamb(optax.linear_schedule(0.0, 1.0, 100, transition_begin=1_000)),
    "block_rms_of_large_gradients": lambda: optax.chain(optax.clip_by_block_rms(100.0), optax.sgd(0.1)),
    "inside_multi_transform": lambda: optax.multi_transform({"a": optax.lamb(0.1)}, "a"),
    "inside_apply_if_finite": lambda: optax.apply_if_finite(optax.lars(0.1), 3),
    "inside_inject": lambda: optax.inject_hyperparams(optax.lamb)(learning_rate=0.1),
}

# These are refused for the reason of another one, by the same state or the same norm.
LIKE_ANOTHER = {"lars", "lars_warmup", "block_rms_warmup", "param_block_rms", "dowg", "prodigy", "noisy_sgd", "fromage"}
LIKE_ANOTHER |= {"trust_ratio", "inside_multi_transform", "inside_inject", "lamb_warmup"}

GATHERS_STEPS = {
    "SAM": lambda: optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1)),
    "MultiSteps": lambda: optax.MultiSteps(optax.sgd(0.1), 4),
    "MultiSteps_transformation": lambda: optax.MultiSteps(optax.sgd(0.1), 4).gradient_transformation(),
    "MultiSteps_in_chain": lambda: optax.chain(
        optax.clip(1.0), optax.MultiSteps(optax.adam(0.1), 4).gradient_transformation()
    ),
    "ApplyEvery": lambda: optax.chain(optax.apply_every(4), optax.sgd(0.1)),
    "ApplyEvery_masked": lambda: optax.masked(optax.apply_every(4), True),
}

# Unusual transformations that treat rows one by one.
ACCEPTED = {
    "sgd": lambda: optax.sgd(0.1),
    "adabelief": lambda: optax.adabelief(0.01),
    "adadelta": lambda: optax.adadelta(1.0),
    "adagrad": lambda: optax.adagrad(0.1),
    "adam": lambda: optax.adam(0.01),
    "adamw": lambda: optax.adamw(0.01),
    "adan": lambda: optax.adan(0.01),
    "lion": lambda: optax.lion(0.01),
    "novograd": lambda: optax.novograd(0.01),
    "optimistic": lambda: optax.optimistic_gradient_descent(0.1),
    "radam": lambda: optax.radam(0.01),
    "rmsprop": lambda: optax.rmsprop(0.01, centered=True, momentum=0.9),
    "rprop": lambda: optax.rprop(0.01),
    "sign_sgd": lambda: optax.sign_sgd(0.01),
    "yogi": lambda: optax.yogi(0.01),
    "ademamix": lambda: contrib.ademamix(0.01),
    "adopt": lambda: contrib.adopt(0.01),
    "cocob": lambda: contrib.cocob(0.1),
    "schedule_free_adamw": lambda: contrib.schedule_free_adamw(0.01),
    "normalize": lambda: optax.chain(contrib.normalize(), optax.sgd(0.1)),
    "centralize": lambda: optax.chain(optax.centralize(), optax.sgd(0.1)),
    "ema": lambda: optax.chain(optax.ema(0.9), optax.sgd(0.1)),
    "zero_nans": lambda: optax.chain(optax.zero_nans(), optax.sgd(0.1)),
    "not_negative": lambda: optax.chain(optax.sgd(0.1), optax.keep_params_nonnegative()),
    "decay": lambda: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1)),
    "masked": lambda: optax.masked(optax.adam(0.01), {"table": True, "bias": False}),
    "masked_by_axes": lambda: optax.adamw(0.01, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    "named_chain": lambda: optax.named_chain(("a", optax.scale_by_adam()), ("b", optax.scale(-0.01))),
    "inject": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=warmup),
    "factored_rms_narrow": lambda: optax.chain(optax.scale_by_factored_rms(), optax.sgd(0.1)),
    "global_norm": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.01)),
    "normalize_by_update_norm": lambda: optax.chain(optax.normalize_by_update_norm(), optax.sgd(0.1)),
    "stateless": lambda: optax.stateless_with_tree_map(lambda g, p: -0.1 * g * jnp.abs(p)),
}


# These treat rows like another one, or are compared with dense training elsewhere.
ACCEPTED_LIKE_ANOTHER = {"sgd", "adagrad", "adamw", "lion", "adabelief", "yogi", "decay", "inject", "global_norm"}
ACCEPTED_LIKE_ANOTHER |= {"adadelta", "adan", "ademamix", "rmsprop", "optimistic", "ema", "named_chain", "sign_sgd"}
ACCEPTED_LIKE_ANOTHER |= {"masked_by_axes", "not_negative", "adopt", "radam"}

pytestmark = pytest.mark.usefixtures("users_promotion")


def weight(rows=ROWS, dim=DIM, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=pytest.mark.exhaustive if x in LIKE_ANOTHER else ()) for x in MIXES_ROWS],
)
def test_init_refuses_row_mixing_transformations(name):
    tx = lift(MIXES_ROWS[name]())
    with pytest.raises(
        ValueError, match=r"lift\(tx=...\)` must treat each row of a table by itself.* cannot be lifted"
    ):
        jax.eval_shape(tx.init, {"table": Table(weight())})


def test_init_refuses_row_mixing_transformations_without_jit():
    with pytest.raises(ValueError, match="must treat each row of a table by itself"):
        lift(optax.lamb(0.1)).init({"table": Table(weight())})


def test_factored_moments_are_refused_for_wide_rows():
    tx = lift(optax.scale_by_factored_rms(min_dim_size_to_factor=DIM + 1))
    jax.eval_shape(tx.init, {"table": Table(weight(200, DIM))})
    with pytest.raises(ValueError, match="must treat each row of a table by itself"):
        jax.eval_shape(tx.init, {"table": Table(weight(200, DIM + 1))})


def test_lift_accepts_row_mixing_transformations_without_trained_tables():
    params = {"frozen": Table(weight(), freeze=True), "bias": np.ones(3, np.float32)}
    of = {"bias": np.full(3, 0.1, np.float32)}

    @jax.jit
    def biases(params, of):
        out, of_frozen = {}, RowGrad([], np.zeros((0, DIM), np.float32), rows=ROWS)
        for name in ("adafactor", "lamb", "clip_by_block_rms", "noisy_sgd"):
            tx, plain, bias = lift(MIXES_ROWS[name]()), MIXES_ROWS[name](), {"bias": params["bias"]}
            updates, _ = tx.update({"frozen": of_frozen, **of}, tx.init(params), params)
            out[name] = updates["bias"], plain.update(of, plain.init(bias), bias)[0]["bias"]
        return out

    for name, (ours, expected) in biases(params, of).items():
        np.testing.assert_allclose(ours, expected, rtol=1e-6, err_msg=name)  # float32


@pytest.mark.parametrize("name", GATHERS_STEPS)
def test_lift_refuses_transformations_that_gather_steps(name):
    named = name.split("_")[0]
    with pytest.raises(ValueError, match=rf"must act on the rows of each step, got optax.{named}, which gathers"):
        lift(GATHERS_STEPS[name]()).init({"table": Table(weight())})


@pytest.mark.parametrize("tx", [None, 0.1, "adam", optax.adam, (), {}], ids=lambda x: type(x).__name__)
def test_lift_refuses_other_objects(tx):
    with pytest.raises(TypeError, match=r"lift\(tx=...\)` must be an optax.GradientTransformation, got"):
        lift(tx)


def test_update_needs_the_parameters():
    tx = lift(optax.sgd(0.1))
    of = {"table": RowGrad([1], np.ones((1, DIM), np.float32), rows=ROWS)}
    with pytest.raises(ValueError, match=r"update\(params=...\)` must be given, got None"):
        tx.update(of, tx.init({"table": Table(weight())}))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (RowGrad([1], jnp.ones((1, DIM)), rows=ROWS + 1), ValueError, r"must fit the table .*23,3.*of 24 rows"),
        (RowGrad([1], jnp.ones((1, DIM + 1)), rows=ROWS), ValueError, r"must fit the table .*23,3.*1,4"),
        (RowGrad([1], jnp.ones((1, DIM, 1)), rows=ROWS), ValueError, "must fit the table"),
        (Table(jnp.ones((ROWS + 1, DIM))), ValueError, r"must fit the table .*23,3.*24,3"),
        (jnp.ones((ROWS, DIM)), TypeError, "must have a RowGrad or a Table .*, got ArrayImpl"),
        (jnp.ones(()), TypeError, "must have a RowGrad or a Table"),
        (None, TypeError, "must have a RowGrad or a Table .*, got NoneType"),
    ],
    ids=["rows", "dim", "axes", "dense", "array", "scalar", "none"],
)
@pytest.mark.parametrize("freeze", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("make", [optax.sgd, optax.adam])
def test_a_gradient_that_does_not_fit_its_table_is_refused(wrong, error, message, freeze, make):
    tx = lift(make(0.1))
    params = {"table": Table(weight(), freeze=freeze), "bias": jnp.ones(2)}
    with pytest.raises(error, match=message):
        tx.update({"table": wrong, "bias": jnp.ones(2)}, tx.init(params), params)


@pytest.mark.parametrize("change", ["missing", "more", "list"])
def test_a_gradient_of_another_structure_is_refused(change):
    tx = lift(optax.adam(0.1))
    params = {"table": Table(weight()), "bias": jnp.ones(2)}
    of_table = RowGrad([1], jnp.ones((1, DIM)), rows=ROWS)
    of = {
        "missing": {"table": of_table},
        "more": {"table": of_table, "bias": jnp.ones(2), "other": jnp.ones(2)},
        "list": [of_table, jnp.ones(2)],
    }[change]
    with pytest.raises(ValueError, match=r"[Dd]ict|list"):
        tx.update(of, tx.init(params), params)


@pytest.mark.parametrize("name", sorted(ACCEPTED_LIKE_ANOTHER))
def test_lift_accepts_row_by_row_transformations(name):
    jax.eval_shape(lift(ACCEPTED[name]()).init, {"table": Table(weight()), "bias": np.ones(2, np.float32)})


@functools.cache
def trained_on_all_rows(names):
    """The parameters after 5 steps that read all rows: those of the lifted transformations, and of the plain ones."""
    lifted, plain = ({name: ACCEPTED[name]() for name in names} for _ in range(2))
    lifted = {name: lift(tx) for name, tx in lifted.items()}

    @jax.jit
    def start(ours, theirs):
        states = {name: tx.init(ours) for name, tx in lifted.items()}
        plain_states = {name: tx.init(theirs) for name, tx in plain.items()}
        return {name: (ours, state, theirs, plain_states[name]) for name, state in states.items()}

    @jax.jit
    def step(carry, of_table, of_bias):
        out = {}
        for name, (ours, state, theirs, plain_state) in carry.items():
            ours, state = take_step(lifted[name], ours, state, {"table": of_table, "bias": of_bias})
            of = {"table": of_table.to_dense(), "bias": of_bias}
            updates, plain_state = plain[name].update(of, plain_state, theirs)
            out[name] = ours, state, optax.apply_updates(theirs, updates), plain_state
        return out

    carry = start(*({"table": table, "bias": np.ones(2, np.float32)} for table in (Table(weight()), weight())))
    for i in range(5):
        rng = np.random.default_rng(i)
        ids = np.concatenate([rng.permutation(ROWS), rng.integers(0, ROWS, ROWS)])
        of_table = RowGrad(ids, rng.normal(size=(2 * ROWS, DIM)).astype(np.float32), rows=ROWS)
        carry = step(carry, of_table, rng.normal(size=2).astype(np.float32))
    return {name: (ours, theirs) for name, (ours, _, theirs, _) in carry.items()}


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=pytest.mark.exhaustive if x in ACCEPTED_LIKE_ANOTHER else ()) for x in ACCEPTED],
)
def test_row_by_row_transformations_equal_dense_training_if_all_rows_are_read(name):
    together = [x for x in ACCEPTED if (x in ACCEPTED_LIKE_ANOTHER) == (name in ACCEPTED_LIKE_ANOTHER)]
    ours, theirs = trained_on_all_rows(tuple(together))[name]
    assert np.abs(theirs["table"] - weight()).max() > 1e-4
    np.testing.assert_allclose(ours["table"].weight, theirs["table"], rtol=1e-4, atol=1e-5)  # float32
    np.testing.assert_allclose(ours["bias"], theirs["bias"], rtol=1e-4, atol=1e-5)  # float32


def test_a_loss_that_is_asked_for_is_passed_on():
    tx = lift(optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau(patience=1, factor=0.5)))
    params, update = {"table": Table(weight())}, jax.jit(tx.update)
    state, moves = jax.jit(tx.init)(params), []
    for _ in range(4):
        gradient = {"table": RowGrad([1], np.ones((1, DIM), np.float32), rows=ROWS)}
        updates, state = update(gradient, state, params, value=np.float32(1))
        moves.append(np.abs(updates["table"].values).max())
    assert moves[-1] < 0.6 * moves[0]
