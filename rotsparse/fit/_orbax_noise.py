"""What Orbax prints over a save or a load that fails, beside the exception that it raises.

Its threads log that exception with a traceback before they hand it on. It also closes the event loop of a thread while
TensorStore is still busy with other arrays: their failures are then logged when their tasks are collected, and a thread
of TensorStore's that meets the closed loop has an exception that nobody can catch. The exception that is raised says
all of it, and whoever calls Orbax here reports it.
"""

import asyncio
import functools
import logging
import sys


@functools.cache
def silence() -> None:
    """From now on, in this process, such messages are not printed. Others, of the same loggers too, are."""
    logging.getLogger("absl").addFilter(lambda record: "_SignalingThread.run() raised" not in str(record.msg))
    logging.getLogger("asyncio").addFilter(lambda record: not _is_orphan(record.getMessage()))
    earlier = sys.unraisablehook
    sys.unraisablehook = lambda unraisable: None if _met_closed_loop(unraisable) else earlier(unraisable)


def _is_orphan(message: str) -> bool:
    """Whether asyncio found a failed task or future of Orbax's or TensorStore's that nobody asked for its result."""
    return "exception was never retrieved" in message and ("orbax" in message or "tensorstore" in message)


def _met_closed_loop(unraisable: "sys.UnraisableHookArgs") -> bool:
    """Whether foreign code called `loop.call_soon_threadsafe` after the loop was closed: no Python stood behind it."""
    trace = unraisable.exc_traceback
    return (
        isinstance(unraisable.exc_value, RuntimeError)
        and trace is not None
        and trace.tb_frame.f_code is asyncio.BaseEventLoop.call_soon_threadsafe.__code__
        and trace.tb_frame.f_back is None
    )
