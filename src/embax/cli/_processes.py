"""Several processes that run one command together, by `jax.distributed`."""

import atexit
import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from typing import NamedTuple

import typer

from ._common import UserError

# Seconds without a heartbeat after which JAX counts a process as lost, and seconds until all others have ended then.
# JAX sends a heartbeat every 10 seconds, from a C++ thread that does not need Python's lock. Even on a machine with
# four times as many busy threads as cores, healthy runs passed with a limit of 2 seconds.
_HEARTBEAT, _END = 20, 30
# Seconds that a process waits for the others to begin.
_JOIN = 300
# Seconds that the others wait at the end for the first process, which writes the file.
_LAST_WRITE = 3600
# Words in the errors of CPU and GPU collectives, and of JAX's coordinator, when another process is gone.
_LOST = re.compile(
    r"gloo|nccl|socket|connection|heartbeat|coordination|another task|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED", re.I
)


class Address(NamedTuple):
    """How a process finds the others; None for values that JAX detects from the cluster."""

    coordinator: str | None
    number: int | None
    process: int | None


def address(distributed: bool, coordinator: str | None, number: int | None, process: int | None) -> Address | None:
    """Check the options by which a process finds the others.

    Args:
      distributed: Whether there are other processes.
      coordinator: The address where the first process listens, `host:port`.
      number: The number of processes.
      process: The number of this process.

    Returns:
      The address, or None if this process is alone.

    Raises:
      BadParameter: If the options do not fit together.
    """
    given = [coordinator is not None, number is not None, process is not None]
    if any(given) and not distributed:
        raise typer.BadParameter("--coordinator, --num-processes and --process-id need --distributed")
    if any(given) and not all(given):
        raise typer.BadParameter("--coordinator, --num-processes and --process-id must be given together, or none")
    if number is not None and process is not None and process >= number:
        raise typer.BadParameter(f"--process-id must be less than the {number} of --num-processes, got {process}")
    return Address(coordinator, number, process) if distributed else None


@contextlib.contextmanager
def together(where: Address | None, lost: str) -> Iterator[bool]:
    """Join the other processes, and end when one of them is lost.

    A process that fails ends without waiting for the others. JAX then raises an error in processes whose connection to
    it breaks, and aborts the rest when heartbeats are missing. There is no public hook for the abort, so every process
    prints at the start what to do in this case.

    Args:
      where: The address; None for a process that is alone.
      lost: A sentence that tells what to do when another process is lost.

    Yields:
      Whether this is the first process; only the first one writes and prints.

    Raises:
      UserError: If the others cannot be joined, or one of them is lost.
    """
    if where is None:
        yield True
        return
    import jax

    on_terminate = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
    _join(where)
    # JAX's own handler takes SIGTERM as a notice of preemption, and lets the process run on.
    signal.signal(signal.SIGTERM, on_terminate)
    if where.number != 1:
        note = f"embax: note: if another process is lost, this one ends within {_END} seconds. {lost}"
        print(note, file=sys.stderr, flush=True)
    with _quiet():
        try:
            yield jax.process_index() == 0
            jax.distributed.shutdown()
        except BaseException as error:
            # Exit handlers run in reverse order: ours ends the process before JAX's, which would wait for the others.
            atexit.register(_leave, 130 if isinstance(error, KeyboardInterrupt) else 2)
            if _is_loss(error):
                raise UserError(f"another process was lost. {lost}") from None
            raise


def _join(where: Address) -> None:
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Without this timer, JAX would abort the process with a C++ error.
    message = f"the other processes have not come within {_JOIN} seconds. Start all of them with one address."
    too_late = threading.Timer(_JOIN, _complain_and_leave, [message])
    too_late.daemon = True
    too_late.start()
    try:
        jax.distributed.initialize(
            *where,
            initialization_timeout=_JOIN + 60,
            heartbeat_timeout_seconds=_HEARTBEAT,
            shutdown_timeout_seconds=_LAST_WRITE,
        )
    except (ValueError, RuntimeError) as error:
        atexit.register(_leave, 2)
        if where.coordinator is None:
            raise UserError(
                f"--distributed finds no cluster ({_first_line(error)}). Start it by Slurm, MPI or Kubernetes, or pass "
                "--coordinator, --num-processes and --process-id."
            ) from None
        raise UserError(f"cannot join the other processes at {where.coordinator} ({_first_line(error)}).") from None
    finally:
        too_late.cancel()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _is_loss(error: BaseException) -> bool:
    """Whether an error of JAX's runtime reports a broken connection.

    Such errors begin with a status, such as "UNAVAILABLE: "; while the backend starts, its name comes before.
    """
    return isinstance(error, ValueError | RuntimeError) and bool(
        re.match(r"(Unable to initialize backend '\w+': )?[A-Z_]+: ", str(error)) and _LOST.search(str(error))
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Redirect standard output, where Gloo prints its connections from C++."""
    sys.stdout.flush()
    kept, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)


def _complain_and_leave(message: str) -> None:
    print(f"embax: error: {message}", file=sys.stderr, flush=True)
    os._exit(2)


def _leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
