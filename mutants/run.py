"""Applies the mutants one by one and runs the tests of their area, which should fail.

    python mutants/run.py [--area AREA] [--only NUMBER ...] [--record]

It fails where a mutant does not apply, because the line that it changes is gone, and where one survives that is
recorded as killed. Where a line has moved or changed, tell its new place in mutants.json; where the code is gone, write
a successor in the new code.
"""

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from areas import SOURCES, TESTS
from draw import functions

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).with_name("mutants.json")
LIMIT = 1200  # seconds for the tests of an area; a mutant that makes them run for longer is killed
TESTS_FAILED = 1  # pytest's exit status, beside 0 where all have passed


class DoesNotApplyError(Exception):
    """The line that a mutant changes is not where it was."""


def mutated(text, mutant):
    """The text of a file with the line of a mutant changed."""
    lines = text.splitlines(keepends=True)
    spans = [
        range(node.lineno - 1, node.end_lineno)
        for name, node in functions(ast.parse(text))
        if name == mutant["function"]
    ]
    found = sorted({i for span in spans for i in span if lines[i].strip() == mutant["old"]})
    if len(found) <= mutant["nth"]:
        raise DoesNotApplyError(f"{mutant['file']}, {mutant['function']}: no line {mutant['old']!r}")
    i = found[mutant["nth"]]
    lines[i] = lines[i].replace(mutant["old"], mutant["new"])
    return "".join(lines)


def outcome(number, mutant):
    """Run the tests of an area on a copy of the sources; return whether they failed, and by which test."""
    copy = ROOT / "build" / "mutants" / str(number)
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / mutant["file"]
    path.write_text(mutated(path.read_text(), mutant))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "--tb=no",
        "-p",
        "no:cacheprovider",
        *(f"tests/{name}" for name in TESTS[mutant["area"]]),
    ]
    # The copy comes before the package that is installed.
    environment = os.environ | {"PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return True, f"no end within {LIMIT} s"
    finally:
        shutil.rmtree(copy)
    if done.returncode == 0:
        return False, ""
    if failed := re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE):
        return True, failed[1]
    return True, f"pytest ends with {done.returncode}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--area", choices=list(SOURCES), help="only the mutants of this area")
    parser.add_argument("--only", type=int, nargs="+", metavar="NUMBER", help="only these mutants, counted from 0")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at a time; default: one a processor")
    parser.add_argument("--record", action="store_true", help="write into the list which mutants were killed")
    args = parser.parse_args()
    mutants = json.loads(LIST.read_text())
    chosen = [
        number
        for number, mutant in enumerate(mutants)
        if args.area in (None, mutant["area"]) and (args.only is None or number in args.only)
    ]
    for number in chosen:  # before any test runs
        try:
            mutated((ROOT / mutants[number]["file"]).read_text(), mutants[number])
        except (DoesNotApplyError, OSError) as error:
            sys.exit(f"Mutant {number} does not apply. {error}")

    def run(number):
        began = time.monotonic()
        killed, by = outcome(number, mutants[number])
        mutant = mutants[number]
        word = "killed" if killed else "SURVIVED" if mutant.get("killed") else "survived"
        where = f"{mutant['file'].removeprefix('src/embax/')}:{mutant['function']}"
        seconds = time.monotonic() - began
        print(f"{number:2} {mutant['area']:10} {mutant['kind']:8} {word} {seconds:.0f} s, {where} {by}", flush=True)
        return killed

    with ThreadPoolExecutor(args.jobs) as pool:
        killed = dict(zip(chosen, pool.map(run, chosen), strict=True))
    lost = [number for number in chosen if mutants[number].get("killed") and not killed[number]]
    print(f"{sum(killed.values())} of {len(chosen)} killed.")
    if args.record:
        for number in chosen:
            mutants[number]["killed"] = killed[number]
        LIST.write_text(json.dumps(mutants, indent=1) + "\n")
    elif lost:
        sys.exit(f"The tests no longer kill: {', '.join(map(str, lost))}.")


if __name__ == "__main__":
    main()
