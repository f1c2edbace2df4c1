"""Differentiate a loss: JAX makes the program of the gradient, and `_analysis` runs it without its arrays of all rows.

An example: a loss that looks up three ids of a table of a million rows.

    jax.vjp(loss, table)         runs the loss once, as JAX does
    make_jaxpr(pullback)(1.0)    the gradient's program: zeros of a million rows, to which `add_rows` adds 3 rows
    evaluate(program)            runs only the equations that compute `values` and `ids` of `add_rows`
    RowGrad(ids, values)         3 ids and 3 rows; no array of a million rows was made
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Int32, PyTree

from .._base import by_bag
from .._base.arrays import as_jax
from .._base.by_bag import ByBag, Held
from .._core import ids as _ids
from .._core.table import Table, is_table, with_weight
from ._analysis.equations import without_constants
from ._analysis.forms import Memo
from ._analysis.opening import Kind
from ._analysis.program import evaluate as evaluate_program
from ._analysis.rows import Rows, Term
from .apply import apply_updates
from .chosen import Chooser, is_chosen
from .modules import fixed_leaves
from .report_dense import NOT_BY_LOOKUP, OVER_DEVICES, OnDense, report_dense, why_dense
from .row_grad import RowGrad, is_trained, no_rows, row_grad


class Options(NamedTuple):
    """The arguments of `value_and_grad`, besides the function."""

    call: str  # for error messages
    argnums: int | Sequence[int]
    has_aux: bool
    holomorphic: bool
    allow_int: bool
    on_dense: OnDense
    tables: Chooser | None = None
    stacklevel: int = 6  # from a warning up to the user's code

    @property
    def numbers(self) -> tuple[int, ...]:
        """The positions of the differentiated arguments."""
        return tuple(self.argnums) if isinstance(self.argnums, Sequence) else (self.argnums,)

    def fit(self, args: Sequence[PyTree]) -> bool:
        """Whether the call has all of these arguments."""
        return all(-len(args) <= number < len(args) for number in self.numbers)


def evaluate(
    fun: Callable[..., PyTree],
    options: Options,
    args: Sequence[PyTree],
    kwargs: PyTree,
    names: Callable[[Any], str] | None = None,
) -> tuple[PyTree, PyTree]:
    """Call a function whose arguments may hold Tables, and differentiate it.

    Args:
      fun: The function.
      options: The arguments of `value_and_grad`.
      args: Its positional arguments.
      kwargs: Its keyword arguments.
      names: Returns the name of a leaf for messages, given its path in the list of differentiated arguments. Default:
        the position of the argument and the path.

    Returns:
      The function's result, and its gradient.
    """
    numbers = options.numbers
    nodes, structure = jax.tree.flatten_with_path([args[number] for number in numbers], is_leaf=is_table)
    fixed = fixed_leaves([args[number] for number in numbers])
    # Functions and settings are leaves of Equinox modules, too; the predicate gets arrays only.
    asked = [hasattr(leaf, "dtype") or not is_fixed for is_fixed, (_, leaf) in zip(fixed, nodes, strict=True)]
    chosen = [
        is_asked and is_chosen(options.call, options.tables, path[1:], leaf)
        for is_asked, (path, leaf) in zip(asked, nodes, strict=True)
    ]
    leaves = [Table(leaf) if is_table else leaf for is_table, (_, leaf) in zip(chosen, nodes, strict=True)]

    def loss(others: Sequence[PyTree]) -> PyTree:
        filled = [leaf if other is None else other for leaf, other in zip(leaves, others, strict=True)]
        filled = [leaf.weight if is_table else leaf for is_table, leaf in zip(chosen, filled, strict=True)]
        full = list(args)
        for number, value in zip(numbers, structure.unflatten(filled), strict=True):
            full[number] = value
        return checked_pair(options.call, options.has_aux, fun(*full, **kwargs))

    def name(i: int) -> str:
        path = nodes[i][0]
        return names(path) if names else f"argument {numbers[path[0].idx]}{jax.tree_util.keystr(path[1:])}"

    value, aux, gradients = differentiate(loss, leaves, fixed, options, name)
    gradients = [_of_table(*pair) for pair in zip(leaves, gradients, strict=True)]
    gradients = [x.weight if is_table else x for is_table, x in zip(chosen, gradients, strict=True)]
    gradient = structure.unflatten(gradients)
    out = (value, aux) if options.has_aux else value
    return out, tuple(gradient) if isinstance(options.argnums, Sequence) else gradient[0]


def _of_table(leaf: PyTree, gradient: PyTree) -> PyTree:
    """Wrap a RowGrad in its table, so that gradients have the parameters' structure."""
    return with_weight(leaf, gradient) if isinstance(leaf, Table) and isinstance(gradient, RowGrad) else gradient


