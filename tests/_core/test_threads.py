"""`in_threads` is `map`: the same results in the same order, not all items at once, and errors arrive."""

import threading

import pytest

from rotsparse._core import threads
from rotsparse._core.threads import in_threads


def test_results_come_in_the_order_of_the_items_though_later_ones_end_first(monkeypatch):
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 2)
    second_ended = threading.Event()

    def work(i):
        if i == 0:
            assert second_ended.wait(10)
        if i == 1:
            second_ended.set()
        return 10 * i

    assert list(in_threads(work, range(5))) == [0, 10, 20, 30, 40]
    assert list(in_threads(work, [])) == []


def test_items_advance_no_further_than_there_are_threads(monkeypatch):
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 3)
    drawn = []

    def items():
        for i in range(20):
            drawn.append(i)
            yield i

    for done, _ in enumerate(in_threads(lambda i: i, items())):
        assert len(drawn) <= done + 4


def test_an_error_of_the_function_or_of_the_items_reaches_the_caller():
    def broken():
        yield 1
        raise OSError("no more")

    with pytest.raises(ZeroDivisionError):
        list(in_threads(lambda i: 1 / i, [1, 0, 1]))
    with pytest.raises(OSError, match="no more"):
        list(in_threads(lambda i: i, broken()))
