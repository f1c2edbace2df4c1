"""The command line, run in this process, in one of its own, and on a terminal."""

import contextlib
import io
import json
import os
import pty
import re
import subprocess
import sys

import numpy as np
from real import GENSIM as GENSIM

from embax import cli

WORDS = ["man", "woman", "king", "queen", "boy", "girl"]
WEIGHT = np.float32([[1, 0, 0], [0, 1, 0], [1, 0, 2], [0, 1, 2], [1, 0, -1], [0, 1, -1]])


class Terminal(io.StringIO):
    """Keeps what is drawn on it."""

    def isatty(self):
        return True


def run(*arguments, err=None):
    """Return the status, and what came out on standard output and standard error, which may be of another kind."""
    out, err = io.StringIO(), io.StringIO() if err is None else err
    status = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            status = exit_.code
    return status, out.getvalue(), err.getvalue()


def command(*arguments):
    """Return the command that runs in a process of its own."""
    return [sys.executable, "-m", "embax.cli", *map(str, arguments)]


def drawn_on_terminal(*arguments, program=False):
    """Return the status and what is drawn on standard error, by the command line or by a program of its own."""
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    words = [sys.executable, *map(str, arguments)] if program else command(*arguments)
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=follower, env=environment)
    os.close(follower)
    drawn = b""
    try:
        while piece := os.read(leader, 1 << 16):
            drawn += piece
    except OSError:  # the other end was closed
        pass
    os.close(leader)
    return child.wait(timeout=60), drawn


def assert_one_line(status, out, err, *parts):
    assert status == 2
    assert out == ""
    assert re.fullmatch(r"embax: error: [^\n]+\n", err), err
    for part in parts:
        assert part in err


def answer(*arguments):
    """Return the JSON document, where nothing else is printed."""
    status, out, err = run(*arguments, "--json")
    assert (status, err) == (0, "")
    return json.loads(out)


def lines_of(*arguments):
    status, out, err = run(*arguments)
    assert (status, err) == (0, "")
    return out.splitlines()
