"""Checks the annotations of embax at each call, for jaxtyping's import hook: a wrong shape or dtype fails a test.

Users' calls are the exception: a public function checks its arguments itself, with errors of its own, and tests call it
with wrong ones. Its result is checked, and so is everything that it hands to functions inside.
"""

import ast
import typing
from pathlib import Path

import beartype

SOURCE = Path(__file__).parents[2] / "src" / "embax"

# As static checkers have it, an int passes for a float.
_CHECK = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))


def _exported():
    """Module and name of everything that a public package exports."""
    for package in [SOURCE, *(path for path in SOURCE.iterdir() if path.is_dir() and path.name[0] != "_")]:
        here = ["embax", *package.relative_to(SOURCE).parts]
        (names, *_) = sorted(package.glob("__init__.py*"), reverse=True)  # a stub goes first
        for node in ast.walk(ast.parse(names.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                above = here[: len(here) + 1 - node.level]
                yield from ((".".join([*above, node.module]), name.name) for name in node.names if node.module)


_PUBLIC = frozenset(_exported())


def _is_public(function):
    """Whether users call a function."""
    name, *inner = function.__qualname__.split(".")
    is_private = any(part.startswith("_") and not part.startswith("__") for part in inner)
    return (function.__module__, name) in _PUBLIC and not is_private


def checked(function):
    """Check the arguments and the result of a function; of a public one, the result."""
    hints = function.__annotations__
    for name, hint in hints.items():
        # beartype knows the class only where it decorates one.
        if hint is typing.Self or (name != "return" and _is_public(function)):
            hints[name] = object
    return _CHECK(function)
