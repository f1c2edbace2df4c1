"""The least time that the memory of this machine allows for a work: a small program in C++ that touches the same rows.

A lookup copies its rows, a bag reads them. A step does that, reads all gradients, and adds to each distinct row and to
its states, in the order in which the ids come. No duplicate is found, and no formula computed.
"""

import ctypes
import functools
import itertools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from serve import Way, serve
from workload import LENGTH, Case, Tables, batches_of, batches_of_tables, gradient_of, gradient_of_tables

# How many numbers the states of a row have, for each number of the row.
STATES: dict[str, tuple[float, ...]] = {"SGD": (), "Adagrad": (1,), "Adam": (1, 1), "row-wise Adagrad": (0,)}
READ, GATHER, UPDATE = range(3)
THREADS = 2


def compiler() -> str | None:
    """The C++ compiler of this machine."""
    found = (shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if name)
    return next((path for path in found if path), None)


@functools.cache
def library() -> ctypes.CDLL:
    """Compile the program."""
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("There must be a C++ compiler, got none. Install one, or set CXX.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "limit.so"
        native = ["-march=native"] if os.uname().machine == "x86_64" else []
        flags = ["-std=c++17", "-O3", *native, "-ffast-math", "-shared", "-fPIC", "-pthread"]
        subprocess.run([cxx, *flags, Path(__file__).with_name("limit.cc"), "-o", path], check=True)
        loaded = ctypes.CDLL(str(path))
    loaded.touch.restype, loaded.make_array.restype = ctypes.c_double, ctypes.c_void_p
    return loaded


class Arrays:
    """A table and its states, on large pages."""

    def __init__(self, rows: int, widths: tuple[int, ...]):
        self._pointers = [library().make_array(ctypes.c_long(rows * width)) for width in widths]
        if not all(self._pointers):
            raise MemoryError(f"{rows} rows of {widths} numbers must fit into memory.")
        self._data = (ctypes.c_void_p * len(widths))(*self._pointers)
        self._widths = (ctypes.c_long * len(widths))(*widths)

    def touch(self, mode: int, ids: np.ndarray, values: np.ndarray) -> float:
        """Touch rows, those of the table alone where nothing is changed."""
        arrays = len(self._pointers) if mode == UPDATE else 1
        numbers = ctypes.c_long(ids.size), values.ctypes.data_as(ctypes.c_void_p), ctypes.c_long(len(values))
        pointer = ids.ctypes.data_as(ctypes.c_void_p)
        return library().touch(mode, THREADS, arrays, self._data, self._widths, pointer, *numbers)

    def __del__(self):
        for pointer in self._pointers:
            library().free_array(ctypes.c_void_p(pointer))


def build(work: str, case: Case | Tables) -> Way:
    """Make the way that touches the rows of a work."""
    optimizer, _, kind = work.partition(", ")
    bags = kind == "bags" or work == "bag"
    if isinstance(case, Tables):  # as one table; each id has a bag of its own
        ids = batches_of_tables(case) + np.arange(case.tables, dtype=np.int32)[:, None] * case.rows
        ids, gradient = ids.reshape(len(ids), -1), gradient_of_tables(case).reshape(-1, case.dim)
        rows, optimizer = case.tables * case.rows, "row-wise Adagrad"
    else:
        ids, gradient, rows = batches_of(case), gradient_of(case, LENGTH if bags else 1), case.rows
    states = STATES.get(optimizer, ())
    arrays = Arrays(rows, (case.dim, *(max(1, int(part * case.dim)) for part in states)))
    distinct = [_in_order(batch) for batch in ids] if optimizer in STATES else None
    read, turns = np.zeros((ids.shape[1], case.dim), np.float32), itertools.count()

    def run() -> float:
        turn = next(turns) % len(ids)
        seconds = arrays.touch(READ if bags else GATHER, ids[turn], read)
        return seconds + arrays.touch(UPDATE, distinct[turn], gradient) if distinct else seconds

    return run


def _in_order(ids: np.ndarray) -> np.ndarray:
    """Distinct ids, as they come."""
    distinct, first = np.unique(ids, return_index=True)
    return distinct[np.argsort(first)]


def about() -> dict[str, Any]:
    """The compiler."""
    cxx = compiler()
    lines = subprocess.run([cxx, "--version"], capture_output=True, text=True).stdout.splitlines() if cxx else []
    return {"compiler": lines[0] if lines else None}


if __name__ == "__main__":
    serve(about(), build)
