"""What the command line prints: text is never markup, and what cannot be written (to `rotsparse fit ... | head`, to a
full disk, to a stream that was closed) is dropped while the command goes on."""

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
    """A console on which strings are text: nothing in them is markup or an emoji, and control characters are shown."""

    def render_str(self, text: str, **options) -> Text:
        """As that of any console, for text from anywhere."""
        options |= {"markup": False, "emoji": False}
        return super().render_str(visible(text, lines=True), **options)


class UntilClosed:
    """A text stream that falls silent when nothing can be written to it any more. `None`, which Python has for streams
    that were closed before it started, is silent. Everything but writing is the stream's own."""

    def __init__(self, stream: TextIO | None):
        self._stream = open(os.devnull, "w") if stream is None else stream
        if isinstance(self._stream, io.TextIOWrapper):  # a terminal that has no arrows shows their numbers
            self._stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """As the stream's."""
        with self._silenced():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As the stream's."""
        with self._silenced():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _silenced(self):
        try:
            yield
        except OSError:
            # The stream keeps what it could not write, and writes it at the end of the process: into nothing.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def output_until_closed() -> Iterator[None]:
    """Standard output and errors as `UntilClosed`, for the length of a block."""
    streams: list[Any] = [UntilClosed(stream) for stream in (sys.stdout, sys.stderr)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            yield
        finally:
            for stream in streams:
                stream.flush()
