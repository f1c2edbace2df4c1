"""How a loss is differentiated: its lookups by taps on their rows, the rest of it as JAX does."""

import warnings
from collections.abc import Callable, Sequence, Set
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import jaxpr_as_fun
from jax.sharding import PartitionSpec
from jaxtyping import Array, Shaped

from . import _ids, _placed, _tape
from ._mesh import is_explicit, resharded
from ._modules import fixed_leaves
from ._placement import Placement
from ._apply import apply_updates
from ._rows import RowGrad, is_trained, no_rows, row_grad
from ._table import Table, with_weight

OnDense = Literal["error", "warn", "allow"]


class DenseGradientWarning(UserWarning):
    """A table gets a dense gradient, since its weight is used otherwise than by lookups that can be followed."""


class Options(NamedTuple):
    """The arguments of `value_and_grad`, besides the function."""

    call: str  # for messages
    argnums: int | Sequence[int]
    has_aux: bool
    holomorphic: bool
    allow_int: bool
    on_dense: OnDense
    stacklevel: int = 4  # from a warning up to the user's code

    @property
    def numbers(self) -> tuple[int, ...]:
        """The positions of the arguments."""
        return tuple(self.argnums) if isinstance(self.argnums, Sequence) else (self.argnums,)

    def fit(self, args: Sequence[Any]) -> bool:
        """Say whether there are such arguments."""
        return all(-len(args) <= number < len(args) for number in self.numbers)


def evaluate(fun: Callable[..., Any], options: Options, args: Sequence[Any], kwargs: Any) -> tuple[Any, Any]:
    """Return what a function returns, and its gradient."""
    numbers = options.numbers
    nodes, structure = jax.tree.flatten_with_path(
        [args[number] for number in numbers], is_leaf=lambda node: isinstance(node, Table)
    )
    leaves = [leaf for _, leaf in nodes]
    trained = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Table) and is_trained(leaf)]

    def run(leaves: Sequence[Any]) -> Any:
        full = list(args)
        for number, value in zip(numbers, structure.unflatten(leaves), strict=True):
            full[number] = value
        return fun(*full, **kwargs)

    fixed = [i for i, is_fixed in enumerate(fixed_leaves([args[number] for number in numbers])) if is_fixed]
    seen = _find_reads(run, leaves, trained)
    for i, reason in seen.dense.items():
        path = nodes[i][0]
        name = f"argument {numbers[path[0].idx]}{jax.tree_util.keystr(path[1:])}"
        report_dense(options.call, options.on_dense, name, leaves[i], reason, options.stacklevel)
    out, gradients = _differentiate(run, leaves, seen, fixed, options)
    gradient = structure.unflatten([_of_table(*pair) for pair in zip(leaves, gradients, strict=True)])
    return out, tuple(gradient) if isinstance(options.argnums, Sequence) else gradient[0]


def _of_table(leaf: Any, gradient: Any) -> Any:
    """Put the Table that rows are the gradient of around them, so that the gradients have the parameters' structure."""
    return with_weight(leaf, gradient) if isinstance(leaf, Table) and isinstance(gradient, RowGrad) else gradient


def report_dense(call: str, on_dense: OnDense, name: str, table: Table, reason: str, stacklevel: int = 3) -> None:
    """Say that the gradient of a table is dense, as `on_dense` asks.

    Args:
      call: The call for the message.
      on_dense: As in `value_and_grad`.
      name: The table's name.
      table: The table.
      reason: A primitive that uses the weight, or an empty string for a lookup in an inner transformation.
      stacklevel: That of the user's code, as in `warnings.warn`.

    Raises:
      ValueError: If it is `"error"`.
    """
    if on_dense == "allow":
        return
    if not reason or reason in _TRANSFORMATIONS:
        inside = f"of `{reason}`" if reason else "an inner transformation"
        why = f"inside {inside}, where its lookups cannot be followed. Look up outside and pass the rows in"
    else:
        why = f"by `{reason}`, which is no lookup. Compute with rows that embax.lookup reads"
    message = (
        f"`{call}`: the gradient of {name}, {table!r}, is dense, {table.rows} rows, since the loss uses "
        f"its weight {why}, or expect it with on_dense='allow'."
    )
    if on_dense == "error":
        raise ValueError(message)
    warnings.warn(message, DenseGradientWarning, stacklevel=stacklevel)


# Primitives that hold a function of their own; the jaxpr of an inner derivative is part of the loss's.
_TRANSFORMATIONS = frozenset(
    "jit pjit scan while cond checkpoint remat remat2 custom_jvp_call custom_vjp_call shard_map pmap".split()
)


class _Reads(NamedTuple):
    """What a first run of a loss has shown of its tables, by the numbers of their leaves."""

    sparse: list[int]  # those that are read by lookups and heads on the tape, or not at all
    lookups: list[_tape.Lookup]  # of these, by their place in `sparse`, with the type of the ids in place of them
    whole: list[int]  # those of these that a head reads
    dense: dict[int, str]  # the others, whose weight is used otherwise, with a reason for `report_dense`


