"""Strict JAX settings for all tests, and the examples of docstrings and pages as tests."""

import collections
import ctypes
import gc
import os
from pathlib import Path

import jax
import jaxtyping
import pytest
from sybil import Sybil
from sybil.document import PythonDocStringDocument
from sybil.parsers.markdown import PythonCodeBlockParser
from sybil.parsers.rest import DocTestParser

# Where compiled programs are kept: for the next run, for the other processes of this run, and for those that tests
# start, which read the variables. The first variable may name another folder.
_CACHE = os.path.abspath(os.environ.get("JAX_COMPILATION_CACHE_DIR", Path(__file__).parent / "build" / "compiled"))
os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
jax.config.update("jax_compilation_cache_dir", _CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# `make test` runs the examples of the docstrings, and some tests, with the annotations of all functions checked at each
# call. It has to be said before embax is imported.
if os.environ.get("EMBAX_ANNOTATIONS"):
    jaxtyping.install_import_hook("embax", "annotations.checked")

# A test runs most programs once, so optimising their machine code costs more than it saves. By `XLA_FLAGS= make test`,
# the tests run the machine code that users have.
_QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_parallel_codegen_split_count": 1,
}
# XLA has two ways to fuse up to jax 0.10; this one compiles faster.
_FUSIONS = "xla_cpu_use_fusion_emitters"
if jax.__version_info__ < (0, 11):
    _QUICK[_FUSIONS] = False
_FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in _QUICK.items())
_compile = jax.stages.Lowered.compile


def _compile_to_look_at(self, compiler_options=None, **options):
    """A test that compiles ahead of time looks at the memory or the HLO of a program: these are of users' fusions."""
    return _compile(self, {_FUSIONS: True, **(compiler_options or {})}, **options)


# A process that runs tests for another one finds the flags set by it.
if os.environ.setdefault("XLA_FLAGS", _FLAGS) == _FLAGS and _FUSIONS in _QUICK:
    jax.stages.Lowered.compile = _compile_to_look_at
jax.config.update("jax_num_cpu_devices", 8)


def _promote(dtypes: str, ranks: str) -> None:
    jax.config.update("jax_numpy_dtype_promotion", dtypes)
    jax.config.update("jax_numpy_rank_promotion", ranks)


def _strict(namespace=None):
    _promote("strict", "raise")


def _as_users_have_it(namespace):
    """Examples run under the defaults of JAX, which optax relies on, too."""
    _promote("standard", "allow")


def _with_standard_dtypes():
    """Dtypes are promoted as users have it, which optax relies on."""
    with jax.numpy_dtype_promotion("standard"):
        yield


standard_promotion = pytest.fixture(_with_standard_dtypes)
standard_promotion_of_module = pytest.fixture(_with_standard_dtypes, scope="module")


