"""Maps: vectors as points in a plane, drawn as a picture or as a page to explore."""

import base64
import hashlib
import html
import importlib.resources
import json
import os
import re
import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike

from .._base import check as _check
from ..files import replacing
from ..vocabulary._vocabulary import printable
from ._picture import checked
from ._picture import draw_png as draw_png

# UMAP's own default; of fewer points, as many as there are others.
_UMAP_NEIGHBORS = 15
# UMAP places points by eigenvectors, of which it needs one more than there are axes, and some points besides.
_UMAP_LEAST = 5


def project(
    weight: ArrayLike, method: Literal["pca", "umap"] = "pca", *, seed: int = 0
) -> Float64[np.ndarray, "points 2"]:
    """Place vectors in a plane.

    Args:
      weight: One vector a point, `(points, dim)`.
      method: `"pca"`, the two directions in which the vectors differ most, exactly; or `"umap"`, which keeps
        neighbours by cosine together and needs `embax[umap]`.
      seed: Of the random numbers that UMAP uses. The same seed gives the same points on the same machine.

    Returns:
      A place for each. Those of PCA are in units of the vectors, around 0; the vector's greatest part of either axis
      has a positive sign, so that the same vectors give the same picture.

    Raises:
      ImportError: If UMAP is asked for and not installed.
      ValueError: If the vectors are not of that shape or hold NaN or infinity, there are fewer than 5 for UMAP, or the
        method is unknown.

    Example:
      >>> import embax.maps
      >>> embax.maps.project([[0.0, 0.0, 4.0], [0.0, 2.0, 0.0], [0.0, 0.0, -4.0]]).round(2).tolist()
      [[4.0, -0.67], [0.0, 1.33], [-4.0, -0.67]]

    References:
      McInnes, Healy & Melville, UMAP: Uniform Manifold Approximation and Projection for Dimension Reduction, 2018,
      https://arxiv.org/abs/1802.03426.
    """
    method = _check.choice("embax.maps.project(method=...)", method, ("pca", "umap"))
    seed = _check.size("embax.maps.project(seed=...)", seed)
    vectors = np.asarray(weight, np.float64)
    if vectors.ndim != 2:
        raise ValueError(
            f"`embax.maps.project(weight=...)` must have a vector a point, (points, dim), got shape {vectors.shape}. "
            "Reshape it."
        )
    if not np.isfinite(vectors).all():
        row = int(np.argmin(np.isfinite(vectors).all(axis=1)))
        raise ValueError(
            f"`embax.maps.project(weight=...)` must be finite, got NaN or infinity in row {row}. Leave the row out."
        )
    return _components(vectors) if method == "pca" else _umap(vectors, seed)


def draw_html(
    path: str | os.PathLike[str],
    tokens: Sequence[str],
    points: ArrayLike,
    *,
    title: str = "",
    caption: str = "",
    nearest: Sequence[Sequence[tuple[str, float]]] | None = None,
) -> None:
    """Draw points with their tokens as a page to move about, zoom and search in.

    It is one file that loads nothing, and that no token can make run anything.

    Args:
      path: The file to write.
      tokens: The label of each point.
      points: Their places, `(points, 2)`.
      title: What stands above.
      caption: What stands beside it.
      nearest: For each token its neighbours and their cosines, as of `Vectors.most_similar_batch`; shown beside a
        token that is pointed at.

    Raises:
      ValueError: If there is not one finite point, and one list of neighbours, a token.
      OSError: If the file cannot be written.

    Example:
      >>> import embax.maps, pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp(), "map.html")
      >>> embax.maps.draw_html(path, ["king", "queen"], [[0.0, 0.0], [1.0, 0.5]], title="Royals")
      >>> "<title>Royals</title>" in path.read_text()
      True
    """
    places = checked("embax.maps.draw_html(points=...)", tokens, points)
    if nearest is not None and len(nearest) != len(tokens):
        raise ValueError(
            f"`embax.maps.draw_html(nearest=...)` must have a list for each of {len(tokens)} tokens, got "
            f"{len(nearest)}. Pass one a token."
        )
    folder = importlib.resources.files("embax.maps")
    script = folder.joinpath("map.js").read_text("utf-8")
    style = folder.joinpath("map.css").read_text("utf-8")
    data = {
        "tokens": [printable(token) for token in tokens],
        "points": _unit_square(places).round(5).tolist(),
        "nearest": None
        if nearest is None
        else [[[printable(token), round(float(cosine), 3)] for token, cosine in found] for found in nearest],
    }
    parts = {
        "title": html.escape(printable(title)),
        "caption": html.escape(printable(caption)),
        "style": style,
        "script": script,
        "style_hash": _hash(style),
        "script_hash": _hash(script),
        "data": _harmless(json.dumps(data, separators=(",", ":"))),
    }
    # In one pass, so that nothing put in is replaced in turn.
    page = re.sub(r"@(\w+)@", lambda found: parts[found[1]], folder.joinpath("map.html").read_text("utf-8"))
    with replacing(path) as file:
        file.write(page.encode("utf-8"))


def _components(vectors: Float64[np.ndarray, "points dim"]) -> Float64[np.ndarray, "points 2"]:
    # The largest entry is taken out first, so that no square leaves the range.
    largest = np.abs(vectors).max(initial=0) or 1.0
    centred = vectors / largest
    if len(centred):
        centred = centred - centred.mean(axis=0)
    left, lengths, right = np.linalg.svd(centred, full_matrices=False)
    left, lengths, right = left[:, :2], lengths[:2], right[:2]
    greatest = np.abs(right).argmax(axis=1) if right.size else np.zeros(len(right), int)
    signs = np.where(right[np.arange(len(right)), greatest] < 0, -1.0, 1.0) if right.size else np.ones(len(right))
    points = np.zeros((len(vectors), 2))
    points[:, : len(lengths)] = left * (lengths * signs * largest)
    return points


def _umap(vectors: Float64[np.ndarray, "points dim"], seed: int) -> Float64[np.ndarray, "points 2"]:
    if len(vectors) < _UMAP_LEAST:
        raise ValueError(
            f"`embax.maps.project(weight=...)` must have {_UMAP_LEAST} vectors or more for UMAP, got {len(vectors)}. "
            'Take method="pca".'
        )
    neighbors = min(_UMAP_NEIGHBORS, len(vectors) - 1)
    with warnings.catch_warnings():
        # It tells that it does without TensorFlow, and that a seed takes away its threads.
        warnings.simplefilter("ignore")
        try:
            import umap  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ImportError('UMAP needs umap-learn, which is missing. pip install "embax[umap]".') from None
        model = umap.UMAP(n_neighbors=neighbors, metric="cosine", random_state=seed)
        return np.asarray(model.fit_transform(vectors.astype(np.float32)), np.float64)


def _unit_square(places: Float64[np.ndarray, "points 2"]) -> Float64[np.ndarray, "points 2"]:
    """Move points into [-1, 1], with the same scale along both axes."""
    if not len(places):
        return places
    low, high = places.min(axis=0), places.max(axis=0)
    half = ((high - low) / 2).max()
    return (places - (low + high) / 2) / (half if half > 0 else 1.0)


def _harmless(text: str) -> str:
    """Spell JSON so that nothing in it ends or begins anything in a page; U+2028 and the like are ASCII already."""
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _hash(text: str) -> str:
    """What a page's policy calls a script or a style that may be in it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
