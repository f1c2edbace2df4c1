"""Film ratings: who rates what how, learned from users, films and the films' genres, with tables trained row by row.

The model is a matrix factorisation whose film vector is that of the film plus the mean of its genres',

  rating = mean + b_user + b_film + mean(b_genre) + p_user . (q_film + mean(g_genre)),

so that a film with few ratings starts from what its genres are like. All tables are in one Collection. It prints the
test error beside that of the mean rating and of the same factorisation without genres, and the nearest films of a few
well-known ones, and writes the films' vectors for `embax neighbors`.

`film_ratings.py` reads the data. Needs `pip install "embax[examples]"`; `make movielens` does that, too.
"""

import argparse
import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import film_ratings
import jax
import jax.numpy as jnp
import numpy as np
import pandas
import rich
from rich.table import Table as Printed

import embax

DIM, BATCH, EPOCHS, LEARNING_RATE, PENALTY = 64, 512, 20, 0.05, 0.1
OFTEN = 50  # ratings, of a film that is well known
WELL_KNOWN = (
    "Toy Story (1995)",
    "Star Wars: Episode IV - A New Hope (1977)",
    "Godfather, The (1972)",
    "Pulp Fiction (1994)",
    "Shawshank Redemption, The (1994)",
)


class Ratings(NamedTuple):
    """Ratings, as arrays."""

    users: np.ndarray  # int32 (ratings,)
    films: np.ndarray  # int32 (ratings,)
    stars: np.ndarray  # float32 (ratings,), from 0.5 to 5


class Films(NamedTuple):
    """What is known of each film."""

    titles: list[str]  # (films,), with the year, no two the same
    genres: np.ndarray  # int32 (films, most), 0 where there is no further genre
    genre_count: int  # with the padding row


def load() -> tuple[Ratings, Films, int]:
    """Return the ratings, the films and the number of users."""
    data = film_ratings.load()
    users, user_ids = pandas.factorize(data["userId"])
    films, film_ids = pandas.factorize(data["movieId"])
    about = data.drop_duplicates("movieId").set_index("movieId").loc[film_ids]
    titles, seen = [], set()
    for film, title, year in zip(film_ids, about["title"], about["year"], strict=True):
        name = f"film {film}" if pandas.isna(title) else f"{title} ({year:.0f})"
        titles.append(f"{name} #{film}" if name in seen else name)
        seen.add(name)
    lists = [genres.split("|") for genres in about["genres"]]
    names = sorted({name for genres in lists for name in genres})
    number = {name: i for i, name in enumerate(names, 1)}
    genres = np.zeros((len(lists), max(map(len, lists))), np.int32)
    for row, of_film in zip(genres, lists, strict=True):
        row[: len(of_film)] = [number[name] for name in of_film]
    ratings = Ratings(users.astype(np.int32), films.astype(np.int32), data["rating"].to_numpy(np.float32))
    return ratings, Films(titles, genres, len(names) + 1), len(user_ids)


def model(key: jax.Array, users: int, films: Films, with_genres: bool) -> embax.Collection:
    """Make the tables: a vector and a bias for each user, film and genre."""
    rows = {"user": users, "film": len(films.titles), "genre": films.genre_count}
    names = ("user", "film", "genre") if with_genres else ("user", "film")
    init = jax.nn.initializers.normal(0.1)
    tables, features = {}, []
    for name, part in zip(names, jax.random.split(key, len(names)), strict=True):
        padding = 0 if name == "genre" else None
        mode = "mean" if name == "genre" else None
        tables[name] = embax.Table.create(part, rows[name], DIM, init=init, padding_idx=padding)
        tables[f"{name}_bias"] = embax.Table(jnp.zeros((rows[name], 1)), padding_idx=padding)
        features += [embax.Feature(name, name, mode), embax.Feature(f"{name}_bias", f"{name}_bias", mode)]
    return embax.Collection(tables, features)


def inputs(ratings: Ratings, films: jax.Array, collection: embax.Collection) -> dict[str, jax.Array]:
    """The ids of each feature."""
    of = {"user": ratings.users, "film": ratings.films, "genre": films[ratings.films]}
    return {feature.name: of[feature.name.removesuffix("_bias")] for feature in collection.features}


