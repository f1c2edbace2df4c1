"""jit: compile a brainstate program, and donate the states that it writes."""

import functools
from collections import Counter
from collections.abc import Callable, Iterable

import brainstate
import jax
from jaxtyping import PyTree


def jit(
    fun: Callable[..., PyTree] | None = None,
    *,
    static_argnums: int | Iterable[int] = (),
    static_argnames: str | Iterable[str] = (),
) -> Callable[..., PyTree]:
    """Compile a function that reads and writes brainstate states, and update the states in place.

    Like `brainstate.transform.jit`, except that the buffers of written states are donated: writing a few rows of a
    table does not copy the table. As usual with donation, an array that you took out of such a state before the call is
    deleted by the call; copy it first if you still need it.

    Args:
      fun: The function to compile. Without it, the call returns a decorator.
      static_argnums: The positions of arguments that are compile-time constants, 0 or more.
      static_argnames: The names of keyword arguments that are compile-time constants.

    Returns:
      The compiled function. Its `lower(*args, **kwargs)` returns a `jax.stages.Lowered`, for inspection.

    Raises:
      ValueError: If a position is negative.

    Example:
      >>> import brainstate, embax
      >>> embedding = embax.Embedding(1_000, 8, max_norm=1.0)
      >>> step = embax.brainstate.jit(lambda indices: embedding(indices).sum())
      >>> step([1, 2, 3]).shape
      ()
    """
    if fun is None:
        return functools.partial(jit, static_argnums=static_argnums, static_argnames=static_argnames)
    argnums = (static_argnums,) if isinstance(static_argnums, int) else tuple(static_argnums)
    argnames = (static_argnames,) if isinstance(static_argnames, str) else tuple(static_argnames)
    if any(number < 0 for number in argnums):
        raise ValueError(f"`embax.brainstate.jit(static_argnums=...)` must be 0 or more, got {argnums}. Count from 0.")
    stateful = brainstate.transform.StatefulFunction(fun, static_argnums=argnums, static_argnames=argnames, name="jit")

    @functools.partial(
        jax.jit, donate_argnums=0, static_argnums=tuple(number + 2 for number in argnums), static_argnames=argnames
    )
    def run(written: tuple[PyTree, ...], read: tuple[PyTree, ...], *args: PyTree, **kwargs: PyTree) -> PyTree:
        values = [r if w is None else w for w, r in zip(written, read, strict=True)]
        return stateful.jaxpr_call(values, *args, **kwargs)

    @functools.wraps(fun)
    def call(*args: PyTree, **kwargs: PyTree) -> PyTree:
        if jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
            return fun(*args, **kwargs)
        trace = stateful.get_state_trace(*args, **kwargs)
        written, read = trace.get_write_state_values(True), trace.get_read_state_values(True)
        new, out = run(_unshared(written, (read, args, kwargs)), read, *args, **kwargs)
        trace.assign_state_vals_v2(read, new)
        return out

    def lower(*args: PyTree, **kwargs: PyTree) -> jax.stages.Lowered:
        trace = stateful.get_state_trace(*args, **kwargs)
        return run.lower(trace.get_write_state_values(True), trace.get_read_state_values(True), *args, **kwargs)

    call.lower = lower  # pyright: ignore[reportAttributeAccessIssue]
    return call


def _unshared(donated: PyTree, others: PyTree) -> PyTree:
    """Copy each donated array that is also used elsewhere: a buffer can be donated only if nothing else uses it."""
    uses = Counter(id(leaf) for leaf in jax.tree.leaves((donated, others)) if isinstance(leaf, jax.Array))
    return jax.tree.map(lambda leaf: leaf.copy() if uses[id(leaf)] > 1 else leaf, donated)
