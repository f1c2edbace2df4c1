"""Writes what was measured into the tables of docs/benchmarks.md and docs/training.md, from benchmarks/measured.

A table stands between `<!-- measured: name -->` and `<!-- end -->`.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from measured import duration
from turns import Measured, Time, from_json
from workload import Case

FOLDER = Path(__file__).with_name("measured")
FILES = ("row_sparse", "bags", "calls")
PAGES = tuple(Path(__file__).parents[1] / "docs" / name for name in ("benchmarks.md", "training.md"))
NOTHING = "Not measured yet."
NO_BREAK = "\N{NO-BREAK SPACE}"
MORE = 5  # microseconds that kernels may cost a small call
_SECTION = re.compile(r"(<!-- measured: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

Data = dict[str, dict[str, Any]]  # the JSON by the name of its file


def read(folder: Path = FOLDER) -> Data:
    """Read all that was measured."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def rewritten(page: str, data: Data) -> str:
    """Put the tables into the page."""
    return _SECTION.sub(lambda found: f"{found[1]}\n{SECTIONS[found[2]](data) or NOTHING}\n\n{found[3]}", page)


def machine(data: Data) -> str:
    """The machine, and the versions."""
    found: dict[str, Any] = {}
    for name in reversed(FILES):
        found |= data.get(name, {}).get("machine", {})
    if not found:
        return ""
    names = {
        "processor": "processor",
        "cores": "cores in use",
        "third cache": "third-level cache",
        "memory": "memory",
        "system": "system",
        "large pages": "large pages",
        "compiler": "compiler of the limit",
        "python": "Python",
        "jax": "jax",
        "kernels": "native kernels, instruction set",
        "torch": "torch",
        "fbgemm": "fbgemm-gpu-cpu",
    }
    return _markdown(("", "the machine"), [(name, f"{found[key]}") for key, name in names.items() if found.get(key)])


def first(data: Data) -> str:
    """Each way beside embax, in the first case."""
    lines = [line for line in _lines(data, "cases") if line.case == str(Case())]
    return _beside(lines)


def others(data: Data) -> str:
    """A row for each work in each of the other cases."""
    rows = []
    for line in _lines(data, "cases"):
        if line.case != str(Case()):
            own = next(iter(line.seconds.values())).median
            columns = ("limit", "torch", "FBGEMM")
            rows.append((line.case, line.work, duration(own), *(_ratio_to(line, name) for name in columns)))
    return _markdown(("case", "work", "embax", "limit", "torch", "FBGEMM"), rows)


def _ratio_to(line: Measured, library: str) -> str:
    """The ratio to the fastest way of a library."""
    names = [name for name in line.ratios if name.startswith(library)]
    if not names:
        return ""
    fastest = min(names, key=lambda name: line.seconds[name].median)
    return f"{_number(line.ratios[fastest].median)} ({_spread(line.ratios[fastest])})"


def rows(data: Data) -> str:
    """Ten times the rows."""
    lines = {line.work: line for line in _lines(data, "rows")}
    found = []
    for work, line in lines.items():
        step, _, process = work.partition(", ")
        if process != "embax":
            continue
        (ratio,), (many, few) = line.ratios.values(), line.seconds.values()
        limit = lines.get(f"{step}, limit")
        of_limit = f"{_number(next(iter(limit.ratios.values())).median)}" if limit else ""
        shown = _judged(ratio.median, next(iter(line.most.values()), None))
        found.append((step, shown, _spread(ratio), "1.3", duration(many.median), duration(few.median), of_limit))
    columns = "step", "ratio", "10 % to 90 %", "at most", "10,000,000 rows", "1,000,000 rows", "ratio of the limit"
    return _markdown(columns, found)


def dense(data: Data) -> str:
    """Beside dense optax."""
    return _beside(_lines(data, "dense"))


def tables(data: Data) -> str:
    """Many tables."""
    lines = _lines(data, "tables")
    return _beside([line._replace(work=line.case) for line in lines])


def calls(data: Data) -> str:
    """Small calls: differences, not ratios."""
    found = []
    for line in _lines(data, "calls"):
        if {"embax", "XLA"} <= line.seconds.keys():
            median, low, high = (1e6 * x for x in line.more["XLA"])
            shown = f"{median:+.1f} us" if median <= MORE else f"**{median:+.1f} us**"
            kinds = (f"{1e6 * line.seconds[name].median:.1f} us" for name in ("embax", "XLA"))
            found.append((line.work, *kinds, shown, f"{low:+.1f} to {high:+.1f}"))
    return _markdown(("call", "with kernels", "without", "more", "10 % to 90 %"), found)


