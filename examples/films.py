"""Vectors of films, learned like vectors of words: each user is a sentence, whose words are the films that they liked.

A film is liked with four stars or more. The films that a user liked follow each other in the order of time, so that
films of one evening or of one year are near each other. Skip-gram with negative sampling learns which films occur near
which. It knows no genres, but how often a film and its neighbours have one in common shows what it has learned.

Prints the neighbours of a few well-known films, and writes the vectors and a map. `film_ratings.py` reads the data.
Needs `pip install "embax[examples]"`; `make films` does that, too.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import film_ratings
import numpy as np

import embax

# Films are few and lists are short, so the text is read often, with vectors that are small. Films of a list are related
# also at some distance: the window is wide. Without sampling, films that everyone likes would be near everything.
OPTIONS = {
    "dim": 48,
    "window": 10,
    "epochs": 60,
    "min_count": 10,
    "learning_rate": 0.05,
    "sample": 1e-3,
}
WELL_KNOWN = (
    "Toy Story (1995)",
    "Star Wars: Episode IV - A New Hope (1977)",
    "Godfather, The (1972)",
    "Shawshank Redemption, The (1994)",
    "Alien (1979)",
    "Lord of the Rings: The Fellowship of the Ring, The (2001)",
)


class Films(NamedTuple):
    """What the data say of films and users."""

    lists: list[list[str]]  # for each user, the titles of the films that they liked, in the order of time
    genres: dict[str, frozenset[str]]  # of each title


def load() -> Films:
    """Return the lists of liked films, and the genres of all films."""
    data = film_ratings.load().dropna(subset=["title", "year"])
    data["film"] = data["title"].astype(str) + " (" + data["year"].astype(int).astype(str) + ")"
    films = data.drop_duplicates("film")
    genres = {film: frozenset(names.split("|")) for film, names in zip(films["film"], films["genres"], strict=True)}
    return Films([list(films) for _, films in film_ratings.liked(data).groupby("userId")["film"]], genres)


def train(lists: list[list[str]], seed: int = 0, **options: float) -> embax.Vectors:
    """Learn a vector for each film that enough users liked."""
    return embax.train.skipgram(lists, seed=seed, **(OPTIONS | options))


def common_genres(vectors: embax.Vectors, genres: dict[str, frozenset[str]], k: int = 10) -> tuple[float, float]:
    """The share of the `k` nearest of each film that have a genre in common with it, and that of all films."""
    films = vectors.vocabulary.tokens()
    names = sorted(set().union(*(genres[film] for film in films)))
    has = np.asarray([[name in genres[film] for name in names] for film in films])
    common = has.astype(int) @ has.T.astype(int) > 0
    unit = vectors.normalized().weight
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    nearest = np.argsort(-cosines, axis=1)[:, :k]
    others = (common.sum() - len(films)) / (len(films) * (len(films) - 1))
    return float(np.take_along_axis(common, nearest, axis=1).mean()), float(others)


def main() -> None:
    """Train, print neighbours, and write the vectors and a map."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("build/films.safetensors"), help="the vectors to write")
    parser.add_argument("--epochs", type=int, default=OPTIONS["epochs"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    lists, genres = load()
    vectors = train(lists, options.seed, epochs=options.epochs)
    print(f"{len(lists)} users like {sum(map(len, lists)):,} films; {len(vectors):,} films have a vector.")
    nearest, others = common_genres(vectors, genres)
    print(f"A genre is common to a film and {nearest:.1%} of its 10 nearest, {others:.1%} of all others.")
    for title in WELL_KNOWN:
        if title in vectors:
            print(f"{title}:", "; ".join(film for film, _ in vectors.most_similar(title, k=4)))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    vectors.save(options.output)
    page = options.output.with_suffix(".html")
    films = vectors.vocabulary.tokens()
    near = [vectors.most_similar(film, k=5) for film in films]
    embax.maps.draw_html(page, films, embax.maps.project(vectors.normalized().weight), title="Films", nearest=near)
    print(f"{options.output} and {page}: {len(vectors):,} films. {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
