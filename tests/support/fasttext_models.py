"""Models of fastText as bytes, right and wrong ones."""

import struct

import numpy as np

RNG = np.random.default_rng(0)


def model(
    words=("the", "größe", "cat"),
    labels=(),
    dim=4,
    bucket=7,
    minn=2,
    maxn=3,
    magic=793712314,
    version=12,
    kind=2,
    pruned=None,
    pruned_number=None,
    matrix=None,
    rows=None,
    size=None,
    types=None,
    counts=None,
    flags=(0, 0),
    output=None,
):
    """The bytes of a model, each part of which may be wrong; written by what the format says."""
    arguments = struct.pack("<12id", dim, 5, 5, 1, 5, 1, 2, kind, bucket, minn, maxn, 100, 1e-4)
    head = arguments if magic is None else struct.pack("<2i", magic, version) + arguments
    entries = [*words, *labels]
    head += struct.pack("<3iq", len(entries) if size is None else size, len(words), len(labels), 99)
    if magic is not None:
        number = -1 if pruned is None else len(pruned)
        head += struct.pack("<q", number if pruned_number is None else pruned_number)
    for place, word in enumerate(entries):
        encoded = word if isinstance(word, bytes) else word.encode()
        count = counts[place] if counts else 900 - place
        head += encoded + b"\0" + struct.pack("<qb", count, types[place] if types else place >= len(words))
    for pair in pruned or ():
        head += struct.pack("<2i", *pair)
    if matrix is None:
        total = len(words) + bucket if rows is None else rows
        matrix = struct.pack("<2q", total, dim) + RNG.standard_normal((max(0, total), dim)).astype("<f4").tobytes()
    if output is None:
        output = struct.pack("<2q", len(words), dim) + bytes(4 * dim * len(words))
    flag, out_flag = (b"", b"") if magic is None else (bytes([flags[0]]), bytes([flags[1]]))
    return head + flag + matrix + out_flag + output


def quantized(rows, dim, size, has_norms=False, **changes):
    """The bytes of a quantised matrix, and the matrix."""
    pieces = -(-dim // size)
    widths = [size] * (pieces - 1) + [dim - size * (pieces - 1)]
    codes = RNG.integers(0, 256, (rows, pieces)).astype(np.uint8)
    centroids = [RNG.standard_normal((256, width)).astype(np.float32) for width in widths]
    norm_codes = RNG.integers(0, 256, rows).astype(np.uint8)
    norms = RNG.random(256).astype(np.float32)
    values = np.asarray(
        [np.concatenate([centroids[piece][codes[row, piece]] for piece in range(pieces)]) for row in range(rows)]
    )
    if has_norms:
        values = values * norms[norm_codes][:, None]
    parts = {
        "head": struct.pack("<?qqi", has_norms, rows, dim, codes.size),
        "codes": codes.tobytes(),
        "sizes": struct.pack("<4i", dim, pieces, size, widths[-1]),
        "centroids": b"".join(part.tobytes() for part in centroids),
    }
    if has_norms:
        parts |= {"norms": norm_codes.tobytes() + struct.pack("<4i", 1, 1, 1, 1) + norms.tobytes()}
    return b"".join((parts | changes).values()), values
