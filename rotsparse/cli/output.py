"""Output of the command line. Text is never taken for markup, and output that cannot be written (to `rotsparse fit ...
| head`, to a full disk, to a closed stream) is dropped while the command goes on."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

import rich.console
from rich.text import Text

from rotsparse._core.printable import visible


class Console(rich.console.Console):
    """A console that prints strings literally, without markup or emoji, and shows control characters."""

    def render_str(self, text: str, **options) -> Text:
        """Render a string literally."""
        options |= {"markup": False, "emoji": False}
        return super().render_str(visible(text, lines=True), **options)


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
