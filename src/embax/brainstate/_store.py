"""Whether a state can be written in the current transformation."""

import sys

import brainstate
import jax
from jax.core import Tracer

# brainstate has no public function that tells whether one of its transformations is active. But the setter of a state
# that was made outside of all traces refuses a tracer if none is active. The high stack level keeps transformations
# from recording the probe.
with jax.ensure_compile_time_eval():
    _PROBE = brainstate.State(0)
_PROBE.stack_level = sys.maxsize


def inside_brainstate_transform(tracer: Tracer) -> bool:
    """Whether a transformation of brainstate is active, not only JAX's own."""
    try:
        _PROBE.value = tracer
    except brainstate.TraceContextError:
        return False
    _PROBE.value = 0
    return True
