"""How scripts start."""

import sys
from collections.abc import Callable
from typing import TypeVar

import tyro

Config = TypeVar("Config")


def start(main: Callable[[Config], None], config: type[Config]) -> None:
    """Run a script with the options of its command line. What it refuses (data that cannot be read, a folder that holds
    another run) is one line and exit code 2, not a traceback."""
    try:
        main(tyro.cli(config))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
