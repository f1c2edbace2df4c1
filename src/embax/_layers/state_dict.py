"""State dicts: tables under the names that torch and Hugging Face give them, to move between frameworks."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped
from numpy.typing import ArrayLike

from .._core.table import Table

# What the input embeddings of language models end with, in Hugging Face's transformers and in Meta's own checkpoints:
# BERT and its kin; Llama, Mistral, Qwen, Gemma, OPT; GPT-2; T5 and BART; GPT-NeoX; BLOOM and Falcon; XLNet; CLIP;
# Mamba; Llama by Meta.
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
    """Give the weights of tables the names that they have in torch: `<module>.weight`.

    The result is for `load_state_dict`, after `torch.from_numpy` on each array, for `safetensors.numpy.save_file`, or
    for `from_state_dict` in another framework. A state dict has no room for rules; `from_table` of a layer keeps these.

    Args:
      tables: A Table, a layer of any framework, or a dict of them by the names of their modules, such as
        `{"model.embed_tokens": embedding, "lm_head": head}`.
      prefix: Comes before each name.

    Returns:
      Arrays of their own, `(rows, *dim)` in the order of rows, those of sharded tables, too, by name; a single table is
      `"weight"`.

    Raises:
      TypeError: If there is something else among them.

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
    """Make a table of the weight that a state dict holds.

    Args:
      state: Arrays by name: torch's `state_dict()`, what `safetensors.numpy.load_file` reads, or what `to_state_dict`
        gives. Torch's tensors are read without importing torch.
      name: The name of the weight, or of its module. Default: the only one that is `"weight"` or that ends as the input
        embeddings of Hugging Face's models do (`embeddings.word_embeddings.weight`, `embed_tokens.weight`,
        `wte.weight`, `shared.weight` and others).
      **rules: The rules of `embax.Table`, by name. The padding row keeps its values.

    Returns:
      The table.

    Raises:
      KeyError: If there is no such name, or no or several tables of tokens to choose from.
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
        "`embax.from_state_dict(name=...)` must be given where there are several tables of tokens, got None and "
        f"{', '.join(map(repr, found))}. Pass one of these."
    )


def _array(value: Any) -> Array:
    """Read an array of NumPy, JAX or torch."""
    value = value.detach() if hasattr(value, "detach") else value  # of torch: it refuses where a gradient is recorded
    try:
        return jnp.asarray(np.asarray(value))
    except TypeError:  # torch's bfloat16, which NumPy does not have
        return jnp.array(jnp.from_dlpack(value))  # in memory of its own: a donated step writes into it
