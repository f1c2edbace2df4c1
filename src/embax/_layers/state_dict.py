"""State dicts: weights under the names of torch and Hugging Face, to move tables between frameworks."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped
from numpy.typing import ArrayLike

from .._base.arrays import as_jax
from .._core.table import Table

# The ends of the names of input embeddings, in Hugging Face's transformers and in Meta's checkpoints: BERT and its
# relatives; Llama, Mistral, Qwen, Gemma, OPT; GPT-2; T5 and BART; GPT-NeoX; BLOOM and Falcon; XLNet; CLIP; Mamba; Llama
# by Meta.
_TOKENS = (
    "embeddings.word_embeddings.weight",
    "embed_tokens.weight",
    "wte.weight",
    "shared.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "word_embedding.weight",
    "token_embedding.weight",
    "backbone.embeddings.weight",
    "tok_embeddings.weight",
)


def to_state_dict(tables: object, prefix: str = "") -> dict[str, Shaped[np.ndarray, "rows *dim"]]:
    """Return the weights of tables under torch's names, `<module>.weight`.

    Pass the result to `load_state_dict` (after `torch.from_numpy` on each array), `safetensors.numpy.save_file`, or
    `from_state_dict` in another framework. A state dict has no rules; to keep them, use `from_table` of a layer.

    Args:
      tables: A Table, a layer of any framework, or a dict of them by the names of their modules, such as
        `{"model.embed_tokens": embedding, "lm_head": head}`.
      prefix: The start of each name.

    Returns:
      Copies of the weights by name, `(rows, *dim)`, in row order also for sharded tables; the name of a single table is
      `"weight"`.

    Raises:
      TypeError: If an entry is neither a table nor a layer.

    Example:
      >>> import embax, jax.numpy as jnp
      >>> table = embax.Table(jnp.ones((3, 2)))
      >>> list(embax.to_state_dict({"bert.embeddings.word_embeddings": table}))
      ['bert.embeddings.word_embeddings.weight']
    """
    if not isinstance(tables, Mapping):
        tables = {"": tables}
    out = {}
    for module, node in tables.items():
        table = getattr(node, "table", node)
        if not isinstance(table, Table):
            raise TypeError(
                f"`embax.to_state_dict(tables=...)` must have tables or layers, got {type(node).__name__} for "
                f"{module!r}. Name the layers of a model, as in {{'tokens': model.embedding}}."
            )
        out[f"{prefix}{module}.weight" if module else f"{prefix}weight"] = np.array(table.storage.to_rows(table.weight))
    return out


def from_state_dict(state: Mapping[str, ArrayLike], name: str | None = None, **rules: Any) -> Table:
    """Make a table from a weight in a state dict.

    Args:
      state: Arrays by name, from torch's `state_dict()`, `safetensors.numpy.load_file` or `to_state_dict`. Torch's
        tensors are read without importing torch.
      name: The name of the weight, or of its module. Default: the only name that is `"weight"` or ends like the input
        embeddings of Hugging Face's models (`embeddings.word_embeddings.weight`, `embed_tokens.weight`, `wte.weight`,
        `shared.weight` and others).
      **rules: The rules of `embax.Table`, by name. The padding row keeps its values.

    Returns:
      The table.

    Raises:
      KeyError: If the name is not found; without a name, if there is no token embedding, or more than one.
      TypeError: As `embax.Table`.
      ValueError: As `embax.Table`.

    Example:
      >>> import embax, numpy as np
      >>> weight = np.ones((3, 2), np.float32)
      >>> state = {"bert.embeddings.word_embeddings.weight": weight, "bert.pooler.dense.bias": np.ones(2)}
      >>> embax.from_state_dict(state, padding_idx=0)
      Table(float32[3,2], padding_idx=0)
    """
    return Table(_array(state[_name(state, name)]), **rules)


def _name(state: Mapping[str, object], name: str | None) -> str:
    if name is not None:
        found = [key for key in (name, f"{name}.weight") if key in state]
    else:
        found = [key for key in state if key == "weight" or f".{key}".endswith(tuple(f".{end}" for end in _TOKENS))]
    if len(found) == 1 or (name is not None and found):
        return found[0]
    if not found:
        have = [key for key, value in state.items() if getattr(value, "ndim", 0) == 2]
        raise KeyError(
            f"`embax.from_state_dict(name=...)` must name a weight of the state dict, got {name!r}, and it has "
            f"{', '.join(map(repr, have[:10])) or 'no matrices'}{', ...' if len(have) > 10 else ''}. Pass its name."
        )
    raise KeyError(
        "`embax.from_state_dict(name=...)` must be given if there are several token embeddings, got None and "
        f"{', '.join(map(repr, found))}. Pass one of these."
    )


def _array(value: Any) -> Array:
    """Read an array of NumPy, JAX or torch."""
    value = value.detach() if hasattr(value, "detach") else value  # torch converts no tensor with a gradient
    try:
        return as_jax(np.asarray(value))
    except TypeError:  # torch's bfloat16, which NumPy does not have
        return jnp.array(jnp.from_dlpack(value))  # copied: JAX may donate the array and write into its memory
