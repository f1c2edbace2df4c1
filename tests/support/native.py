"""The functions of the native library, called through jax.ffi or ctypes alone, and the same work in NumPy."""

import ctypes
import functools
import hashlib
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from embax._kernels.words import Training, TrainingLoss

embax_kernels = pytest.importorskip("embax_kernels", reason="the native kernels are not installed")

LIBRARY = ctypes.CDLL(str(embax_kernels.library_path()))
LIBRARY.embax_kernels_isa.restype = ctypes.c_char_p
LIBRARY.embax_kernels_version.restype = ctypes.c_char_p
LIBRARY.embax_kernels_calls.restype = ctypes.c_int64

DTYPES = (np.float32, np.float64, ml_dtypes.bfloat16, np.float16)
# The arrays of each step, table first: True where there is one number a row.
STEPS = {
    "Sgd": (False,),
    "Adagrad": (False, False),
    "RowwiseAdagrad": (False, True),
    "Adam": (False, False, False),
    "RowwiseAdam": (False, False, True),
}
for _name in ("Take", "Put", "Combine", "Pool", *(f"Step{name}" for name in STEPS)):
    jax.ffi.register_ffi_target(f"raw_{_name}", jax.ffi.pycapsule(getattr(LIBRARY, f"Embax{_name}")), platform="cpu")

NOTHING = np.zeros(0, np.int32)  # in the place of offsets, or of bags
NO_FACTORS = np.zeros(0, np.float32)


def accumulator(dtype):
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def rounding(dtype):
    """The distance from 1 to the next number."""
    return float(ml_dtypes.finfo(dtype).eps)


def take(table, ids, nan=0, wrap=0):
    (out,) = take_parts(table, ids, ids.shape, nan, wrap)
    return out


def take_parts(table, ids, sizes, nan=0, wrap=0):
    """The rows in several arrays of given sizes."""
    out = [jax.ShapeDtypeStruct((size, *table.shape[1:]), table.dtype) for size in sizes]
    return jax.ffi.ffi_call("raw_Take", out)(table, ids, nan=np.int32(nan), wrap=np.int32(wrap))


def put(table, ids, values, add=0):
    out = jax.ShapeDtypeStruct(table.shape, table.dtype)
    return jax.ffi.ffi_call("raw_Put", out, input_output_aliases={0: 0})(table, ids, values, add=np.int32(add))


def combine(ids, values, rows, length=1, bag_of=NOTHING, factors=NO_FACTORS):
    sums = jax.ShapeDtypeStruct((*ids.shape, *values.shape[1:]), values.dtype)
    out = [jax.ShapeDtypeStruct(ids.shape, ids.dtype), sums, jax.ShapeDtypeStruct((), jnp.int32)]
    attributes = {"rows": np.int64(rows), "length": np.int64(length)}
    return jax.ffi.ffi_call("raw_Combine", out)(ids, values, bag_of, factors, **attributes)


def pool(table, ids, bags, offsets=NOTHING, factors=NO_FACTORS, nan=0, wrap=0):
    (out,) = pool_parts(table, ids, bags, [(0, bags)], offsets, factors, nan, wrap)
    return out


def pool_parts(table, ids, bags, parts, offsets=NOTHING, factors=NO_FACTORS, nan=0, wrap=0):
    """The sums of some bags in several arrays: the first bag of each, and how many it has."""
    out = [jax.ShapeDtypeStruct((size, *table.shape[1:]), accumulator(table.dtype)) for _, size in parts]
    firsts = np.asarray([first for first, _ in parts], np.int32)
    attributes = {"number": np.int64(bags), "nan": np.int32(nan), "wrap": np.int32(wrap)}
    return jax.ffi.ffi_call("raw_Pool", out)(table, ids, offsets, factors, firsts, **attributes)


def step(name, arrays, ids, values, scalars, length=1, bag_of=NOTHING, factors=NO_FACTORS, decay=0, wrap=0, **more):
    out = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]
    function = jax.ffi.ffi_call(f"raw_Step{name}", out, input_output_aliases={k: k for k in range(len(arrays))})
    scalars = jnp.asarray(scalars, accumulator(arrays[0].dtype))
    attributes = {"length": np.int64(length), "decay": np.int32(decay), "wrap": np.int32(wrap)}
    attributes |= {key: np.int32(value) for key, value in more.items()}
    return function(*arrays, ids, values, bag_of, factors, scalars, **attributes)


def train_words(inputs, outputs, vocabulary, ids, rates, seed, window, negative, cbow, threads=1):
    """Train copies of the tables; the error is that of the library."""
    inputs, outputs = np.array(inputs), np.array(outputs)
    arrays = {"inputs": inputs, "outputs": outputs, "ids": ids, **vocabulary._asdict()}
    pointers = {name: array.ctypes.data if array.size else None for name, array in arrays.items()}
    sizes = (outputs.shape[1], len(inputs), len(outputs), len(ids), len(vocabulary.pieces))
    seed = int(seed[0]) << 32 | int(seed[1])
    training = Training(*pointers.values(), *sizes, window, negative, threads, seed, *map(float, rates), cbow)
    loss, refused = TrainingLoss(), ctypes.c_char_p()
    failed = LIBRARY.embax_kernels_train_words(ctypes.byref(training), ctypes.byref(loss), ctypes.byref(refused))
    if failed:
        raise ValueError(refused.value.decode())
    return inputs, outputs, np.asarray([loss.sum, loss.pairs], np.float32)


