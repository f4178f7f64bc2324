"""Signals that tests send to their own process, and those that are meant for the test run.

Commands and fits that tests run in this process catch SIGINT and SIGTERM. Whoever presses Ctrl-C means the test run,
not the command that happens to be tested: a signal that no test has sent ends the run as soon as the test is over.
"""

import collections
import os
import signal
import socket

import pytest

# Python writes the number of every signal that it handles to this socket, whoever has the handler.
_arriving, _wakeup = socket.socketpair()
_arriving.setblocking(False)
_wakeup.setblocking(False)
_sent: collections.Counter[int] = collections.Counter()
_arrived: collections.Counter[int] = collections.Counter()


def send(number: int) -> None:
    """Send this process a signal, which then is not taken for one that is meant for the test run."""
    _sent[number] += 1
    os.kill(os.getpid(), number)


def pytest_sessionstart():
    signal.set_wakeup_fd(_wakeup.fileno(), warn_on_full_buffer=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    try:
        return (yield)
    finally:
        _end_the_run_if_told_to()


def _end_the_run_if_told_to() -> None:
    try:
        _arrived.update(_arriving.recv(4096))
    except BlockingIOError:
        return
    if _arrived[signal.SIGINT] > _sent[signal.SIGINT]:
        raise KeyboardInterrupt
    if _arrived[signal.SIGTERM] > _sent[signal.SIGTERM]:
        pytest.exit("terminated", returncode=128 + signal.SIGTERM)


def pytest_unconfigure():
    signal.set_wakeup_fd(-1)
    _arriving.close()
    _wakeup.close()