def _find_reads(run: Callable[[Sequence[Any]], Any], leaves: Sequence[Any], trained: Sequence[int]) -> _Reads:
    """Run a loss on stand-ins for the weights of its trained tables."""
    weights = [leaves[i].weight for i in trained]
    lookups: list[_tape.Lookup] = []
    hidden: set[int] = set()
    whole: set[int] = set()

    def on_tape(stand_ins: Sequence[Any]) -> None:
        with _tape.recording(_tape.Tape(stand_ins, weights)) as tape:
            run(_with_weights(leaves, trained, stand_ins))
        # No tracer may outlive its trace.
        lookups.extend(lookup._replace(ids=jax.typeof(lookup.ids)) for lookup in tape.lookups)
        hidden.update(tape.hidden)
        whole.update(tape.read_whole)

    jaxpr = jax.make_jaxpr(on_tape)(weights).jaxpr
    used = _tape.other_uses(jaxpr, jaxpr.invars)
    dense = {trained[k]: "" if k in hidden else name for k, name in used.items()}
    sparse = [i for i in trained if i not in dense]
    lookups = [x._replace(table=sparse.index(trained[x.table])) for x in lookups if x.table not in used]
    return _Reads(sparse, lookups, sorted(trained[k] for k in whole - used.keys()), dense)


def _differentiate(
    run: Callable[[Sequence[Any]], Any], leaves: Sequence[Any], seen: _Reads, fixed: Sequence[int], options: Options
) -> tuple[Any, list[Any]]:
    """Differentiate a loss for a tap on each of its lookups, and for its other leaves.

    The second run of the loss gives a jaxpr, and it is that jaxpr which is differentiated. So a stand-in of which it
    makes no use cannot have had a part in the loss.

    Returns:
      What the loss returns, and the gradients.
    """
    sparse, lookups = seen.sparse, seen.lookups
    weights = [leaves[i].weight for i in sparse]
    constant = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Table) and not is_trained(leaf)]
    # What a head reads is differentiated as any other leaf, beside the taps of its lookups.
    left_out = {*sparse, *constant, *fixed} - {*seen.whole}
    others = [None if i in left_out else leaf for i, leaf in enumerate(leaves)]
    taps = [tap_of(lookup, weights[lookup.table], leaves[sparse[lookup.table]].placement) for lookup in lookups]
    outputs: list[Any] = []

    def with_taps(others: Sequence[Any], taps: Sequence[Array], stand_ins: Sequence[Any]) -> Any:
        filled = [leaf if other is None else other for leaf, other in zip(leaves, others, strict=True)]
        whole = {sparse.index(i): others[i].weight for i in seen.whole}
        with _tape.recording(_tape.Tape(stand_ins, weights, taps, whole)) as tape:
            out = run(_with_weights(filled, sparse, stand_ins))
        check_same_reads(options.call, tape, lookups, whole.keys())
        parts, structure = jax.tree.flatten(out)
        # A stand-in that is returned holds what `renormalize` has made of its table.
        parts = [part if (found := tape.find(part)) is None else found[1] for part in parts]
        # What is no tracer, an auxiliary output may be anything, has no part in the jaxpr.
        traced = [isinstance(part, Tracer) for part in parts]
        rest = [None if is_traced else part for part, is_traced in zip(parts, traced, strict=True)]
        outputs.append((structure, traced, rest))
        parts = [part for part, is_traced in zip(parts, traced, strict=True) if is_traced]
        return parts, [lookup.ids for lookup in tape.lookups]

    closed = jax.make_jaxpr(with_taps)(others, taps, weights)
    stand_ins = closed.jaxpr.invars[len(closed.jaxpr.invars) - len(weights) :]
    if _tape.other_uses(closed.jaxpr, stand_ins):
        raise impure(options.call, "another use of a table's weight in the second run")
    structure, traced, rest = outputs[0]
    evaluate = jaxpr_as_fun(closed)

    def loss(others: Sequence[Any], taps: Sequence[Array]) -> Any:
        values = iter(evaluate(*jax.tree.leaves((others, taps, weights))))
        full = [next(values) if is_traced else part for part, is_traced in zip(rest, traced, strict=True)]
        out = structure.unflatten(full)
        ids = list(values)
        value, aux = checked_pair(options.call, options.has_aux, out)
        return value, ((value, aux) if options.has_aux else value, ids)

    differentiated = jax.value_and_grad(
        loss, (0, 1), has_aux=True, holomorphic=options.holomorphic, allow_int=options.allow_int
    )
    (_, (out, ids)), (gradients, cotangents) = differentiated(others, taps)
    ids = [after_loss(out[0] if options.has_aux else out, x) for x in ids]
    for i in constant:
        gradients[i] = _none_read(leaves[i])
    for k, i in enumerate(sparse):
        of_table = [n for n, lookup in enumerate(lookups) if lookup.table == k]
        rows = gathered(leaves[i], [ids[n] for n in of_table], [cotangents[n] for n in of_table])
        gradients[i] = apply_updates(gradients[i], rows) if i in seen.whole else rows
    return out, gradients


