"""A check for leaked tracers that takes no longer where much has been allocated before."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import jax


@contextmanager
def checking_leaks() -> Iterator[None]:
    """As `jax.checking_leaks`, whose many collections of garbage leave out what is older than the block."""
    gc.freeze()
    try:
        with jax.checking_leaks():
            yield
    finally:
        gc.unfreeze()
