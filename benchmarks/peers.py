"""Asks the process of peer.py for steps of torch and FBGEMM."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Peer:
    """A process in the peers' environment that runs their steps when asked."""

    def __init__(self, python: str):
        script = Path(__file__).with_name("peer.py")
        process = subprocess.Popen([python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("The peers' process has no pipes.")
        self._process, self._requests, self._answers = process, process.stdin, process.stdout

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        self._requests.write(json.dumps(request) + "\n")
        self._requests.flush()
        return json.loads(self._answers.readline())

    def step(self, name: str, rows: int) -> Callable[[], float]:
        """Build a step; running it gives the seconds that it took over there."""
        self.ask(do="build", name=name, rows=rows)
        return lambda: self.ask(do="run")["seconds"]

    def close(self) -> None:
        """Let the process end."""
        self._requests.close()
        self._process.wait()
