"""Starts the processes that do the work of a benchmark, one a library, and asks them."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Process:
    """A process that runs one script of this folder, see serve.py."""

    def __init__(self, script: str, python: str = sys.executable, environment: Mapping[str, str] | None = None):
        """Start it.

        Args:
          script: The name of the script.
          python: Whose environment it runs in.
          environment: Variables to set for it.
        """
        path = Path(__file__).with_name(script)
        environment = os.environ | dict(environment or {})
        pipe = subprocess.PIPE
        process = subprocess.Popen([python, "-W", "ignore", path], stdin=pipe, stdout=pipe, text=True, env=environment)
        if process.stdin is None or process.stdout is None:
            raise RuntimeError(f"The process of {script} has no pipes.")
        self._script, self._process = script, process
        self._requests, self._answers = process.stdin, process.stdout

    def send(self, **request: Any) -> None:
        """Send a request, whose answer is to be received before the next one is sent."""
        self._requests.write(json.dumps(request) + "\n")
        self._requests.flush()

    def receive(self) -> dict[str, Any]:
        """Wait for an answer."""
        line = self._answers.readline()
        answer = json.loads(line) if line else {"error": f"The process ended with {self._process.wait()}."}
        if "error" in answer:
            raise RuntimeError(f"{self._script}: {answer['error']}")
        return answer

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        self.send(**request)
        return self.receive()

    def close(self) -> None:
        """Let the process end."""
        self._requests.close()
        self._process.wait()
        self._answers.close()


def start(peers: str | None) -> dict[str, Process]:
    """Start all processes.

    Args:
      peers: The python of the environment of torch and FBGEMM. None: without them.

    Returns:
      The processes by name: "embax", "limit", "XLA" if embax has native kernels, and "peers" if there are any.
    """
    if hasattr(os, "sched_setaffinity"):  # each process has two threads and two cores, and all have the same
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    processes = {
        "embax": Process("ours.py", environment={"EMBAX_KERNELS": "1"}),
        "XLA": Process("ours.py", environment={"EMBAX_KERNELS": "0"}),
        "limit": Process("limit.py"),
    }
    if peers:
        processes["peers"] = Process("peer.py", python=peers)
    if not processes["embax"].ask(do="about")["kernels"]:
        print("There are no native kernels here: `python -m embax.kernels` says why. XLA runs embax.")
        processes.pop("XLA").close()
    return processes
