"""The log of a running fit: one JSON object per line, and optionally events for TensorBoard."""

import contextlib
import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from rotsparse._core import files
from rotsparse._core.reading import regular_file

LOG = "log.jsonl"
LARGEST = 2**29  # bytes; of a longer log nothing is read
TENSORBOARD = "tensorboard"


class LogWriter:
    """Write `log.jsonl` in a folder and, with `tensorboard`, event files in `tensorboard/`. With `step` 0 the log
    begins anew; otherwise it continues after that step.

    Every second or two a line is added with `step` (steps done), `objective` (of each restart, the mean since the last
    line), `checked` (the checked objective of each restart, if there was a check), `orthogonality_error` (the largest
    `|RRᵀ - I|`) and `seconds` (since the fit began). A fit that resumes from a checkpoint drops the lines that were
    written after it.

    Raises `ValueError` if the folder cannot be written to, `ImportError` if the extra is missing.
    """

    def __init__(self, folder: Path, step: int, *, tensorboard: bool = False):
        try:
            files.adopt(folder)
            self._events = _event_writer(folder / TENSORBOARD, step) if tensorboard else None
            kept = [line for line in read_log(folder) if line["step"] <= step] if step else []
            files.write_atomically(folder / LOG, "".join(json.dumps(line) + "\n" for line in kept).encode())
            # Line buffered, so that readers of a running log see whole lines.
            self._file = open(folder / LOG, "a", buffering=1, opener=lambda path, _: files.appending(path))
        except OSError as error:
            raise ValueError(f"cannot write to {folder}: {error.strerror}") from None

    def write(self, step: int, **values: Any) -> None:
        """Add a line. `None` is left out; arrays hold one number per restart. If the line cannot be written (the disk
        is full), this gives a warning, and the log ends there."""
        line = {name: _plain(value) for name, value in values.items() if value is not None}
        try:
            self._file.write(json.dumps({"step": step, **line}) + "\n")
        except OSError as error:
            warnings.warn(f"the log {self._file.name} ends at step {step}: {error.strerror}", stacklevel=2)
            self.close()
            self._file, self._events = open(os.devnull, "w"), None
        if self._events is not None:
            for name, value in line.items():
                numbers = value if isinstance(value, list) else [value]
                for i, number in enumerate(numbers):
                    tag = f"{name}/restart_{i}" if isinstance(value, list) else name
                    self._events.add_scalar(tag, math.nan if number is None else number, step)

    def close(self) -> None:
        """Close the log."""
        with contextlib.suppress(OSError):  # a line that could not be written is still buffered
            self._file.close()
        if self._events is not None:
            self._events.close()


def read_log(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a log; an empty list if there is no log. A last line that was cut off when the process was killed is
    left out."""
    try:
        text = regular_file(Path(folder) / LOG, most=LARGEST).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return []
    lines = []
    for line in text.splitlines():
        try:
            read = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(read, dict) or not isinstance(read.get("step"), int):
            break
        lines.append(read)
    return lines


def _event_writer(folder: Path, step: int):
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ImportError(
            "logs for TensorBoard need the extra `tensorboard`: pip install 'rotsparse[tensorboard]'"
        ) from None
    files.make_folder(folder)
    files.expect(folder / "events.out.tfevents.")
    return SummaryWriter(str(folder), purge_step=step + 1)


def _plain(value: Any) -> Any:
    """Convert numbers to JSON; NaN and infinity become null."""
    if isinstance(value, np.ndarray):
        return [_plain(number) for number in value.tolist()]
    value = float(value)
    return value if math.isfinite(value) else None
