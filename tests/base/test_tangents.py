"""with_tangent: a value, and a derivative of any order that is said apart from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from embax._base.tangents import straight_through, with_tangent

X = np.array([0.5, 2.0, 3.0], np.float32)


def clipped(x):
    """Numbers clipped to 1, through which the gradient passes."""
    return straight_through(jnp.minimum(jax.lax.stop_gradient(x), 1.0), x)


def product(x, y):
    """`sin(x) * y`, of which only the tangent is said to be `2 * (y * dx + x * dy)`."""
    value = jax.lax.stop_gradient(jnp.sin(x) * y)
    return with_tangent(lambda of_x, of_y, x, y: 2 * (of_x * y + of_y * x), value, [x, y], [x, y])


@jax.jit
def results():
    def squares(x):
        return (clipped(x) ** 2).sum()

    def cubes(x):
        step = lambda sum_, k: (sum_ + k * (clipped(x) ** 3).sum(), None)  # noqa: E731
        return jax.lax.scan(step, 0.0, jnp.array([1.0, 2.0]))[0]

    def derivatives(x, y):
        in_all = jax.jacobian(lambda x: product(x, y), 0)(x), jax.jacfwd(lambda y: product(x, y), 0)(y)
        return *in_all, jax.hessian(product, (0, 1))(x, y)

    def lanes(numbers):
        """The value differs from lane to lane, and what it has its tangent from does not; or the other way round."""

        def of_value(x):
            return jax.vmap(lambda n: straight_through(jax.lax.stop_gradient(n * x), x) ** 2)(numbers).sum()

        def of_source(numbers):
            return jax.vmap(lambda n: straight_through(jnp.float32(3.0), n) * n)(numbers)

        return jax.grad(of_value)(2.0), jax.grad(lambda n: of_source(n).sum())(numbers)

    along = jnp.ones_like(X)
    return {
        "value": clipped(X),
        "gradient": jax.grad(squares)(X),
        "hessian": jax.hessian(squares)(X),
        "hessian of a scan": jax.jvp(jax.grad(cubes), (X,), (along,))[1],
        "product": jax.vmap(derivatives, (0, None))(X, 0.25),
        "lanes": lanes(X),
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("value", np.minimum(X, 1)),
        ("gradient", 2 * np.minimum(X, 1)),
        ("hessian", 2 * np.eye(3)),
        ("hessian of a scan", 3 * 6 * np.minimum(X, 1)),
        ("product", (0.5 * np.ones(3), 2 * X, ((np.zeros(3), 2 * np.ones(3)), (2 * np.ones(3), np.zeros(3))))),
        ("lanes", (2 * 2.0 * X.sum(), X + 3)),
    ],
    ids=str,
)
def test_tangents_equal_those_of_the_plain_function(name, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), results()[name], expected)


def test_value_adds_no_operation_to_the_program():
    lowered = jax.jit(clipped).lower(X)
    assert "minimum" in lowered.as_text()
    assert len(jax.make_jaxpr(clipped)(X).eqns) == 3
    assert clipped(jnp.asarray(X)).shape == (3,)


def test_lanes_stay_on_the_devices_that_they_are_split_over():
    """A tangent that is computed by a `shard_map` inside of `jax.vmap(spmd_axis_name=...)`."""
    mesh = jax.make_mesh((2, 2), ("lanes", "x"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec("x")

    def of_devices(tangent):
        return jax.shard_map(lambda tangent: 2 * tangent, mesh=mesh, in_specs=spec, out_specs=spec)(tangent)

    def function(x):
        return with_tangent(of_devices, jax.lax.stop_gradient(x), [x])

    def derivative(x):
        # The lanes come first, as in the gradient of a batch of losses.
        return jax.jvp(jax.vmap(function, spmd_axis_name="lanes"), (x,), (x,))[1]

    x = np.ones((4, 2), np.float32)
    np.testing.assert_allclose(jax.jit(derivative)(x), 2 * x)
    (sharded,) = [eqn for eqn in jax.make_jaxpr(derivative)(x).eqns if eqn.primitive.name == "shard_map"]
    assert sharded.params["in_specs"] == (jax.sharding.PartitionSpec("lanes", "x"),)


def test_tangent_varies_over_the_same_mesh_axes_as_the_value():
    """A value of each device, which has its tangent from an array that all devices share."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    shared, split = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("x")

    def of_device(x, numbers):
        return jax.lax.psum(straight_through(jax.lax.stop_gradient(numbers[0] * x), x) ** 2, "x")

    loss = jax.shard_map(of_device, mesh=mesh, in_specs=(shared, split), out_specs=shared)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(3.0, X[:2]), 2 * 3.0 * X[:2].sum(), rtol=1e-6)
