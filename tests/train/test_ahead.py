import threading
import time

import pytest

from embax.train._input.ahead import Ahead


def test_ahead_yields_the_items_of_an_iterator():
    with Ahead(range(50)) as items:
        assert list(items) == list(range(50))
    assert list(items) == []
    assert list(Ahead([])) == []


def test_ahead_makes_at_most_so_many_items_ahead():
    made, ready = [], threading.Event()

    def numbers():
        for number in range(10):
            made.append(number)
            if number == 2:
                ready.set()
            yield number

    with Ahead(numbers(), depth=2) as items:
        assert next(items) == 0
        assert ready.wait(10)
        time.sleep(0.02)  # it would make more now
        assert made == [0, 1, 2]
    assert made == [0, 1, 2]


def test_ahead_makes_items_in_another_thread_which_ends():
    threads = []

    def numbers():
        try:
            while True:
                yield threading.current_thread()
        finally:
            threads.append(threading.current_thread())

    with Ahead(numbers()) as items:
        maker = next(items)
        assert maker is not threading.current_thread()
    assert threads == [maker]
    assert not maker.is_alive()
    with pytest.raises(StopIteration):
        next(items)


def test_ahead_raises_an_error_in_place_of_its_item():
    def numbers():
        yield 1
        raise KeyError("no more")

    items = Ahead(numbers())
    assert next(items) == 1
    with pytest.raises(KeyError, match="no more"):
        next(items)
    with pytest.raises(StopIteration):
        next(items)


def test_ahead_measures_how_long_the_consumer_waits():
    go = threading.Event()

    def numbers():
        yield 1
        go.wait(10)
        yield 2

    with Ahead(numbers()) as items:
        next(items)
        before = items.waited
        threading.Timer(0.1, go.set).start()
        assert next(items) == 2
        assert 0.05 < items.waited - before < 10
