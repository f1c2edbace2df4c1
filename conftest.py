"""Strict JAX settings for all tests, and the examples of docstrings and pages as tests."""

import jax
from sybil import Sybil
from sybil.document import PythonDocStringDocument
from sybil.parsers.markdown import PythonCodeBlockParser
from sybil.parsers.rest import DocTestParser

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

pytest_collect_file = (
    Sybil(parsers=[PythonCodeBlockParser()], patterns=["*.md"])
    + Sybil(path="src", parsers=[DocTestParser()], patterns=["*.py"], document_types={".py": PythonDocStringDocument})
).pytest()
