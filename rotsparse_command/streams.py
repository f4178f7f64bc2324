"""Standard streams that may be closed or full: what cannot be written to them (`rotsparse fit ... | head`, a full disk)
is dropped, and the command goes on."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


def open_closed_streams() -> None:
    """Give standard streams that are closed (`>&-`) somewhere to go: the first files that are opened would take their
    numbers, and with them whatever is printed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


class UntilClosed:
    """A text stream that drops its output once writing has failed. `None`, which Python uses for streams that were
    closed before it started, drops everything. All but `write` and `flush` is passed on to the stream."""

    def __init__(self, stream: TextIO | None):
        self._stream = open(os.devnull, "w") if stream is None else stream
        if isinstance(self._stream, io.TextIOWrapper):  # characters that the terminal lacks are escaped
            self._stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Write, or drop the text if that fails."""
        with self._silenced():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or drop the text if that fails."""
        with self._silenced():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _silenced(self):
        try:
            yield
        except OSError:
            # The stream keeps its unwritten text and writes it when the process ends: point it at the null device.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def output_until_closed() -> Iterator[None]:
    """Wrap standard output and standard error in `UntilClosed` for the length of a block."""
    streams: list[Any] = [UntilClosed(stream) for stream in (sys.stdout, sys.stderr)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            yield
        finally:
            for stream in streams:
                stream.flush()
