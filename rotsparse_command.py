"""The entry point of the `rotsparse` command.

Outside of the package, because importing anything in it imports JAX first: about a second in which Python turns Ctrl-C
into a traceback, or JAX's garbage collection swallows it. Until the command begins, SIGINT just ends the process.
"""

import os
import signal


def main() -> None:
    """Run the command line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as under nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    _open_closed_streams()
    from rotsparse.cli.main import main

    main()


def _open_closed_streams() -> None:
    """Give standard streams that are closed (`>&-`) somewhere to go: the first files that are opened would take their
    numbers, and with them whatever is printed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