def predict(rows: Mapping[str, jax.Array], mean: jax.Array) -> jax.Array:
    """Predict ratings from what the collection reads."""
    film, bias = rows["film"], rows["user_bias"] + rows["film_bias"]
    if "genre" in rows:
        film, bias = film + rows["genre"], bias + rows["genre_bias"]
    return mean + bias[:, 0] + (rows["user"] * film).sum(axis=1)


def train(
    collection: embax.Collection, ratings: Ratings, films: Films, epochs: int, seed: int
) -> tuple[embax.Collection, jax.Array]:
    """Fit the tables by row-wise Adagrad on the squared error and the squares of the rows that were read."""
    mean, genres = jnp.asarray(ratings.stars.mean()), jnp.asarray(films.genres)
    tx = embax.optim.rowwise_adagrad(LEARNING_RATE)

    def loss(collection: embax.Collection, batch: Ratings) -> jax.Array:
        rows = collection(inputs(batch, genres, collection))
        error = jnp.square(predict(rows, mean) - batch.stars).sum()
        return error + PENALTY * sum(jnp.square(x).sum() for x in rows.values())

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def epoch(collection: embax.Collection, state: Any, batches: Ratings) -> tuple[embax.Collection, Any]:
        def step(carry: tuple[embax.Collection, Any], batch: Ratings) -> tuple[tuple[embax.Collection, Any], None]:
            collection, state = carry
            gradient = embax.grad(loss)(collection, batch)
            updates, state = tx.update(gradient, state, collection)
            return (embax.apply_updates(collection, updates), state), None

        return jax.lax.scan(step, (collection, state), batches)[0]

    state, rng = tx.init(collection), np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(ratings.stars))[: len(ratings.stars) // BATCH * BATCH]
        batches = Ratings(*(jnp.asarray(x[order].reshape(-1, BATCH)) for x in ratings))
        collection, state = epoch(collection, state, batches)
    return collection, mean


def error(collection: embax.Collection, mean: jax.Array, ratings: Ratings, films: Films) -> float:
    """The root of the mean squared error, in stars; predictions are kept within the scale."""
    genres = jnp.asarray(films.genres)
    stars = jax.jit(lambda x, batch: predict(x(inputs(batch, genres, x)), mean))(collection, ratings)
    return float(np.sqrt(np.mean((np.clip(stars, 0.5, 5) - ratings.stars) ** 2)))


def film_vectors(collection: embax.Collection, films: Films) -> np.ndarray:
    """The vector by which each film is rated."""
    pool = jax.jit(embax.embedding_bag, static_argnames="mode")
    genres = pool(collection["genre"], films.genres, mode="mean")
    return np.asarray(collection["film"].weight + genres)


def main() -> None:
    """Train both models, print what they are worth, and write the vectors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("build/movielens.safetensors"), help="the vectors to write")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    ratings, films, users = load()
    order = np.random.default_rng(options.seed).permutation(len(ratings.stars))
    test, fit = (Ratings(*(x[part] for x in ratings)) for part in np.split(order, [len(order) // 10]))

    errors = {"the mean rating": float(np.sqrt(np.mean((fit.stars.mean() - test.stars) ** 2)))}
    trained = {}
    for name, with_genres in (("a matrix factorisation", False), ("the same with genres", True)):
        collection = model(jax.random.key(options.seed), users, films, with_genres)
        collection, mean = train(collection, fit, films, options.epochs, options.seed)
        errors[name], trained[name] = error(collection, mean, test, films), collection
    printed = Printed("predictor", "test RMSE, stars", title=f"{len(test.stars):,} ratings held out")
    for name, value in errors.items():
        printed.add_row(name, f"{value:.4f}")
    rich.print(printed)

    counts = np.bincount(ratings.films, minlength=len(films.titles))
    weight = film_vectors(trained["the same with genres"], films)
    vectors = embax.Vectors(films.titles, weight, counts)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    vectors.save(options.output)
    # The vector of a film that hardly anyone has rated is that of its genres.
    known = np.flatnonzero(counts >= OFTEN)
    of_known = embax.Vectors([films.titles[film] for film in known], weight[known], counts[known])
    rich.print(f"The nearest of the {len(known)} films with {OFTEN} ratings or more:")
    for title in WELL_KNOWN:
        rich.print(f"[bold]{title}[/]: " + "; ".join(name for name, _ in of_known.most_similar(title, k=5)))
    rich.print(f"{options.output}: {len(films.titles):,} films. {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
