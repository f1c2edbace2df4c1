"""The other end of processes.py: builds ways to do some work, and times them. NumPy only."""

import gc
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from workload import Case, Tables

# Does the work once, waits until it is done, and gives the seconds that it took.
Way = Callable[[], float]
Build = Callable[[str, Case | Tables], Way]


def timed(batch: Sequence[Any], function: Callable[[Any], Any]) -> Way:
    """Make a way that calls a function on one batch after the other; the function waits until its work is done."""
    turns = itertools.count()

    def run() -> float:
        ids = batch[next(turns) % len(batch)]
        start = time.perf_counter()
        function(ids)
        return time.perf_counter() - start

    run()
    return run


def serve(about: dict[str, Any], build: Build, programs: Callable[[], int] = lambda: 0) -> None:
    """Answer each line of JSON on standard input by one on standard output.

    Args:
      about: A description of this process: versions and threads.
      build: Makes a way to do a work, by its name.
      programs: How many programs were compiled until now.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print, too
    ways: dict[str, Way] = {}
    for line in sys.stdin:
        try:
            answer = _answer(json.loads(line), about, build, programs, ways)
        except Exception:  # whatever it is, the asker raises it
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


def _answer(
    request: dict[str, Any], about: dict[str, Any], build: Build, programs: Callable[[], int], ways: dict[str, Way]
) -> dict[str, Any]:
    if request["do"] == "about":
        return about
    if request["do"] == "build":
        size = request["size"]
        case = Case(*size) if isinstance(size[-1], str) else Tables(*size)
        ways[request["way"]] = build(request["work"], case)
    elif request["do"] == "run":
        way = ways[request["way"]]
        return {"seconds": [way() for _ in range(request["runs"])], "programs": programs()}
    else:
        ways.clear()
        gc.collect()
    return {}
