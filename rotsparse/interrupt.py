"""SIGINT (Ctrl-C) and SIGTERM (a scheduler that wants the machine back), heard at a moment that suits the fit."""

import signal
import threading


class StopSignals:
    """`with StopSignals() as stop: ... if stop.requested: ...`

    Inside the block the first signal is only noted; another SIGINT raises `KeyboardInterrupt`, for who cannot wait.
    Outside the main thread, where Python allows no handlers, nothing is ever noted.
    """

    def __init__(self):
        self.requested = False
        self._earlier = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._earlier = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception):
        for number, handler in self._earlier.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python

    def _note(self, number, frame):
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
