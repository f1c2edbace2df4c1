"""Embedding tables for JAX: the public names.

`__init__.pyi` lists them. Each is loaded at its first use, so that the command line answers before JAX is there.
"""

import lazy_loader as _lazy_loader

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = _lazy_loader.attach_stub(__name__, __file__)
