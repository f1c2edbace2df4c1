import html.parser
import json
import re
import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread

from embax import maps
from embax.maps import _picture as _map_picture
from embax.vocabulary._vocabulary import printable

HOSTILE = [
    "</script><script>document.title = 'taken'</script>",
    "<!--",
    "<img src=x onerror=alert(1)>",
    "]]>",
    "&lt;&amp;",
    "a\u2028b\u2029c",
    "@script@ @title@",
    '"quoted" \\ \\u003c',
    "$x$ $",
    "\x1b[2J\x00\n",
    "\u202egnirts",
    "漢字",
]


class Parser(html.parser.HTMLParser):
    """Collects what is in scripts and which tags and attributes there are."""

    def __init__(self, page):
        super().__init__()
        self.scripts, self.tags, self.attributes, self._in_script = [], [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self._in_script = tag == "script"
        if self._in_script:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._in_script = False

    def handle_data(self, data):
        if self._in_script:
            self.scripts[-1] += data


def drawn_page(tmp_path, tokens, nearest=None, **texts):
    points = np.random.default_rng(0).normal(size=(len(tokens), 2))
    maps.draw_html(tmp_path / "map.html", tokens, points, nearest=nearest, **texts)
    page = Parser((tmp_path / "map.html").read_text("utf-8"))
    return page, json.loads(page.scripts[0])


def test_project_is_the_two_principal_components():
    weight = np.random.default_rng(0).normal(size=(40, 7)) * [5, 3, 1, 1, 1, 0.5, 0.1]
    centred = weight - weight.mean(axis=0)
    values, axes = np.linalg.eigh(centred.T @ centred)
    expected = centred @ axes[:, [-1, -2]]
    points = maps.project(weight)
    np.testing.assert_allclose(np.abs(points), np.abs(expected), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose((points**2).sum(axis=0), values[[-1, -2]])


def test_project_has_a_sign_that_does_not_depend_on_the_order_of_rows():
    weight = np.random.default_rng(1).normal(size=(30, 5))
    points = maps.project(weight)
    np.testing.assert_array_equal(points, maps.project(weight))
    np.testing.assert_allclose(maps.project(weight[::-1])[::-1], points, atol=1e-12)
    for axis in (0, 1):  # the axis itself, up to its length
        direction = (weight - weight.mean(axis=0)).T @ points[:, axis]
        assert direction[np.abs(direction).argmax()] > 0


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (1, 3), (2, 3), (3, 1), (3, 0), (1, 1)])
def test_project_of_few_vectors(shape):
    points = maps.project(np.arange(np.prod(shape), dtype=float).reshape(shape) ** 2)
    assert points.shape == (shape[0], 2)
    assert np.isfinite(points).all()


@pytest.mark.parametrize("scale", [1e300, 1e-300])
def test_project_of_extreme_scales(scale):
    weight = np.random.default_rng(2).normal(size=(9, 4))
    np.testing.assert_allclose(maps.project(weight * scale), maps.project(weight) * scale, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[np.nan, 0.0]],), r"project\(weight=...\)` must be finite, got NaN or infinity in row 0"),
        (([[1.0, 0.0], [np.inf, 0.0]],), "in row 1"),
        (([1.0, 2.0],), r"must have a vector for each point, \(points, dim\), got shape \(2,\)"),
        (([[1.0]], "tsne"), "must be one of 'pca', 'umap', got 'tsne'"),
        ((np.ones((4, 2)), "umap"), "must have 5 vectors or more for UMAP, got 4"),
    ],
)
def test_project_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        maps.project(*arguments)


def test_project_refuses_a_negative_seed():
    with pytest.raises(ValueError, match=r"project\(seed=...\)` must not be negative"):
        maps.project([[1.0]], seed=-1)


def test_project_without_umap_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ImportError, match=r'pip install "embax\[umap\]"'):
        maps.project(np.ones((9, 2)), "umap")


@pytest.mark.parametrize(("number", "neighbors"), [(5, 4), (16, 15), (40, 15)])
def test_project_asks_umap_for_cosines_and_a_seed(monkeypatch, number, neighbors):
    given = {}

    class Stand:
        def __init__(self, **options):
            given.update(options)

        def fit_transform(self, vectors):
            return vectors[:, :2]

    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=Stand))
    assert maps.project(np.ones((number, 3)), "umap", seed=7).shape == (number, 2)
    assert given == {"n_neighbors": neighbors, "metric": "cosine", "random_state": 7}


