"""Whether a state can be written here."""

import sys

import brainstate
import jax
from jax.core import Tracer

# brainstate has no public question for 'is one of your transformations active?', but the setter of a state from outside
# of all traces refuses a tracer where none is. At this level no transformation records what happens to the probe.
with jax.ensure_compile_time_eval():
    _PROBE = brainstate.State(0)
_PROBE.stack_level = sys.maxsize


def inside_brainstate_transform(tracer: Tracer) -> bool:
    """Tell whether a transformation of brainstate's, not of JAX's alone, is active."""
    try:
        _PROBE.value = tracer
    except brainstate.TraceContextError:
        return False
    _PROBE.value = 0
    return True
