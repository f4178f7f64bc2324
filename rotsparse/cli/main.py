"""The `rotsparse` command, from its options on (they are parsed in `rotsparse_command`)."""

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import jax

from rotsparse._core.interrupt import Interrupted, handled, terminated
from rotsparse._core.printable import visible
from rotsparse.cli import commands


def main(command: Any) -> int:
    """Run a command and return its exit code (see `rotsparse_command.main`)."""
    _cache_compilations()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_warnings_as_text())
            stack.enter_context(handled(signal.SIGTERM, terminated))
            if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as the entry point leaves it
                stack.enter_context(handled(signal.SIGINT, signal.default_int_handler))
            return commands.run(command)
    except (ValueError, OSError, ImportError) as error:
        print(visible(f"rotsparse: error: {_explained(error)}", lines=True), file=sys.stderr)
        return 2
    except Interrupted as interruption:
        print(visible(f"rotsparse: {interruption}", lines=True), file=sys.stderr)
        return 75
    except KeyboardInterrupt:
        print("rotsparse: interrupted; nothing was written", file=sys.stderr)
        return 130


@contextlib.contextmanager
def _warnings_as_text() -> Iterator[None]:
    """Print warnings like errors: they contain file names, too."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_: visible(f"rotsparse: warning: {message}\n", lines=True)
    try:
        yield
    finally:
        warnings.formatwarning = before


def _explained(error: Exception) -> str:
    """The message of an error, without the operating system's error number."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"


def _cache_compilations() -> None:
    """Cache compiled programs on disk, if there is a home for them: most of a short run is compilation."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.environ.get("JAX_COMPILATION_CACHE_DIR") or not os.path.isabs(cache):
        return
    options: dict[str, Any] = {
        "jax_compilation_cache_dir": os.path.join(cache, "rotsparse", "jax"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    for name, value in options.items():
        jax.config.update(name, value)
