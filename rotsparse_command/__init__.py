"""The `rotsparse` command, as far as it goes without JAX: its options and its help.

Outside of the package `rotsparse`, because importing anything in that imports JAX first: about a second in which Python
turns Ctrl-C into a traceback, or JAX's garbage collection swallows it, and which `--help` need not take. Until the
command begins, SIGINT just ends the process.
"""

import signal
import sys

from rotsparse_command.options import parsed
from rotsparse_command.streams import open_closed_streams, output_until_closed


def main() -> None:
    """Entry point. Exit codes: 0 success, 1 the fit went wrong, 2 bad input or files that cannot be written (with a
    message), 75 interrupted and can be resumed (EX_TEMPFAIL: try again), 130 interrupted with nothing to go on with."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as under nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    open_closed_streams()
    command_line()


def command_line() -> None:
    """Run what `sys.argv` asks for, and exit."""
    with output_until_closed():
        command = parsed()
        from rotsparse.cli.main import main

        sys.exit(main(command))
