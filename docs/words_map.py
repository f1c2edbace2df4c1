"""Draws points with labels that do not cover each other, for pages with maps of vectors."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

# Where a label may be, in points from its own point, the best place first.
_PLACES = (
    ("left", 4, 2),
    ("right", -4, 2),
    ("center", 0, 6),
    ("center", 0, -13),
    ("left", 4, -10),
    ("right", -4, -10),
)


def draw(points: np.ndarray, kinds: Mapping[str, Sequence[str]]) -> Figure:
    """Draw the labels of several kinds at their points, a colour for each kind.

    Args:
      points: The point of each label, `(labels, 2)`, in the order of the kinds.
      kinds: The labels of each kind.

    Returns:
      The figure.
    """
    figure, axes = plt.subplots(figsize=(6.4, 5))
    numbers = np.repeat(np.arange(len(kinds)), [len(labels) for labels in kinds.values()])
    for number, kind in enumerate(kinds):
        axes.scatter(*points[numbers == number].T, 18, f"C{number}", label=kind)
    axes.set(xlabel="first principal component", ylabel="second principal component", aspect="equal")
    axes.margins(x=0.15)
    axes.legend()
    figure.canvas.draw()
    dots = axes.transData.transform(points)
    taken = [legend.get_window_extent() for legend in [axes.get_legend()] if legend]
    labels = [label for of_kind in kinds.values() for label in of_kind]
    for label, point, number in zip(labels, points, numbers, strict=True):
        tried = []
        for align, x, y in _PLACES:
            text = axes.annotate(
                label, point, (x, y), textcoords="offset points", ha=align, color=f"C{number}", fontsize=9
            )
            box = text.get_window_extent()
            covered = sum(box.overlaps(other) for other in taken) + sum(box.contains(*dot) for dot in dots)
            tried.append((covered, len(tried), text, box))
            if not covered:
                break
        best = min(tried, key=lambda found: found[:2])
        for found in tried:
            if found is not best:
                found[2].remove()
        taken.append(best[3])
    return figure