def test_png_has_all_points_and_labels_apart(tmp_path, monkeypatch):
    kept = {}
    thin = _map_picture._thin

    def remember(labels, axes, renderer, places):
        kept.update(labels=labels, axes=axes, renderer=renderer)
        return thin(labels, axes, renderer, places)

    monkeypatch.setattr(_map_picture, "_thin", remember)
    points = np.random.default_rng(3).normal(size=(300, 2)) * [1, 0.4]
    tokens = [f"token{row}" for row in range(300)]
    drawn = maps.draw_png(tmp_path / "map.png", tokens, points, title="A title", caption="A caption")
    assert imread(tmp_path / "map.png").shape[:2] == (1500, 2000)
    shown = [label for label in kept["labels"] if label.get_visible()]
    assert 100 < len(shown) == drawn < 300
    assert shown[0].get_text() == "token0"
    boxes = np.array([label.get_window_extent(kept["renderer"]).extents for label in shown])
    frame = kept["axes"].get_window_extent(kept["renderer"]).extents
    assert (boxes[:, :2] >= frame[:2]).all()
    assert (boxes[:, 2:] <= frame[2:]).all()
    overlap = (
        np.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    ).min(axis=-1)
    np.fill_diagonal(overlap, -1)
    assert (overlap <= 0.01).all()
    (dots,) = kept["axes"].collections
    places = kept["axes"].transData.transform(dots.get_offsets())
    assert len(places) == 300
    assert (places > frame[:2]).all()
    assert (places < frame[2:]).all()


def test_png_is_the_same_each_time(tmp_path):
    for name in ("one", "two"):
        maps.draw_png(tmp_path / name, ["a", "b"], [[0, 0], [1, 1]], title="t")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("number", [0, 1, 2])
def test_maps_of_few_points(tmp_path, number):
    tokens, points = ["a", "b"][:number], np.zeros((number, 2))
    maps.draw_png(tmp_path / "map.png", tokens, points)
    maps.draw_html(tmp_path / "map.html", tokens, points)
    assert json.loads(Parser((tmp_path / "map.html").read_text()).scripts[0])["points"] == points.tolist()


def test_maps_of_hostile_tokens_and_extreme_places(tmp_path):
    points = np.full((len(HOSTILE), 2), 1e308)
    points[::2] *= -1
    assert maps.draw_png(tmp_path / "map.png", HOSTILE, points, title=HOSTILE[-4], caption="$") > 0
    page, data = drawn_page(
        tmp_path, HOSTILE, [[(token, 0.5)] for token in HOSTILE], title=HOSTILE[0], caption=HOSTILE[2]
    )
    assert len(page.scripts) == 2
    assert "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]
    assert data["tokens"][0] == HOSTILE[0]
    assert data["tokens"][6] == "@script@ @title@"
    assert data["tokens"][9] == r"\x1b[2J\x00\n"
    assert data["nearest"][1] == [["<!--", 0.5]]


@settings(max_examples=60, deadline=None)
@given(tokens=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=5))
def test_html_holds_any_token_harmlessly(tmp_path_factory, tokens):
    page, data = drawn_page(tmp_path_factory.getbasetemp(), tokens)
    raw = page.scripts[0]
    assert len(page.scripts) == 2
    assert not re.search("[<>&\u2028\u2029]", raw)
    assert data["tokens"] == [printable(token) for token in tokens]


def test_html_loads_nothing(tmp_path):
    page, _ = drawn_page(tmp_path, ["a"])
    text = (tmp_path / "map.html").read_text()
    assert not {"link", "img", "iframe", "object", "base"} & set(page.tags)
    assert not re.search(r"https?:|fetch\(|XMLHttp|WebSocket|import\(|innerHTML|eval\(|url\(|@import", text)
    assert "default-src 'none'" in text


def test_html_fits_points_into_the_square_with_one_scale(tmp_path):
    maps.draw_html(tmp_path / "map.html", ["a", "b"], [[10.0, 5.0], [20.0, 7.0]])
    data = json.loads(Parser((tmp_path / "map.html").read_text()).scripts[0])
    np.testing.assert_allclose(data["points"], [[-1, -0.2], [1, 0.2]])
    assert data["nearest"] is None


@pytest.mark.parametrize("draw", [maps.draw_png, maps.draw_html])
@pytest.mark.parametrize("points", [[[0.0, 0.0]], [[0.0, np.nan], [0.0, 0.0]], [0.0, 0.0]])
def test_draw_refuses_points_that_are_not_finite_pairs(tmp_path, draw, points):
    with pytest.raises(ValueError, match=rf"{draw.__name__}\(points=...\)` must have two finite numbers for each of 2"):
        draw(tmp_path / "map", ["a", "b"], points)
    assert not list(tmp_path.iterdir())


def test_html_refuses_neighbours_of_others(tmp_path):
    with pytest.raises(ValueError, match=r"draw_html\(nearest=...\)` must have a list for each of 1 tokens, got 0"):
        maps.draw_html(tmp_path / "map.html", ["a"], [[0.0, 0.0]], nearest=[])


def test_png_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "embax\[map\]"'):
        maps.draw_png(tmp_path / "map.png", ["a"], [[0.0, 0.0]])
