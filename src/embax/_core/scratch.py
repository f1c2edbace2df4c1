"""Scratch: marks nodes whose arrays are reused from step to step but mean nothing, so no checkpoint saves them."""


class Scratch:
    """Base of pytree nodes that checkpoints leave out: each storage makes scratch memory of its own, or none."""

    __slots__ = ()
