"""Draws one-line mutants from the lines that the tests execute: the same ones for the same seed and sources.

    coverage run ... ; python mutants/draw.py COVERAGE_FILE > mutants/mutants.json

Each area has the same number of mutants, and within an area the four kinds take turns, as far as they are there:

- operator: an arithmetic, comparison or boolean operator becomes its neighbour, or a `not` is left out
- constant: a number grows by one, or True becomes False
- dropped: a statement of one line does nothing
- swapped: a call has two of its positional arguments in the other order
"""

import argparse
import ast
import json
import random
import sys

from areas import SOURCES, sources

SEED = 20
COUNT = 60
KINDS = ("operator", "constant", "dropped", "swapped")
OPERATORS = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
}


def between(line, left, right, operator):
    """The line with the operator between two operands of it replaced; None where they are not all on the line."""
    if left.end_lineno != right.lineno:
        return None
    old, new = OPERATORS[type(operator)]
    start, end = left.end_col_offset, right.col_offset
    if line[start:end].count(old) != 1:
        return None
    return line[:start] + line[start:end].replace(old, new) + line[end:]


def changes(node, line):
    """The mutants of a node that stands on one line, as pairs of a kind and the changed line."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield "operator", between(line, node.left, node.right, node.op)
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in OPERATORS:
        yield "operator", between(line, node.left, node.comparators[0], node.ops[0])
    elif isinstance(node, ast.BoolOp):
        yield "operator", between(line, node.values[0], node.values[1], node.op)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "operator", line[: node.col_offset] + line[node.operand.col_offset :]
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        value = not node.value if isinstance(node.value, bool) else node.value + 1
        yield "constant", line[: node.col_offset] + repr(value) + line[node.end_col_offset :]
    elif isinstance(node, ast.Expr | ast.AugAssign | ast.Raise) and not isinstance(
        getattr(node, "value", None), ast.Constant
    ):
        yield "dropped", line[: node.col_offset] + "pass" + line[node.end_col_offset :]
    elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
        name = node.targets[0].id  # without which the old value stays
        if any(isinstance(inner, ast.Name) and inner.id == name for inner in ast.walk(node.value)):
            yield "dropped", line[: node.col_offset] + "pass" + line[node.end_col_offset :]
    elif isinstance(node, ast.Call) and len(node.args) > 1:
        one, other = node.args[:2]
        if not any(isinstance(arg, ast.Starred) for arg in (one, other)):
            first, second = (line[arg.col_offset : arg.end_col_offset] for arg in (one, other))
            middle = line[one.end_col_offset : other.col_offset]
            yield "swapped", line[: one.col_offset] + second + middle + first + line[other.end_col_offset :]


def annotations(tree):
    """The nodes inside annotations, which do nothing when they run."""
    for node in ast.walk(tree):
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if annotation is not None:
                yield from ast.walk(annotation)


def functions(tree, path=()):
    """The functions and classes of a file with their dotted names, outer ones first."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = (*path, node.name)
            yield ".".join(inner), node
            yield from functions(node, inner)
        else:
            yield from functions(node, path)


def mutants(path, executed):
    """All mutants of the executed lines of a file."""
    text = path.read_text()
    lines, tree = text.splitlines(), ast.parse(text)
    places = {line: name for name, node in functions(tree) for line in range(node.lineno, node.end_lineno + 1)}
    left_out = set(annotations(tree))
    for node in ast.walk(tree):
        line = getattr(node, "lineno", None)
        # Lines of a function only: what the module does once is executed by every import.
        if line not in executed or line not in places or node.end_lineno != line or node in left_out:
            continue
        old = lines[line - 1]
        if not old.isascii():  # where columns, which count bytes, would be others
            continue
        for kind, new in changes(node, old):
            if new is not None and new != old:
                same = [n for n in range(1, line) if lines[n - 1] == old and places.get(n) == places[line]]
                yield {
                    "kind": kind,
                    "file": path.as_posix(),
                    "function": places[line],
                    "old": old.strip(),
                    "new": new.strip(),
                    "nth": len(same),
                }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("coverage", help="data of a run of the tests, as coverage.py writes it")
    from coverage import CoverageData

    data = CoverageData(parser.parse_args().coverage)
    data.read()
    executed = {}
    for file in data.measured_files():
        if "src/embax/" in file:
            executed["src/embax/" + file.split("src/embax/", 1)[1]] = set(data.lines(file))
    rng, drawn = random.Random(SEED), []
    for place, area in enumerate(SOURCES):
        found = {kind: [] for kind in KINDS}
        for path in sources(area):
            for mutant in mutants(path, executed.get(path.as_posix(), ())):
                found[mutant["kind"]].append(mutant)
        for kind in KINDS:
            rng.shuffle(found[kind])
        taken, lines = [], set()
        while len(taken) < COUNT // len(SOURCES) + (place < COUNT % len(SOURCES)):
            kind = KINDS[len(taken) % len(KINDS)]
            mutant = found[kind].pop()
            line = mutant["file"], mutant["function"], mutant["old"]
            if line not in lines:
                lines.add(line)
                taken.append({"area": area, **mutant})
        drawn += taken
    json.dump(drawn, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
