"""Lifelines: connections by which processes notice at once when another one ends."""

import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

# Bytes in which the first process tells the others where it listens.
_ADDRESS = 512
# Seconds: to connect; and before the end of another process ends the first one, which may have the same error to tell
# of itself. When the first one ends there is no time to lose, as JAX aborts the others at the same moment.
_PATIENCE, _GRACE = 10, 1.0
_GOODBYE = b"."


class Lifelines:
    """Connections of the first process to all others, over which nothing is said but goodbye.

    A collective fails only on the devices that talk to the lost process; those that wait for these wait on. JAX's
    heartbeats end them in the end, as they do where no connection can be made.

    Args:
      host: How the other processes reach the first one.
      lost: Called, in a thread of its own, once another process has ended without a goodbye. It has to end this one.
    """

    def __init__(self, host: str, lost: Callable[[], None]):
        import jax

        self._lost, self._lines, self._closed, self._ended = lost, [], False, threading.Lock()
        is_first = jax.process_index() == 0
        listener = socket.create_server(("", 0), backlog=jax.process_count()) if is_first else None
        port = listener.getsockname()[1] if listener is not None else 0
        host, port, token = _of_first_process(host, port, secrets.token_hex(16))
        if listener is not None:
            self._begin(self._accept, listener, token)
        else:
            self._begin(self._connect, host, port, token)

    def close(self) -> None:
        """Say goodbye; from now on the others may end."""
        self._closed = True
        for line in self._lines:
            try:
                line.sendall(_GOODBYE)
            except OSError:  # the other one was quicker
                pass

    def end(self) -> None:
        """Wait if another thread is about to end this process; else, none will be from now on."""
        self._ended.acquire()

    def _begin(self, function: Callable[..., None], *arguments: Any) -> None:
        threading.Thread(target=function, args=arguments, daemon=True).start()

    def _accept(self, listener: socket.socket, token: bytes) -> None:
        while True:
            line, _ = listener.accept()
            self._begin(self._welcome, line, token)

    def _welcome(self, line: socket.socket, token: bytes) -> None:
        line.settimeout(_PATIENCE)
        try:
            if line.recv(len(token), socket.MSG_WAITALL) != token:  # a stranger
                line.close()
                return
        except OSError:
            return
        self._hold(line, _GRACE)

    def _connect(self, host: str, port: int, token: bytes) -> None:
        try:
            line = socket.create_connection((host, port), timeout=_PATIENCE)
            line.sendall(token)
        except OSError:
            return
        self._hold(line, 0)

    def _hold(self, line: socket.socket, grace: float) -> None:
        line.settimeout(None)
        self._lines.append(line)
        try:
            if line.recv(1) == _GOODBYE:
                return
        except OSError:
            pass
        time.sleep(grace)
        if self._closed:
            return
        self.end()
        self._lost()


def complain_and_leave(message: str) -> None:
    """End the process, whatever its other threads are waiting for."""
    print(f"embax: error: {message}", file=sys.stderr, flush=True)
    os._exit(2)


def _of_first_process(host: str, port: int, token: str) -> tuple[str, int, bytes]:
    import numpy as np
    from jax.experimental import multihost_utils

    told = f"{host} {port} {token}".encode().ljust(_ADDRESS)
    told = np.asarray(multihost_utils.broadcast_one_to_all(np.frombuffer(told, np.uint8)))
    host, number, token = told.astype(np.uint8).tobytes().decode().split()
    return host, int(number), token.encode()
