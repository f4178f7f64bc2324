"""The runs in a folder, and their progress."""

import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from rotsparse._core.lock import held
from rotsparse._core.printable import visible
from rotsparse._core.record import is_temporary
from rotsparse.engine.log import LOG, read_log
from rotsparse.report.subject import subject
from rotsparse.runs import folders, layer_run


@dataclasses.dataclass(frozen=True)
class Run:
    """A run. `began`: when, as text. `of`: what was fitted (`report.subject`). `finding`: of a complete run of one
    layer, how many entries hold 99% of the Jacobian in neurons and in the learned basis. `state`: complete, running,
    interrupted or failed. `step`, `steps`: how many steps are done, and of how many (in a run with several fits, of the
    last one). `value`: the lowest objective so far, as rotations are chosen by it; NaN in a run with several fits."""

    folder: Path
    command: str
    state: str
    note: str
    step: int | None
    steps: int | None
    value: float
    began: str = ""
    of: str = ""
    finding: str = ""


def runs_in(folder: str | Path) -> list[Run]:
    """The runs in a folder and below it, sorted by name. Raises `ValueError` if there is no such folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    runs = []
    for path in sorted(_found(folder)):
        with contextlib.suppress(FileNotFoundError):  # it has just been moved: it is complete
            runs.append(_run(path))
    return runs


def _found(folder: Path) -> Iterator[Path]:
    """The run folders at and below a folder. Folders within a run are not listed as runs."""
    if folders.is_run(folder):
        yield folder
        return
    with contextlib.suppress(OSError), os.scandir(folder) as entries:  # folders without permission are skipped
        for entry in entries:
            if entry.is_dir(follow_symlinks=False) and not is_temporary(entry.name):
                yield from _found(Path(entry.path))


def table(folder: str | Path) -> Table:
    """The runs in a folder as a table to print."""
    found = runs_in(folder)
    title = None if found else Text(visible(f"no runs in {folder}"))
    columns = "began", "command", "of", "state", "steps", "best value", "note"
    shown = Table(Column("run", overflow="fold"), *columns, title=title)
    for run in found:
        steps = "" if run.step is None else f"{run.step:,}" + ("" if run.steps is None else f" of {run.steps:,}")
        value = "" if math.isnan(run.value) else f"{run.value:.4f}"
        name = str(run.folder.relative_to(folder)) if run.folder != Path(folder) else str(run.folder)
        note = "; ".join(filter(None, (run.note, run.finding)))
        began = run.began.replace("T", " ")[:16]
        shown.add_row(*(Text(visible(c)) for c in (name, began, run.command, run.of, run.state, steps, value, note)))
    return shown


def _run(folder: Path) -> Run:
    seen = {name: folders.seen_object(folder / name) for name in (folders.STATUS, folders.CONFIG, layer_run.METRICS)}
    damaged = [name for name, content in seen.items() if not content and os.path.lexists(folder / name)]
    status, config, metrics = seen.values()
    config = _object(status.get("config")) or config
    # Versions that wrote no status left only complete runs.
    state, note = str(status.get("state", folders.COMPLETE)), str(status.get("error", ""))
    if damaged:
        note = f"{', '.join(damaged)} damaged"
    results = [_object(layer).get("result") for layer in _object(metrics.get("layers", {"": metrics})).values()]
    if state == folders.COMPLETE and "NON_FINITE" in results:
        state, note = folders.FAILED, "the objective became NaN or infinite"
    if state == folders.RUNNING and not held(folder):
        state, note = folders.INTERRUPTED, "killed"
    if state == folders.INTERRUPTED:
        note = f"{note}; --resume goes on".removeprefix("; ")

    logged = {path.parent for path in folder.rglob(LOG)}
    # The stages of a fit have folders and logs within its folder.
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
        began=str(status.get("began", "")),
        of=subject(config),
        finding=_finding(_object(metrics.get("metrics"))) if state == folders.COMPLETE else "",
    )


def _finding(metrics: Mapping[str, Any]) -> str:
    """How many entries hold 99% of the mean squared Jacobian, before and after."""
    sizes = (_object(_object(metrics.get(basis)).get("edges_99")).get("value") for basis in ("neurons", "learned"))
    before, after = (f"{size:,.0f}" if isinstance(size, int | float) else "" for size in sizes)
    return f"entries for 99%: {before} → {after}" if before and after else ""


def _finite(checked: Any) -> bool:
    numbers = isinstance(checked, list) and bool(checked) and all(isinstance(value, int | float) for value in checked)
    return numbers and all(abs(value) <= sys.float_info.max for value in checked)


def _object(content: Any) -> dict[str, Any]:
    """`content` if it is an object, else an empty one: a damaged run does not break the list."""
    return content if isinstance(content, dict) else {}