def differentiate(
    loss: Callable[[Sequence[PyTree]], tuple[PyTree, PyTree]],
    leaves: Sequence[PyTree],
    fixed: Sequence[bool],
    options: Options,
    name: Callable[[int], str],
) -> tuple[Any, Any, list[PyTree]]:
    """Differentiate a loss with respect to a list of leaves.

    Args:
      loss: Called with the leaves, None for those that are not differentiated; returns a value and anything else.
      leaves: Tables, arrays, and leaves of any other type.
      fixed: Which leaves are not differentiated, besides integer and frozen tables.
      options: Its `call`, `holomorphic`, `allow_int`, `on_dense` and `stacklevel` are used.
      name: Returns the name of a leaf for messages.

    Returns:
      The value, the other result, and a list of gradients: for a table a RowGrad, or a Table with a dense weight.
    """
    is_table = [isinstance(leaf, Table) for leaf in leaves]
    constant = [is_ and not is_trained(leaf) for is_, leaf in zip(is_table, leaves, strict=True)]
    left_out = [a or b for a, b in zip(fixed, constant, strict=True)]
    others = [None if out else leaf for out, leaf in zip(left_out, leaves, strict=True)]
    _check_leaves(others, options)
    value, pull_back, aux = jax.vjp(loss, others, has_aux=True)
    _check_value(value, options)
    gradients = _gradients(value, pull_back, others, options, name)
    return (
        value,
        aux,
        [
            _none_read(leaf) if is_constant else gradient
            for leaf, is_constant, gradient in zip(leaves, constant, gradients, strict=True)
        ],
    )


def _check_leaves(others: Sequence[PyTree], options: Options) -> None:
    leaves = jax.tree.leaves(others)
    if options.holomorphic or not all(_is_float(leaf) for leaf in leaves):
        number = jnp.zeros((), jnp.complex64 if options.holomorphic else jnp.float32)
        _refuse_as_jax_does(number, others, options)


def _check_value(value: PyTree, options: Options) -> None:
    if options.holomorphic or not _is_float(value) or jnp.shape(value) != ():
        _refuse_as_jax_does(value, [], options)


