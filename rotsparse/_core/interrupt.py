"""Record SIGINT (Ctrl-C) and SIGTERM (from a scheduler), so that a fit can stop between two steps."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


class Interrupted(KeyboardInterrupt):
    """A command was stopped and can be resumed; the message says how."""


class StopSignals:
    """`with StopSignals() as stop: ... if stop.requested: ...`

    Inside the block the first signal sets `requested`; a second SIGINT raises `KeyboardInterrupt`. Outside the main
    thread Python allows no handlers, and nothing is recorded. With `terminate=False` SIGTERM keeps its usual effect,
    for fits that have no folder to save to.
    """

    def __init__(self, *, terminate: bool = True):
        self.requested = False
        self._numbers = (signal.SIGINT, signal.SIGTERM) if terminate else (signal.SIGINT,)
        self._handlers = contextlib.ExitStack()

    def __enter__(self):
        for number in self._numbers:
            self._handlers.enter_context(handled(number, self._note))
        return self

    def __exit__(self, *exception):
        self._handlers.close()

    def _note(self, number, frame):
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


@contextlib.contextmanager
def handled(number: int, handler: Callable) -> Iterator[None]:
    """Set a signal's handler for the length of a block. Does nothing outside the main thread, where Python forbids
    it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, signal.SIG_DFL if before is None else before)  # None: not set from Python


def terminated(number, frame):
    """A handler for SIGTERM outside of fits: raise `Interrupted`, with the advice to give the same command again."""
    raise Interrupted("terminated; give the same command again")
