"""SIGINT (Ctrl-C) and SIGTERM (a scheduler that wants the machine back), heard at a moment that suits the fit."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


class Interrupted(KeyboardInterrupt):
    """A command was stopped, and the same command can be given again to go on; says how."""


class StopSignals:
    """`with StopSignals() as stop: ... if stop.requested: ...`

    Inside the block the first signal is only noted; another SIGINT raises `KeyboardInterrupt`, for who cannot wait.
    Outside the main thread, where Python allows no handlers, nothing is ever noted. With `terminate=False` SIGTERM does
    what it always does: for fits that have nowhere to save what they would stop for.
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
    """A signal with another handler for the length of a block; in the main thread, where alone Python allows it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, signal.SIG_DFL if before is None else before)  # None: not set from Python


def terminated(number, frame):
    """A handler for SIGTERM outside of fits: as if Ctrl-C had been pressed, but with the advice to try again."""
    raise Interrupted("terminated; give the same command again")
