"""The `rotsparse` command."""

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from rotsparse.cli.options import (
    Benchmark,
    Capture,
    Compare,
    Demo,
    Fit,
    FitModel,
    Fold,
    FoldModel,
    Inspect,
    Report,
    Runs,
)
from rotsparse.cli.output import output_until_closed

# Commands are imported after `tyro.cli` has parsed the options: figures and baselines take as long to import as
# everything else, and `--help` and mistyped options do not need them.


def main() -> None:
    """Entry point. Exit codes: 0 success; 1 the fit went wrong; 2 bad input, or files that cannot be written (with a
    message); 75 interrupted, can be resumed (EX_TEMPFAIL: try again); 130 interrupted with nothing saved."""
    with output_until_closed():
        sys.exit(_main())


def _main() -> int:
    command = tyro.cli(
        Annotated[Demo, tyro.conf.subcommand("demo")]
        | Annotated[Fit, tyro.conf.subcommand("fit")]
        | Annotated[Compare, tyro.conf.subcommand("compare")]
        | Annotated[Benchmark, tyro.conf.subcommand("benchmark")]
        | Annotated[Fold, tyro.conf.subcommand("fold")]
        | Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[Runs, tyro.conf.subcommand("runs")]
        | Annotated[Inspect, tyro.conf.subcommand("inspect")]
        | Annotated[Capture, tyro.conf.subcommand("capture")]
        | Annotated[FitModel, tyro.conf.subcommand("fit-model")]
        | Annotated[FoldModel, tyro.conf.subcommand("fold-model")],
        prog="rotsparse",
        description="Rotations of a network's activation spaces in which local changes have local effects.",
    )
    _cache_compilations()
    from rotsparse._core.interrupt import Interrupted, handled, terminated
    from rotsparse._core.printable import visible
    from rotsparse.cli import commands

    try:
        with contextlib.ExitStack() as stack:
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


def _explained(error: Exception) -> str:
    """The message of an error, without the operating system's error number."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"


def _cache_compilations() -> None:
    """Cache compiled programs on disk: most of a short run is compilation."""
    import jax

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rotsparse" / "jax"
    options: dict[str, Any] = {
        "jax_compilation_cache_dir": str(cache),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        for name, value in options.items():
            jax.config.update(name, value)
