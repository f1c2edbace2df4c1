"""Strict JAX settings for all tests, and the examples of docstrings and pages as tests."""

import ctypes
import gc
import os
from pathlib import Path

import jax
import pytest
from sybil import Sybil
from sybil.document import PythonDocStringDocument
from sybil.parsers.markdown import PythonCodeBlockParser
from sybil.parsers.rest import DocTestParser

# What a test runs once need not be fast machine code, which takes most of the time of a test to make. XLA takes these
# flags up to jax 0.10; on newer ones, or by `XLA_FLAGS= make test`, the tests run in the machine code that users have.
_QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
_AS_SHIPPED = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_use_fusion_emitters": True,
    "xla_cpu_parallel_codegen_split_count": 32,
}
_compile = jax.stages.Lowered.compile


def _compile_as_shipped(self, compiler_options=None, **options):
    """A program that a test compiles ahead of time is one that it looks at: no haste with these."""
    return _compile(self, {**_AS_SHIPPED, **(compiler_options or {})}, **options)


# Where few cores are busy with much else, one of 8 devices may come to a collective a minute after the first. XLA would
# end the process after 40 seconds.
_PATIENT = {"xla_cpu_collective_call_terminate_timeout_seconds": 900}
_IS_QUICK = jax.__version_info__ < (0, 11)
# A process that runs tests for another one finds the flags set by it.
_CHOSEN = _PATIENT | _QUICK if _IS_QUICK else _PATIENT
_FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in _CHOSEN.items())
if os.environ.setdefault("XLA_FLAGS", _FLAGS) == _FLAGS and _IS_QUICK:
    jax.stages.Lowered.compile = _compile_as_shipped
jax.config.update("jax_num_cpu_devices", 8)


def _promote(dtypes: str, ranks: str) -> None:
    jax.config.update("jax_numpy_dtype_promotion", dtypes)
    jax.config.update("jax_numpy_rank_promotion", ranks)


def _strict(namespace=None):
    _promote("strict", "raise")


def _as_users_have_it(namespace):
    """Examples run under the defaults of JAX, which optax relies on, too."""
    _promote("standard", "allow")


# What a process may hold of memory, in bytes, before it lets go of the programs that it has compiled. The whole suite
# would add up to 16 GB of them.
_MOST = 3 << 30


@pytest.fixture(autouse=True, scope="module")
def _let_go_of_programs():
    yield
    pages = Path("/proc/self/statm")
    if pages.exists() and int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > _MOST:
        jax.clear_caches()
        gc.collect()
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # of glibc, which keeps what is freed
            trim(0)


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
