"""Scratch: a mark for what holds memory that is kept from step to step and means nothing to a checkpoint."""


class Scratch:
    """A base of nodes that a checkpoint leaves out, as each storage has scratch memory of its own, or none."""

    __slots__ = ()
