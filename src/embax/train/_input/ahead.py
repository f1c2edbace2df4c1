"""Make the items of an iterator ahead of their use, in another thread."""

import collections
import threading
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")


class _End:
    """The last entry of the queue: the iterator has ended, perhaps with an error."""

    def __init__(self, error: BaseException | None = None):
        self.error = error


class Ahead(Generic[Item]):
    """Iterate items that another thread makes ahead.

    The thread makes the next items while the consumer works, so that it seldom waits. Leaving the context, or `close`,
    ends the thread; an error of the iterator is raised where its item would come.

    Args:
      items: The items; the thread iterates them, and closes them if they are a generator.
      depth: The most items that are ready, or being made, beside the one that the consumer works on.

    Attributes:
      waited: The seconds that the consumer has waited for items.
    """

    def __init__(self, items: Iterable[Item], depth: int = 2):
        self.waited = 0.0
        self._ready: collections.deque[Any] = collections.deque()
        self._filled, self._room = threading.Semaphore(0), threading.Semaphore(depth)
        self._closed = False
        self._thread = threading.Thread(target=self._make, args=(items,), name="embax-ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if self._closed:
            raise StopIteration
        if not self._filled.acquire(blocking=False):
            began = time.monotonic()
            self._filled.acquire()
            self.waited += time.monotonic() - began
        item = self._ready.popleft()
        if isinstance(item, _End):
            self.close()
            if item.error is not None:
                raise item.error
            raise StopIteration
        self._room.release()
        return item

    def close(self) -> None:
        """End the thread; there are no further items."""
        self._closed = True
        self._room.release()
        self._thread.join()
        self._ready.clear()

    def __enter__(self) -> "Ahead[Item]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _make(self, items: Iterable[Item]) -> None:
        end = _End()
        try:
            iterator = iter(items)
            while self._has_room():
                try:
                    item = next(iterator)
                except StopIteration:
                    break
                self._put(item)
            # Here rather than by the consumer: a generator may be closed only by the thread that runs it.
            if (close := getattr(iterator, "close", None)) is not None:
                close()
        except BaseException as error:
            end = _End(error)
        self._put(end)

    def _has_room(self) -> bool:
        self._room.acquire()
        return not self._closed

    def _put(self, item: Any) -> None:
        self._ready.append(item)
        self._filled.release()