def scalars_of(name, rate=0.05, decay_by=0.01, eps=1e-8, b1=0.9, b2=0.999, steps=1):
    """The scalars of a step without Nesterov's momentum."""
    if name == "Sgd":
        return [rate, decay_by]
    if "Adagrad" in name:
        return [rate, decay_by, eps]
    moments = [b1, 1 - b1, b2, 1 - b2, 1 / (1 - b1**steps), 1 / (1 - b2**steps)]
    return [rate, decay_by, eps, *([0.0] if name == "Adam" else []), *moments]


def state_of(name, table, start=0.1):
    """The state before a step, not zero, so that decays are seen."""
    dtypes = [accumulator(table.dtype) if by_row else table.dtype for by_row in STEPS[name]]
    shapes = [table.shape[:1] if by_row else table.shape for by_row in STEPS[name]]
    return [np.full(shape, start, dtype) for shape, dtype in zip(shapes[1:], dtypes[1:], strict=True)]


def reference_step(name, arrays, ids, terms, scalars, decay=0):
    """A step in float64, given what each id adds to its row."""
    old = [np.asarray(array).astype(np.float64) for array in arrays]
    table, rows, axes = old[0], old[0].shape[0], tuple(range(1, old[0].ndim))
    named = dict(zip(("rate", "decay_by", "eps"), scalars, strict=False))
    b1, rest1, b2, rest2, mean_by, square_by = scalars[-6:] if "Adam" in name else [0.0] * 6
    has_row = (ids >= 0) & (ids < rows)
    g, hit = np.zeros_like(table), np.zeros(rows, bool)
    np.add.at(g, ids[has_row], terms[has_row])
    hit[ids[has_row]] = True
    if decay == 1:
        g = g + named["decay_by"] * table
    square = g * g
    if name.startswith("Rowwise"):
        square = square.mean(axes)
    if name == "Sgd":
        new, update = [], g
    elif "Adagrad" in name:
        new = [old[1] + square]
        roots = np.sqrt(new[0] + named["eps"]) if name == "Adagrad" else np.sqrt(new[0]) + named["eps"]
        update = g * _per_row(np.where(new[0] > 0, 1 / np.where(roots > 0, roots, 1), 0), table)
    else:
        new = [b1 * old[1] + rest1 * g, b2 * old[2] + rest2 * square]
        update = new[0] * mean_by / _per_row(np.sqrt(new[1] * square_by) + named["eps"], table)
    if decay == 2:
        update = update + named["decay_by"] * table
    new = [table - named["rate"] * update, *new]
    return [np.where(_per_row(hit, n) if n.ndim > 1 else hit, n, o) for n, o in zip(new, old, strict=True)]


def _per_row(array, like):
    return array.reshape(array.shape + (1,) * (like.ndim - array.ndim))


@functools.cache
def _everything(dtype_name):
    """One program with every handler, and its arguments."""
    dtype = np.dtype(getattr(ml_dtypes, dtype_name, dtype_name))
    rng = np.random.default_rng(0)
    rows, number, dim = 700, 5000, 83
    ids = np.where(rng.random(number) < 0.5, rng.integers(0, 9, number), rng.integers(-9, rows + 9, number))
    table, values = (rng.normal(size=(n, dim)).astype(dtype) for n in (rows, number))
    factors = rng.normal(size=number).astype(accumulator(dtype))
    bag_of = rng.integers(-1, 300, number).astype(np.int32)
    offsets = np.sort(rng.integers(0, number, 101)).astype(np.int32)
    arrays = {name: [table, *state_of(name, table)] for name in STEPS}

    def run(table, ids, values, factors, bag_of, offsets, arrays):
        out = [take(table, ids), put(table, ids, values), put(table, ids, values, add=1)]
        out += [combine(ids, values, rows), combine(ids, values[:1000], rows, length=5, factors=factors)]
        out += [combine(ids, values[:300], rows, length=0, bag_of=bag_of)]
        out += [pool(table, ids, 1000, factors=factors), pool(table, ids, 100, offsets), pool(table, ids, 10)]
        for name, of_step in arrays.items():
            for decay in (1, 2):
                more = {"nesterov": 0} if name == "Adam" else {}
                out.append(step(name, of_step, ids, values, scalars_of(name), decay=decay, **more))
        return out

    arguments = (table, ids.astype(np.int32), values, factors, bag_of, offsets, arrays)
    return jax.jit(run), arguments


def digest(dtype_name, threads):
    """A hash of the results of every handler, computed by so many threads."""
    LIBRARY.embax_kernels_set_threads(threads)
    try:
        with jax.enable_x64(True):
            program, arguments = _everything(dtype_name)
            results = jax.tree.leaves(jax.block_until_ready(program(*arguments)))
    finally:
        LIBRARY.embax_kernels_set_threads(0)
    return hashlib.sha256(b"".join(np.asarray(result).tobytes() for result in results)).hexdigest()


def large_pages(array):
    """The bytes of large pages in the mappings that an array's memory lies in, by Linux's own account."""
    begin = array.unsafe_buffer_pointer()
    end, found, inside = begin + array.nbytes, 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) < end and begin < int(span[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            found += int(line.split()[1]) << 10
    return found


def large_pages_after_reads():
    """The large pages of a table of 72 MiB that has been read some times."""
    table = jnp.ones((288 * 1024, 64))
    for _ in range(200):
        jax.block_until_ready(take(table, np.zeros(1, np.int32)))
    return large_pages(table) / table.nbytes


if __name__ == "__main__":  # under the instruction set that the environment names
    pages = large_pages_after_reads() if Path("/proc/self/smaps").exists() else 0.0
    print(LIBRARY.embax_kernels_isa().decode(), pages, *(digest(np.dtype(dtype).name, 2) for dtype in DTYPES))
    os._exit(0)
