"""Annotations: `Any` stands only where anything is meant."""

import re
from pathlib import Path

import embax

SOURCE = Path(embax.__file__).parent


def test_any_is_rare():
    lines = [line for path in SOURCE.rglob("*.py") for line in path.read_text("utf-8").splitlines()]
    found = sum(len(re.findall(r"\bAny\b", line)) for line in lines if not line.startswith(("from ", "import ")))
    assert found <= 15 * len(lines) / 1000