def _is_float(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def _refuse_as_jax_does(value: PyTree, leaves: Sequence[PyTree], options: Options) -> None:
    """Raise JAX's own error for a value or leaves that it cannot differentiate, if it has one."""
    of_jax = jax.value_and_grad(lambda _: value, holomorphic=options.holomorphic, allow_int=options.allow_int)
    jax.eval_shape(of_jax, leaves)


def _gradients(
    value: Array,
    pull_back: Callable[[Array], Any],
    others: Sequence[PyTree],
    options: Options,
    name: Callable[[int], str],
) -> list[PyTree]:
    """Make the program of the gradients, and run it so that tables get rows."""
    one = jax.lax.full_like(value, 1)
    if not any(isinstance(leaf, Table) for leaf in others):
        return pull_back(one)[0]
    found: list[PyTree] = []

    def backward(one: Array) -> list[PyTree]:
        (gradients,) = pull_back(one)
        flat, structure = jax.tree.flatten(gradients)
        # Gradients that are not tracers (float0, of integers) are not outputs of the program.
        found.append((structure, [None if isinstance(x, Tracer) else x for x in flat]))
        return [x for x in flat if isinstance(x, Tracer)]

    jaxpr, consts = without_constants(jax.make_jaxpr(backward)(one))
    structure, rest = found[0]
    numbers = iter(range(len(jaxpr.outvars)))
    # The program's outputs by number, in a type of their own, so that no number is taken for a gradient.
    boxed = structure.unflatten([_Output(next(numbers)) if x is None else x for x in rest])
    memo, terms, dense = Memo(), {}, {}
    for i, leaf in enumerate(others):
        if isinstance(leaf, Table) and isinstance(output := boxed[i].weight, _Output):
            form = memo.forms(jaxpr).form(jaxpr.outvars[output.number])
            # Inside a `shard_map`, rows that are still to be summed over devices cannot join a sum that already is.
            over_devices = len(form.axes) > 1 or (form.dense and any(form.axes))
            apart = over_devices or form.kinds - {Kind(storage=leaf.storage)}
            why = why_dense(form) or (OVER_DEVICES if over_devices else NOT_BY_LOOKUP if apart else None)
            if why is not None:
                dense[i] = why
            if not apart:
                terms[i] = output.number
    for i, why in dense.items():
        report_dense(options.call, options.on_dense, name(i), others[i], why, options.stacklevel)
    arrays_out = [j for j in range(len(jaxpr.outvars)) if j not in terms.values()]
    arrays, sums = evaluate_program(jaxpr, (), [*consts, one], {}, arrays_out, tuple(terms.values()), memo)
    values: dict[int, PyTree] = dict(zip(arrays_out, arrays, strict=True)) | dict.fromkeys(terms.values())
    gradients = jax.tree.map(
        lambda x: values[x.number] if isinstance(x, _Output) else x, boxed, is_leaf=lambda x: isinstance(x, _Output)
    )
    for i, of_table in zip(terms, sums, strict=True):
        gradients[i] = _of_terms(others[i], value, of_table)
    return gradients


class _Output(NamedTuple):
    """The number of an output of a program."""

    number: int


def _of_terms(table: Table, value: Array, terms: Sequence[Term]) -> PyTree:
    """Make the gradient of a table from its terms: Rows, and arrays of all rows."""
    rows = [x for x in reversed(terms) if isinstance(x, Rows)]  # in the order of the lookups
    whole = [x for x in terms if not isinstance(x, Rows)]
    zero, ids = after_loss(value, rows, table.rows)
    of_rows = gathered(table, ids, [x.held for x in rows])
    if not whole:
        if len(rows) == 1 and rows[0].from_end is not None:
            given = as_jax(rows[0].given)  # a constant is a NumPy array
            return of_rows.with_given(table.storage.flat(given, (given.size,)), zero)
        return of_rows
    total = with_weight(table, sum(whole[1:], start=whole[0]))
    return apply_updates(total, of_rows) if rows else total


def checked_pair(call: str, has_aux: bool, out: PyTree) -> tuple[PyTree, PyTree]:
    """Split a function's result into the value and the auxiliary output.

    Args:
      call: The call, for the error message.
      has_aux: Whether the result must be a pair.
      out: The function's result.

    Returns:
      The value and the auxiliary output; None for the latter without `has_aux`.

    Raises:
      TypeError: If the result must be a pair and is not.
    """
    if not has_aux:
        return out, None
    if not isinstance(out, tuple | list) or len(out) != 2:
        raise TypeError(
            f"`{call}(has_aux=True)` must be of a function that returns a pair (scalar, aux), got "
            f"{type(out).__name__}. Return both, or leave has_aux out."
        )
    return out[0], out[1]


def _none_read(table: Table) -> PyTree:
    if not hasattr(table.weight, "dtype"):  # Equinox's partition removed it
        return with_weight(table, None)
    return no_rows(table)


def gathered(table: Table, ids: Sequence[Array], cotangents: Sequence[Held]) -> RowGrad:
    """Concatenate the gradients of a table's lookups into one RowGrad."""
    if not ids:
        return _none_read(table)
    storage = table.storage
    values: list[Held] = [
        x.flat(n) if isinstance(x, ByBag) else storage.flat(x, (n.size, *table.dim))
        for x, n in zip(cotangents, ids, strict=True)
    ]
    flat_ids = [storage.flat(n, (n.size,)) for n in ids]
    if any(isinstance(x, ByBag) for x in values):
        held = values[0] if len(values) == 1 else by_bag.joined(list(zip(flat_ids, values, strict=True)))
    else:
        held = storage.joined(values, 0)
    return row_grad(storage.joined(flat_ids, table.rows), held, table.rows)


@functools.partial(jax.jit, static_argnums=2, inline=True)  # one program for an eager call
def after_loss(value: Array, rows: Sequence[Rows], number: int) -> tuple[Int32[Array, ""], list[Array]]:
    """Make ids depend on the loss, so that the loss reads a donated table before an update overwrites it.

    If the gradient does not depend on the rows, as for a plain sum, XLA may write first, and then copies the whole
    table to keep the old rows. An optimization_barrier does not help: XLA drops it before it decides. The term added
    below is always 0, as no 32-bit number has 64 bits set, but XLA does not know.

    Args:
      value: The loss.
      rows: The rows of a gradient.
      number: The number of rows of the table.

    Returns:
      The zero that was added, and the row numbers of the rows in the index dtype.
    """
    bits = jax.lax.bitcast_convert_type(jnp.real(value).astype(jnp.float32), jnp.int32)
    zero = jax.lax.shift_right_logical(jax.lax.population_count(bits), jnp.int32(6))
    ids = [_ids.narrow(x.ids, number, jnp) for x in rows]
    return zero, [x + zero.astype(x.dtype) for x in ids]
