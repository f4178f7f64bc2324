"""The entry point of the `rotsparse` command.

Outside of the package, because importing anything in it imports JAX first: about a second in which Python turns Ctrl-C
into a traceback, or JAX's garbage collection swallows it. Until the command begins, SIGINT just ends the process.
"""

import signal


def main() -> None:
    """Run the command line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as under nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from rotsparse.cli.main import main

    main()