def check_same_reads(call: str, tape: _tape.Tape, lookups: Sequence[_tape.Lookup], whole: Set[int]) -> None:
    """Check that a second run of a function has read of its tables what the first one has.

    Args:
      call: The call for the message.
      tape: That of the second run.
      lookups: The lookups of the first run.
      whole: The tables of which a head has read all rows in it.

    Raises:
      RuntimeError: If it has not.
    """
    if [lookup.table for lookup in tape.lookups] != [lookup.table for lookup in lookups] or tape.read_whole != whole:
        raise impure(call, "other lookups in its second run")


def checked_pair(call: str, has_aux: bool, out: Any) -> tuple[Any, Any]:
    """Return the value and the auxiliary output, None without one, of what a function returned.

    Args:
      call: The call for the message.
      has_aux: Whether it is to be a pair.
      out: What it returned.

    Returns:
      Both.

    Raises:
      TypeError: If it is to be a pair, and is none.
    """
    if not has_aux:
        return out, None
    if not isinstance(out, tuple | list) or len(out) != 2:
        raise TypeError(
            f"`{call}(has_aux=True)` must be of a function that returns a pair, a scalar and anything else, got "
            f"{type(out).__name__}. Return both, or leave has_aux out."
        )
    return out[0], out[1]


def tap_of(lookup: _tape.Lookup, weight: Array, placement: Placement | None = None) -> Shaped[Array, "*batch_dim"]:
    """Zeros that vary over the axes of a `shard_map` as the rows do, lest their gradient is summed over these.

    Of a table on a mesh with explicit axes, they are laid out as the rows are, too.
    """
    tap = jnp.zeros(lookup.shape, lookup.dtype)
    if placement is not None and is_explicit(placement.mesh):
        of_ids = lookup.ids.sharding
        return resharded(tap, placement.mesh, of_ids.spec if is_explicit(of_ids.mesh) else PartitionSpec())
    axes = lookup.ids.manual_axis_type.varying | jax.typeof(weight).manual_axis_type.varying
    return jax.lax.pcast(tap, tuple(axes), to="varying") if axes else tap


def _with_weights(leaves: Sequence[Any], tables: Sequence[int], weights: Sequence[Any]) -> list[Any]:
    replaced = list(leaves)
    for i, weight in zip(tables, weights, strict=True):
        replaced[i] = with_weight(leaves[i], weight)
    return replaced


def _none_read(table: Table) -> Any:
    if not hasattr(table.weight, "dtype"):  # as Equinox leaves out what is in another place
        return with_weight(table, None)
    return no_rows(table)


def gathered(table: Table, ids: Sequence[Array], cotangents: Sequence[Array]) -> RowGrad:
    """Put the gradients of a table's lookups together."""
    if not ids:
        return _none_read(table)
    if table.placement is not None:
        flat_ids = _placed.joined(table.placement, [jnp.ravel(x) for x in ids], table.rows)
        values = [jnp.reshape(x, (n.size, *table.dim)) for x, n in zip(cotangents, ids, strict=True)]
        return row_grad(flat_ids, _placed.joined(table.placement, values, 0), table.rows)
    ids, cotangents = ([_ids.on_every_device(x) for x in arrays] for arrays in (ids, cotangents))
    flat_ids = jnp.concatenate([jnp.ravel(x) for x in ids])
    values = jnp.concatenate([jnp.reshape(x, (n.size, *table.dim)) for x, n in zip(cotangents, ids, strict=True)])
    return row_grad(flat_ids, values, table.rows)


def after_loss(value: Array, ids: Array) -> Array:
    """Make ids depend on the loss, so that the rows are read before a donated table is written in their place.

    Where the gradient of the rows does not depend on them, as in a sum, XLA would be free to write first, and copy the
    table to be able to. (It drops an optimization_barrier before it decides.) No number has 64 bits set of 32, but XLA
    does not reason about that.
    """
    bits = jax.lax.bitcast_convert_type(jnp.real(value).astype(jnp.float32), jnp.int32)
    return ids + jax.lax.shift_right_logical(jax.lax.population_count(bits), jnp.int32(6)).astype(ids.dtype)


def impure(call: str, seen: str) -> RuntimeError:
    """The error for a function that does something else when it is traced again."""
    return RuntimeError(
        f"`{call}(fun=...)` must be of a function that does the same each time it is traced, got "
        f"{seen}. Make it depend on nothing but its arguments."
    )
