"""Prints and keeps what was measured, with a description of the machine."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from processes import Process
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from turns import Measured, as_json


def print_table(line: Measured) -> None:
    """Print the ways to do a work; a ratio is green if it is at most what it is meant to be."""
    first = next(iter(line.seconds))
    table = Table(title=f"{line.work}: {line.case}, {line.turns} turns", title_justify="left")
    for column in ("", "median", "10 % to 90 %", f"{first} / it", "10 % to 90 %", "at most"):
        table.add_column(column)
    for name, time in line.seconds.items():
        cells = [escape(name), duration(time.median), f"{duration(time.low)} to {duration(time.high)}"]
        if name in line.ratios:
            ratio, most = line.ratios[name], line.most.get(name)
            colour = "" if most is None else "green" if ratio.median <= most else "red"
            shown = f"[{colour}]{ratio.median:.2f}[/]" if colour else f"{ratio.median:.2f}"
            cells += [shown, f"{ratio.low:.2f} to {ratio.high:.2f}", "" if most is None else f"{most:g}"]
        table.add_row(*cells)
    Console(width=120).print(table)


def duration(seconds: float) -> str:
    """Seconds in a unit that suits them."""
    if seconds < 1e-4:
        return f"{seconds * 1e6:.1f} us"
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


def write(path: Path, processes: Mapping[str, Process], groups: Mapping[str, Sequence[Measured]]) -> None:
    """Write all that is measured until now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = {name: as_json(lines) for name, lines in groups.items() if lines}
    path.write_text(json.dumps({"machine": machine(processes), **lines}, indent=1) + "\n")


def machine(processes: Mapping[str, Process]) -> dict[str, Any]:
    """Say on which machine, and with which versions."""
    found: dict[str, Any] = {
        "processor": platform.machine(),
        "python": platform.python_version(),
    }
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found |= {"cores": cores, "system": f"{platform.system()} {platform.release()}"}
    found["memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    for name, line in (("processor", "model name"), ("cache", "cache size")):
        for text in _lines(Path("/proc/cpuinfo")):
            if text.startswith(line):
                found[name] = text.partition(":")[2].strip()
                break
    third = _lines(Path("/sys/devices/system/cpu/cpu0/cache/index3/size"))
    found |= {"third cache": third[0]} if third else {}
    pages = _lines(Path("/sys/kernel/mm/transparent_hugepage/enabled"))
    found |= {"large pages": pages[0]} if pages else {}
    for name in ("XLA", "embax", "limit", "peers"):
        found |= processes[name].ask(do="about") if name in processes else {}
    return found


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
