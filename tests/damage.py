"""Damage to real bytes, for the tests of readers."""

from hypothesis import strategies as st


@st.composite
def damaged(draw, whole: bytes):
    """Draw a few flips, cuts, insertions and truncations."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["flip", "flip", "set", "cut", "insert", "end"]))
        if kind == "flip" and place < len(data):
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and place < len(data):
            data[place] = draw(st.sampled_from([0, 0x7F, 0x80, 0xFF]))
        elif kind == "cut":
            del data[place : place + draw(st.sampled_from([1, 4, 8]))]
        elif kind == "insert":
            data[place:place] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "end":
            del data[place:]
    return bytes(data)
