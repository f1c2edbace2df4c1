"""Damage to real bytes, for the tests of readers."""

import contextlib
import random
from collections.abc import Iterator, Sequence

import pytest

KINDS = ["flip", "set", "cut", "insert", "overwrite", "end"]

_OTHERS = [pytest.param(seed, marks=pytest.mark.exhaustive) for seed in range(1, 9)]
# Of a test that damages files: each seed damages other places.
seeds = pytest.mark.parametrize("seed", [0, *_OTHERS])


def damages(
    whole: bytes, number: int, seed: int, head: int | None = None, pieces: Sequence[bytes] = ()
) -> Iterator[tuple[str, bytes]]:
    """Yield damaged bytes, the same ones each time, each after a name that tells what was done to them.

    Each kind of damage is the first one in turn; up to two more follow it.

    Args:
      whole: The bytes to damage.
      number: How many times they are damaged.
      seed: What is drawn.
      head: Half of the places lie in the first so many bytes.
      pieces: Bytes to insert and to write over others, half of the time; else these are any bytes.
    """
    draw = random.Random(seed)
    for case in range(number):
        data, done = bytearray(whole), []
        for kind in [KINDS[case % len(KINDS)], *draw.choices(KINDS, k=draw.randrange(3))]:
            size = len(data) if head is None or draw.random() < 0.5 else min(head, len(data))
            place = draw.randrange(size + 1)
            some = draw.choice(pieces) if pieces and draw.random() < 0.5 else draw.randbytes(draw.randint(1, 8))
            if kind == "flip":
                data[place : place + 1] = bytes(byte ^ 1 << draw.randrange(8) for byte in data[place : place + 1])
            elif kind == "set":
                data[place : place + 1] = draw.choice([b"\0", b"\x7f", b"\x80", b"\xff"])
            elif kind == "cut":
                del data[place : place + draw.choice([1, 2, 4, 8, 30])]
            elif kind == "insert":
                data[place:place] = some
            elif kind == "overwrite":
                data[place : place + len(some)] = some
            else:
                del data[place:]
            done.append(f"{kind} at {place}")
        if data != whole:
            yield f"case {case}: {', '.join(done)}", bytes(data)


@contextlib.contextmanager
def told(name: str):
    """Add a name to an error, which tells the case of a test that has many."""
    try:
        yield
    except BaseException as error:
        error.add_note(name)
        raise
