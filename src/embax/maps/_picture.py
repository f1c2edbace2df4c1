"""draw_png: a map as a picture, by matplotlib."""

import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike

from ..files import replacing
from ..vocabulary._vocabulary import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backend_bases import RendererBase
    from matplotlib.text import Text

# In inches and dots per inch: 2000 x 1500 dots.
_SIZE, _DPI = (12.5, 9.375), 160
_INK, _QUIET, _DOT, _PAPER = "#1c2430", "#6b7684", "#2f6db5", "#fbfbf9"
# The positions of a label around its point: a shift in units of its width and height, and the direction of a gap.
_PLACES = ((0, -0.5, 1, 0), (-1, -0.5, -1, 0), (-0.5, 0, 0, 1), (-0.5, -1, 0, -1))
_PLACES += ((0, 0, 0.7, 0.7), (-1, 0, -0.7, 0.7), (0, -1, 0.7, -0.7), (-1, -1, -0.7, -0.7))


def draw_png(
    path: str | os.PathLike[str],
    tokens: Sequence[str],
    points: ArrayLike,
    *,
    title: str = "",
    caption: str = "",
) -> int:
    """Draw points with their tokens as a picture of 2000 x 1500 dots.

    All points are drawn. A label is drawn if there is room beside its point; earlier tokens take precedence.

    Args:
      path: The file to write.
      tokens: The label of each point.
      points: The places of the tokens, `(points, 2)`.
      title: A title above the picture.
      caption: A text below it.

    Returns:
      The number of labels drawn.

    Raises:
      ImportError: If matplotlib is not installed: `pip install "embax[map]"`.
      ValueError: If there is not exactly one finite point for each token.
      OSError: If the file cannot be written.

    Example:
      >>> import embax.maps, pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp(), "map.png")
      >>> embax.maps.draw_png(path, ["king", "queen"], [[0.0, 0.0], [1.0, 0.5]])
      2
    """
    places = checked("embax.maps.draw_png(points=...)", tokens, points)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('a map as .png needs matplotlib, which is missing. pip install "embax[map]".') from None
    figure = Figure(figsize=_SIZE, dpi=_DPI, facecolor=_PAPER)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.03, 0.05, 0.94, 0.87), facecolor=_PAPER)
    axes.set(xticks=[], yticks=[])
    _frame(axes, places)
    for side in axes.spines.values():
        side.set_color("#d8dbd6")
    figure.text(0.03, 0.945, printable(title), fontsize=17, fontweight="bold", color=_INK, parse_math=False)
    figure.text(0.03, 0.018, printable(caption), fontsize=10, color=_QUIET, parse_math=False)
    # `parse_math=False`: dollar signs in a token do not mean mathematics.
    with warnings.catch_warnings():
        # The font lacks some scripts, and draws boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        labels = [
            axes.text(x, y, printable(token), fontsize=9, va="bottom", zorder=3, color=_INK, parse_math=False)
            for token, (x, y) in zip(tokens, places, strict=True)
        ]
        axes.scatter(places[:, 0], places[:, 1], s=14, color=_DOT, alpha=0.75, linewidths=0, zorder=2)
        drawn = _thin(labels, axes, canvas.get_renderer(), places)
        with replacing(path) as file:
            figure.savefig(file, format="png", dpi=_DPI, facecolor=_PAPER, metadata={"Software": None})
    return drawn


def checked(argument: str, tokens: Sequence[str], points: ArrayLike) -> Float64[np.ndarray, "points 2"]:
    """Check that there is a finite place for each token, and scale the places to [-1, 1]."""
    places = np.asarray(points, np.float64)
    if places.shape != (len(tokens), 2) or not np.isfinite(places).all():
        raise ValueError(
            f"`{argument}` must have two finite numbers for each of {len(tokens)} tokens, got shape {places.shape}. "
            "Leave out those without a place."
        )
    return places / (np.abs(places).max(initial=0) or 1.0)


def _frame(axes: "Axes", places: Float64[np.ndarray, "points 2"]) -> None:
    """Set the limits of the axes: all points visible, one scale for both axes, and some room for labels."""
    low, high = (places.min(axis=0), places.max(axis=0)) if len(places) else (np.zeros(2), np.zeros(2))
    width, height = np.asarray(_SIZE) * axes.get_position().bounds[2:]
    half = 1.12 * max((high[0] - low[0]) / width, (high[1] - low[1]) / height) / 2 or 0.5
    middle = (low + high) / 2
    axes.set(xlim=middle[0] + np.array([-half, half]) * width, ylim=middle[1] + np.array([-half, half]) * height)


def _thin(labels: list["Text"], axes: "Axes", renderer: "RendererBase", places: Float64[np.ndarray, "points 2"]) -> int:
    """Move each label to a position where it covers no other, or hide it if there is none.

    Returns:
      The number of visible labels.
    """
    frame, gap = axes.get_window_extent(renderer), 0.055 * _DPI
    dots = axes.transData.transform(places) if len(places) else places
    radius = 0.012 * _DPI
    taken = np.empty((2 * len(labels), 4))  # left, bottom, right, top of the points, then of drawn labels
    taken[: len(labels)] = np.concatenate([dots - radius, dots + radius], axis=1)
    drawn = 0
    for label, (x, y) in zip(labels, dots, strict=True):
        box = label.get_window_extent(renderer)
        label.set_visible(False)
        for right, up, off_x, off_y in _PLACES:
            left, bottom = x + right * box.width + off_x * gap, y + up * box.height + off_y * gap
            edges = left, bottom, left + box.width, bottom + box.height
            outside = edges[0] < frame.x0 or edges[1] < frame.y0 or edges[2] > frame.x1 or edges[3] > frame.y1
            others = taken[: len(labels) + drawn]
            apart = (others[:, 0] > edges[2]) | (others[:, 2] < edges[0])
            apart |= (others[:, 1] > edges[3]) | (others[:, 3] < edges[1])
            if not outside and apart.all():
                taken[len(labels) + drawn] = edges
                drawn += 1
                label.set(visible=True, position=axes.transData.inverted().transform((left, bottom)))
                break
    return drawn
