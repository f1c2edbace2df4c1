"""Draws the packages of embax on their floors, from the imports in the sources: each leans on lower ones only."""

import ast
from pathlib import Path

import matplotlib.pyplot as plt

import embax

SOURCES = Path(embax.__file__).parent


def imports():
    """Map each package to the packages that its modules import, lazily or not; types alone do not count."""
    found = {}
    for path in SOURCES.rglob("*.py"):
        here = path.relative_to(SOURCES).with_suffix("").parts
        if here == ("__init__",):
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom):
                name = _absolute(here, node)
                found.setdefault(here[0], set()).update({name} - {None, here[0], "__init__"})
    return found


def _absolute(here, node):
    """The package of embax that an import names, or None."""
    if node.level == 0:
        parts = (node.module or "").split(".")
        return parts[1] if parts[0] == "embax" and len(parts) > 1 else None
    base = here[: len(here) - node.level]
    parts = [*base, *(node.module or "").split(".")] if node.module else [*base, node.names[0].name]
    return parts[0] if parts else None


def floors(found):
    """Number the floor of each package: one above the highest that it imports."""

    def floor(name):
        return 1 + max((floor(below) for below in found.get(name, ())), default=-1)

    return {name: floor(name) for name in {*found, *(x for below in found.values() for x in below)}}


def draw():
    """Draw them; an arrow to each package that no other arrow implies."""
    found = imports()
    at, rows = floors(found), {}
    for name, floor in sorted(at.items()):
        rows.setdefault(floor, []).append(name)
    figure, axes = plt.subplots(figsize=(8, 1 + len(rows)), layout="constrained")
    place = {name: ((i + 1) / (len(names) + 1), floor) for floor, names in rows.items() for i, name in enumerate(names)}
    for name, below in found.items():
        implied = {y for x in below for y in _reached(found, x)}
        for other in below - implied:
            arrow = {"arrowstyle": "-|>", "color": "0.6", "shrinkA": 12, "shrinkB": 12}
            axes.annotate("", place[other], place[name], arrowprops=arrow)
    for name, (x, y) in place.items():
        box = {"boxstyle": "round,pad=0.4", "facecolor": "white" if name.startswith("_") else "#dbeafe"}
        axes.text(x, y, name, ha="center", va="center", bbox=box)
    axes.set(xlim=(0, 1), ylim=(-0.6, len(rows) - 0.4))
    axes.axis("off")
    return figure


def _reached(found, name):
    """The packages that a package imports, and all that these do."""
    below = found.get(name, set())
    return below | {y for x in below for y in _reached(found, x)}