@pytest.fixture
def users_promotion():
    """Dtypes and ranks are promoted as users have it, which layers of other libraries and Orbax rely on."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


# JAX keeps millions of objects that live long; to walk over all of them time and again took an eighth of a run.
gc.set_threshold(1_000_000, 20, 100)


def pytest_collection_finish():
    gc.freeze()  # what is imported lives to the end


# How much memory a process may hold, 2.25 GiB, before it lets go of the programs that it has compiled. Those of the
# whole suite would add up to many GB.
_MOST = 9 << 28


def pytest_runtest_logfinish():
    pages = Path("/proc/self/statm")
    if pages.exists() and int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > _MOST:
        jax.clear_caches()
        gc.collect()
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # of glibc, which keeps what is freed
            trim(0)


def pytest_unconfigure():
    # pytest then collects garbage five times over, to find errors in finalizers; once is enough for what still lives.
    gc.collect()
    gc.freeze()


_strict()
_SETTINGS = {"setup": _as_users_have_it, "teardown": _strict}

# The tests that a second Python runs, too: those that begin with one of these, and why.
_VERSIONS = {
    "tests/cli/": "typer, rich and the interpreter's own streams",
    "tests/core/test_compiled.py": "the HLO and the memory of XLA's programs",
    "tests/files/": "NumPy's, pyarrow's and the interpreter's readers of text, numbers and archives",
    "tests/vectors/test_vectors.py": "NumPy's, pyarrow's and the interpreter's readers of text, numbers and archives",
    "tests/vocabulary/": "NumPy's and pyarrow's arrays of text",
    "tests/gradients/test_grad.py::test_uses": "the form of JAX's backward programs",
    "tests/gradients/test_grad_followed.py": "the form of JAX's backward programs",
    "tests/gradients/test_grad_parts.py": "the form of JAX's backward programs",
    "tests/gradients/test_second_derivatives.py": "how JAX takes programs apart",
    "tests/gradients/test_grad_program.py": "the form of JAX's backward programs, their effects and memory",
    "tests/layers/test_framework_programs.py::test_training": "each framework's own states and transformations",
    "tests/brainstate/test_interop.py": "conversion between the frameworks",
    "tests/optim/test_chosen_layers.py": "each framework's own layers and transformations",
    "tests/optim/test_lift_compiled.py": "the HLO and the memory of XLA's programs",
    "tests/project/": "imports and documentation",
    "tests/sharding/test_plan.py::test_plan": "the HLO of XLA's collectives",
    "tests/mesh/test_compiled.py": "the HLO of XLA's collectives",
    "tests/train/test_corpus.py": "the interpreter's Unicode tables",
}
# The tests that run without native kernels, too, and why; `make test` runs all with kernels, where they are installed.
_XLA = {
    "tests/core/test_compiled.py": "the HLO and the memory of XLA's programs",
    "tests/core/test_lookup.py": "gathers",
    "tests/core/test_low_precision.py": "scatters of bfloat16",
    "tests/core/test_renormalize.py": "scatters",
    "tests/core/test_storage.py": "all that a storage does",
    "tests/bags/test_bag_compiled.py": "the HLO and the memory of XLA's programs",
    "tests/bags/test_bag_numbers.py": "loops over the places of bags",
    "tests/gradients/test_rows.py": "sums of duplicates",
    "tests/kernels/test_library.py": "where there is no library",
    "tests/optim/test_lift_compiled.py": "the HLO and the memory of XLA's programs",
    "tests/optim/test_rowwise.py": "sums of duplicates by slots",
}
_EXAMPLES = "examples print arrays, errors and objects of other libraries"


def _reason(table, item):
    """Why a table has a test; None if it does not."""
    return next((reason for start, reason in table.items() if item.nodeid.startswith(start)), None)


# How long each file took in the last run that had it, in seconds. The longest come first, so that no process works on
# alone at the end; a file that is new counts by its tests.
_KEPT = "embax/seconds"
_seconds = collections.Counter()


def _file(nodeid):
    return nodeid.partition("::")[0]


def pytest_runtest_logreport(report):
    _seconds[_file(report.nodeid)] += report.duration


def _kept(config):
    return config.cache.get(_KEPT, {}) if hasattr(config, "cache") else {}  # there is none by `-p no:cacheprovider`


def pytest_sessionfinish(session):
    config = session.config
    # A process that xdist starts sees a part alone.
    if hasattr(config, "cache") and not hasattr(config, "workerinput"):
        config.cache.set(_KEPT, {**_kept(config), **_seconds})


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out tests by their marks
def pytest_collection_modifyitems(config, items):
    tests = collections.Counter(_file(item.nodeid) for item in items)
    seconds = {file: 0.05 * number for file, number in tests.items()} | _kept(config)
    items.sort(key=lambda item: -seconds[_file(item.nodeid)])
    for item in items:
        is_example = not isinstance(item, pytest.Function)  # of a page or a docstring
        if reason := _reason(_VERSIONS, item) or (_EXAMPLES if is_example else None):
            item.add_marker(pytest.mark.versions(reason))
        if reason := _reason(_XLA, item):
            item.add_marker(pytest.mark.xla(reason))


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
