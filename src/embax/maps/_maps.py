"""project and draw_html: place vectors in a plane, and draw them as an interactive page."""

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

# UMAP's own default; with fewer points, all others are neighbours.
_UMAP_NEIGHBORS = 15
# UMAP's initial places are eigenvectors, one more than there are axes, for which it needs a few points more.
_UMAP_LEAST = 5


def project(
    weight: ArrayLike, method: Literal["pca", "umap"] = "pca", *, seed: int = 0
) -> Float64[np.ndarray, "points 2"]:
    """Place vectors in a plane.

    Args:
      weight: One vector for each point, `(points, dim)`.
      method: `"pca"`: the two directions of the largest variance, computed exactly. `"umap"`: keeps neighbours by
        cosine together; requires `embax[umap]`.
      seed: The seed of UMAP's random numbers. The same seed gives the same points on the same machine.

    Returns:
      A place for each vector. With PCA, places are in units of the vectors, around 0; each axis is oriented so that its
      largest component is positive, so the same vectors give the same picture.

    Raises:
      ImportError: If UMAP is requested and not installed.
      ValueError: If the vectors have another shape, NaN or infinity, if there are fewer than 5 for UMAP, or the method
        is unknown.

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
            f"`embax.maps.project(weight=...)` must have a vector for each point, (points, dim), got shape "
            f"{vectors.shape}. Reshape it."
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
    """Draw points with their tokens as an HTML page with panning, zoom and search.

    The page is one file that loads nothing. Tokens are escaped, so that they cannot run code in it.

    Args:
      path: The file to write.
      tokens: The label of each point.
      points: The places of the tokens, `(points, 2)`.
      title: The title of the page.
      caption: A text beside the title.
      nearest: The neighbours and cosines of each token, from `Vectors.most_similar_batch`; shown when the pointer is at
        a token.

    Raises:
      ValueError: If there is not exactly one finite point, and one list of neighbours, for each token.
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
            f"{len(nearest)}. Pass one for each token."
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
    # In one pass, so that inserted text is not searched for placeholders again.
    page = re.sub(r"@(\w+)@", lambda found: parts[found[1]], folder.joinpath("map.html").read_text("utf-8"))
    with replacing(path) as file:
        file.write(page.encode("utf-8"))


def _components(vectors: Float64[np.ndarray, "points dim"]) -> Float64[np.ndarray, "points 2"]:
    # Divide by the largest entry first, so that no square overflows or underflows.
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
        # It warns about missing TensorFlow, and that a seed disables its threads.
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
    """Escape JSON so that it cannot end its script element or begin another one; json.dumps wrote only ASCII."""
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _hash(text: str) -> str:
    """The hash by which the page's content security policy allows a script or a style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