def accelerator(data: Data) -> str:
    """A table a device."""
    parts = []
    for name, found in data.items():
        if not name.startswith("accelerator"):
            continue
        cases = list(dict.fromkeys(line["case"] for line in found["lines"]))
        by_work: dict[str, dict[str, str]] = {}
        for line in found["lines"]:
            median, low, high = (1e6 * x for x in line["seconds"])
            by_work.setdefault(line["work"], {})[line["case"]] = f"{median:.0f} ({low:.0f} to {high:.0f})"
        body = [(work, *(cells.get(case, "") for case in cases)) for work, cells in by_work.items()]
        about = found["machine"]
        parts.append(f"{about['device']}, jax {about['jax']}:\n\n" + _markdown(("us a call", *cases), body))
    return "\n\n".join(parts)


def training(data: Data) -> str:
    """Training of word vectors beside gensim."""
    rows = []
    for line in data.get("train", {}).get("training", []):
        work, way, (low, high), limit = line["work"], line["way"], line["spread"], line["limit"]
        digits = 4 if "loss" in work else 3
        value, least, greatest, other = (f"{x:.{digits}g}" for x in (line["value"], low, high, line["other"]))
        if "speed" in work or "CPU" in work:
            other = f"{other} s"
        elif "memory" in work:
            other = f"{line['other'] / 1e6:.3g} MB"
        aim = "" if limit is None else f"{'at most' if line['is_most'] else 'at least'} {limit:.{digits}g}"
        if limit is not None and (line["value"] > limit if line["is_most"] else line["value"] < limit):
            value = f"**{value}**"
        engine = way.removesuffix(" CBOW").removesuffix(" sub-words")  # the work names the model
        rows.append((work, engine, value, f"{least} to {greatest}" if low < high else "", aim, other))
    return _markdown(("work", "engine", "embax", "3 seeds", "aim", "gensim"), rows)


def _lines(data: Data, group: str) -> list[Measured]:
    return [line for name in FILES for line in from_json(data.get(name, {}).get(group, []))]


def _beside(lines: Sequence[Measured]) -> str:
    columns = "work", "compared with", "ratio", "10 % to 90 %", "at most", "embax", "other"
    return _markdown(columns, [row for line in lines for row in _rows_of(line)])


def _rows_of(line: Measured) -> Iterator[tuple[str, ...]]:
    own = next(iter(line.seconds.values()))
    for name, ratio in line.ratios.items():
        most = line.most.get(name)
        shown, limit = _judged(ratio.median, most), "" if most is None else f"{most:g}"
        times = duration(own.median), duration(line.seconds[name].median)
        yield line.work, name, shown, _spread(ratio), limit, *times


def _judged(ratio: float, most: float | None) -> str:
    """Bold where it is more than it is meant to be."""
    return _number(ratio) if most is None or ratio <= most else f"**{_number(ratio)}**"


def _spread(ratio: Time) -> str:
    return f"{_number(ratio.low)} to {_number(ratio.high)}"


def _number(x: float) -> str:
    return f"{x:.2g}" if x < 0.1 else f"{x:.2f}" if x < 10 else f"{x:.0f}"


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [columns, ["---"] * len(columns), *([_whole(cell) for cell in row] for row in rows)]
    return "\n".join("|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in lines)


def _whole(cell: str) -> str:
    """Keep a number beside its unit, and a range of numbers in one line, by spaces that do not break."""
    cell = re.sub(r"(?<=\d) (?=(us|ms|s|MB)$)", NO_BREAK, cell)
    return re.sub(r"(?<=[\d.]) to (?=[-+\d.])", f"{NO_BREAK}to{NO_BREAK}", cell)


SECTIONS: dict[str, Callable[[Data], str]] = {
    function.__name__: function
    for function in (machine, first, others, rows, dense, tables, calls, accelerator, training)
}


def main() -> None:
    """Rewrite the pages."""
    for page in PAGES:
        page.write_text(rewritten(page.read_text("utf-8"), read()), "utf-8")


if __name__ == "__main__":
    main()
