"""Programs for meshes: the exhaustive run compiles them anew."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


def _use_cache(use):
    compilation_cache.reset_cache()  # JAX looks at the setting once
    jax.config.update("jax_enable_compilation_cache", use)


@pytest.fixture(autouse=True)
def _compiled_anew(request):
    """Turn the compilation cache off for an exhaustive test.

    A program that XLA reads from the cache of a CPU no longer orders collectives inside of a loop beside those outside
    of it, and may hang. Exhaustive tests have many of both in one program.
    """
    is_exhaustive = request.node.get_closest_marker("exhaustive") is not None
    if is_exhaustive:
        _use_cache(False)
    yield
    if is_exhaustive:
        _use_cache(True)
