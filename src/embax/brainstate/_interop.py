"""Conversion of Embedding to other frameworks by `brainstate.interop`; a rule that the target lacks is an error."""

import brainstate
from jaxtyping import PyTree

from .._core.containers.stored_rows import StoredRows
from ._embedding import Embedding
from ._weight import split_unit


class _Nothing:
    """The foreign class of the mappings: a dummy, so that existing conversions of Flax's and Equinox's layers stay."""


def _no_import(module: object, context: object) -> Embedding:
    raise brainstate.interop.ConversionError(f"No layer converts to embax.Embedding, got {type(module).__name__}.")


def _to_nnx(embedding: Embedding, context: object) -> PyTree:
    weight = _plain_weight(embedding, "flax.nnx.Embed", out_of_range=("error", "nan"))
    from flax import nnx

    return nnx.Embed(
        *weight.shape,
        dtype=embedding.dtype or weight.dtype,
        param_dtype=weight.dtype,
        embedding_init=lambda key, shape, dtype: weight,
        rngs=nnx.Rngs(0),
    )


def _to_equinox(embedding: Embedding, context: object) -> PyTree:
    weight = _plain_weight(embedding, "equinox.nn.Embedding", out_of_range=("error", "clip"))
    if embedding.dtype not in (None, weight.dtype):
        raise _conversion_error("equinox.nn.Embedding", {"dtype": embedding.dtype})
    import equinox

    return equinox.nn.Embedding(weight=weight)


def _plain_weight(embedding: Embedding, target: str, out_of_range: tuple[str, ...]) -> PyTree:
    """Return the weight if the layer has no rules besides one of these policies; else raise a ConversionError."""
    weight, unit = split_unit(embedding.weight.value)
    state = type(embedding.weight)
    lacking: dict[str, PyTree] = {
        name: value
        for name in ("padding_idx", "max_norm", "scale_grad_by_freq", "freeze")
        if (value := getattr(embedding, name)) is not None and value is not False
    }
    if embedding.out_of_range not in out_of_range:
        lacking["out_of_range"] = embedding.out_of_range
    if not issubclass(state, brainstate.ParamState):
        lacking["param_type"] = state.__name__
    if isinstance(weight, StoredRows):
        lacking[weight.storage.name] = weight.storage
    if unit is not None:
        lacking["unit"] = unit
    if weight.ndim != 2:
        lacking["embedding_size"] = weight.shape[1:]
    if lacking:
        raise _conversion_error(target, lacking)
    return weight


def _conversion_error(target: str, lacking: dict[str, PyTree]) -> Exception:
    rules = ", ".join(f"{name}={value!r}" for name, value in lacking.items())
    return brainstate.interop.ConversionError(
        f"`{target}` must not need a rule that it does not have, got an embax.Embedding with {rules}. "
        "If it may be lost, change the attribute first."
    )


for _framework, _convert in {"nnx": _to_nnx, "equinox": _to_equinox}.items():
    brainstate.interop.register_layer_mapping(
        brainstate.interop.LayerMapping(Embedding, _framework, _Nothing, _no_import, _convert)
    )
