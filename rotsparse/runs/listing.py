"""What runs there are in a folder, and how they are doing."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from rotsparse._core.lock import held
from rotsparse._core.printable import visible
from rotsparse._core.record import is_temporary
from rotsparse.engine.log import LOG, read_log
from rotsparse.runs import folders, layer_run


@dataclasses.dataclass(frozen=True)
class Run:
    """A run: `state` is complete, running, interrupted or failed; `step` of `steps` are done (of the fit that is under
    way, in a run of many); `value` is the lowest objective so far by which rotations are chosen."""

    folder: Path
    command: str
    state: str
    note: str
    step: int | None
    steps: int | None
    value: float


def runs_in(folder: str | Path) -> list[Run]:
    """The runs in a folder and below it, by name. Raises `ValueError` where the folder is not one."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    return [_run(path) for path in sorted(_found(folder))]


def _found(folder: Path) -> Iterator[Path]:
    """The run folders at and below a folder; the parts of a run are not runs of their own."""
    if folders.is_run(folder):
        yield folder
        return
    with contextlib.suppress(OSError), os.scandir(folder) as entries:  # what may not be looked at has no runs
        for entry in entries:
            if entry.is_dir(follow_symlinks=False) and not is_temporary(entry.name):
                yield from _found(Path(entry.path))


def table(folder: str | Path) -> Table:
    """The runs in a folder as a table to print."""
    found = runs_in(folder)
    title = None if found else Text(visible(f"no runs in {folder}"))
    shown = Table(Column("run", overflow="fold"), "command", "state", "steps", "best value", "note", title=title)
    for run in found:
        steps = "" if run.step is None else f"{run.step:,}" + ("" if run.steps is None else f" of {run.steps:,}")
        value = "" if math.isnan(run.value) else f"{run.value:.4f}"
        name = str(run.folder.relative_to(folder)) if run.folder != Path(folder) else str(run.folder)
        shown.add_row(*(Text(visible(cell)) for cell in (name, run.command, run.state, steps, value, run.note)))
    return shown


def _run(folder: Path) -> Run:
    status = folders.read_object(folder / folders.STATUS)
    config = _object(status.get("config")) or folders.read_object(folder / folders.CONFIG)
    metrics = folders.read_object(folder / layer_run.METRICS)
    # A folder of a run from before there was a status is complete, or it would not be there.
    state, note = status.get("state", folders.COMPLETE), str(status.get("error", ""))
    results = [_object(layer).get("result") for layer in _object(metrics.get("layers", {"": metrics})).values()]
    if state == folders.COMPLETE and "NON_FINITE" in results:
        state, note = folders.FAILED, "the objective became NaN or infinite"
    if state == folders.RUNNING and not held(folder):
        state, note = folders.INTERRUPTED, "killed"
    if state == folders.INTERRUPTED:
        note = f"{note}; --resume goes on".removeprefix("; ")

    logged = {path.parent for path in folder.rglob(LOG)}
    # The stages of a fit have folders, and logs, within its own.
    logs = {path: read_log(path) for path in logged if not logged & set(path.parents)}
    checked = [min(line["checked"]) for lines in logs.values() for line in lines if _finite(line.get("checked"))]
    last = max(logs, key=lambda path: (path / LOG).lstat().st_mtime, default=None)
    lines = [] if last is None else logs[last]
    if len(logs) > 1:
        note = f"{note}; {len(logs)} fits, {last.name if last else ''} the last".removeprefix("; ")
    return Run(
        folder=folder,
        command=str(config.get("command", "")),
        state=state,
        note=note,
        step=lines[-1]["step"] if lines else None,
        steps=config.get("steps") if isinstance(config.get("steps"), int) else None,
        value=min(checked, default=math.nan) if len(logs) == 1 else math.nan,
    )


def _finite(checked: Any) -> bool:
    return isinstance(checked, list) and bool(checked) and all(isinstance(value, int | float) for value in checked)


def _object(content: Any) -> dict[str, Any]:
    """What should be an object; an empty one where it is something else: a damaged folder does not break the list."""
    return content if isinstance(content, dict) else {}
