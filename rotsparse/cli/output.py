"""Output that nobody reads any more (`rotsparse fit ... | head`) is dropped, and the command goes on."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class UntilClosed:
    """A text stream that falls silent when the pipe behind it is closed. Everything but writing is the stream's own."""

    def __init__(self, stream: TextIO):
        self._stream = stream

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
        except BrokenPipeError:
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
