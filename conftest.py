"""Strict JAX settings for all tests, and the examples of docstrings and pages as tests."""

import jax
from sybil import Sybil
from sybil.document import PythonDocStringDocument
from sybil.parsers.markdown import PythonCodeBlockParser
from sybil.parsers.rest import DocTestParser

jax.config.update("jax_num_cpu_devices", 4)


def _promote(dtypes: str, ranks: str) -> None:
    jax.config.update("jax_numpy_dtype_promotion", dtypes)
    jax.config.update("jax_numpy_rank_promotion", ranks)


def _strict(namespace=None):
    _promote("strict", "raise")


def _as_users_have_it(namespace):
    """Examples run under the defaults of JAX, which optax relies on, too."""
    _promote("standard", "allow")


_strict()
_SETTINGS = {"setup": _as_users_have_it, "teardown": _strict}

pytest_collect_file = (
    Sybil(parsers=[PythonCodeBlockParser()], patterns=["*.md"], **_SETTINGS)
    + Sybil(
        path="src",
        parsers=[DocTestParser()],
        patterns=["*.py"],
        document_types={".py": PythonDocStringDocument},
        **_SETTINGS,
    )
).pytest()
