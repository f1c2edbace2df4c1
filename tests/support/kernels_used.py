"""Native kernels: how often they run, and which a compiled program calls."""

import re

import jax

from embax._kernels.library import library


def calls(function, *args):
    """Call a function; its result, and how many kernels ran meanwhile."""
    count = library().native.embax_kernels_calls
    before = count()
    result = jax.block_until_ready(function(*args))
    return result, count() - before


def in_program(function, *args, **options):
    """The kernels that a program calls, in the order of its HLO; options are passed to `jax.jit`."""
    return re.findall(
        r'custom_call_target="embax_(\w+)"', jax.jit(function, **options).lower(*args).compile().as_text()
    )
