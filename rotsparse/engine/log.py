"""The log of a fit, written as it runs: one JSON object a line, and the same for TensorBoard."""

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
TENSORBOARD = "tensorboard"


class LogWriter:
    """Writes `log.jsonl` in a folder, and with `tensorboard` event files to `tensorboard/`: begins (`step` 0) or
    continues behind `step` steps.

    Every second or two the log gets a line with `step` (how many are done), `objective` (of each restart, the mean
    since the line before), `checked` (where the objective was checked at this step, that of each restart),
    `orthogonality_error` (the largest `|RRᵀ - I|`) and `seconds` (since the fit began). A fit that continues from a
    checkpoint continues its log: what was written after that checkpoint is dropped.

    Raises `ValueError` if the folder cannot be written to, `ImportError` if the extra is missing.
    """

    def __init__(self, folder: Path, step: int, *, tensorboard: bool = False):
        try:
            files.adopt(folder)
            self._events = _event_writer(folder / TENSORBOARD, step) if tensorboard else None
            kept = [line for line in read_log(folder) if line["step"] <= step] if step else []
            files.write_atomically(folder / LOG, "".join(json.dumps(line) + "\n" for line in kept).encode())
            # A line at a time: who reads along sees whole lines.
            self._file = open(folder / LOG, "a", buffering=1, opener=lambda path, _: files.appending(path))
        except OSError as error:
            raise ValueError(f"cannot write to {folder}: {error.strerror}") from None

    def write(self, step: int, **values: Any) -> None:
        """Add a line; `None` is left out, arrays hold one number a restart. Where it cannot be written (the disk is
        full), that is a warning, and the log ends there."""
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
        """End the log."""
        with contextlib.suppress(OSError):  # the line that could not be written before cannot be now
            self._file.close()
        if self._events is not None:
            self._events.close()


def read_log(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a log; none where there is none. The last line of a process that was killed may be cut off, and is
    left out."""
    try:
        text = regular_file(Path(folder) / LOG).read_text(encoding="utf-8")
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
    """Numbers as JSON has them: NaN and infinity become null."""
    if isinstance(value, np.ndarray):
        return [_plain(number) for number in value.tolist()]
    value = float(value)
    return value if math.isfinite(value) else None
