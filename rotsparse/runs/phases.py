"""The phases of a run: each says on the console what it is at, and what it took."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console

# Is told what a phase is at.
Shown = Callable[[str], None]


class Phases:
    """The seconds of every phase so far, by name."""

    def __init__(self, console: Console):
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[Shown]:
        """Show the name while the phase runs; it is handed a function that adds what it is at."""
        begun = time.perf_counter()
        with self.console.status(f"{name} ...") as status:
            yield lambda at: status.update(f"{name}: {at} ...")
        self.add(name, begun)

    def add(self, name: str, begun: float) -> None:
        """A phase that began at `begun` (by `time.perf_counter`) ends now."""
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun
