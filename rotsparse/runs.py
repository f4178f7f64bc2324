"""Run folders: what a run writes, and never half of it.

A run works in the folder `OUT.unfinished` and is moved to `OUT` when it is complete, so one that fails or is
interrupted leaves no half-written `OUT` and never harms an earlier result. Where it had saved checkpoints the
unfinished folder stays and the run can be resumed; where it had not, there is nothing to go on with, and it is removed.
One process at a time works in it.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from rotsparse.files import write_atomically
from rotsparse.interrupt import Interrupted
from rotsparse.lock import LOCK, FolderLock

CONFIG = "config.json"

# What is known about a run while it has no results: its state, its config, when it began, what went wrong.
STATUS = "status.json"
RUNNING, INTERRUPTED, FAILED, COMPLETE = "running", "interrupted", "failed", "complete"

# A run, and each of its parts, keeps its checkpoints in a folder of this name.
CHECKPOINTS = "checkpoints"

# Options that say how a command is run, and not what it computes.
_HOW = ("out", "overwrite", "resume", "checkpoint_minutes", "tensorboard", "devices")


@contextlib.contextmanager
def new_run(
    out: str | os.PathLike, *, config: dict[str, Any] | None = None, overwrite: bool = False, resume: bool = False
) -> Iterator[Path]:
    """A folder to write a run into; it becomes `out` when the block ends without an error. `config` is what was asked
    for, as JSON.

    With `resume` it is the folder of the earlier run that was interrupted, if there is one. Raises `ValueError` where
    `out` exists, unless `overwrite` is set and it is a run; where another process works on the same run; where an
    interrupted run is there and neither `resume` nor `overwrite` is set; and where it was begun with another config.
    An interruption that leaves checkpoints becomes `Interrupted`, which says how to go on.
    """
    out = Path(out)
    work = unfinished(out)
    lock = FolderLock(work)
    try:
        try:
            _check_target(out, overwrite)
            begun = _begun(work, config or {}, overwrite, resume)
        except BaseException:
            if not checkpointed(work):
                shutil.rmtree(work, ignore_errors=True)
            raise
        status = {"began": begun, "config": config or {}}
        write_json(work / STATUS, {"state": RUNNING, **status})
        try:
            yield work
            write_json(work / STATUS, {"state": COMPLETE, **status})
            _replace(work, out)
        except BaseException as error:
            if not checkpointed(work):
                shutil.rmtree(work, ignore_errors=True)
                raise
            interrupted = isinstance(error, KeyboardInterrupt)
            status |= {"state": INTERRUPTED} if interrupted else {"state": FAILED, "error": str(error)}
            with contextlib.suppress(OSError):  # a full disk must not hide what went wrong first
                write_json(work / STATUS, status)
            if interrupted:
                raise Interrupted(f"interrupted: to go on, give the same command with --resume ({work})") from None
            raise
        (out / LOCK).unlink(missing_ok=True)
        for folder in list(out.rglob(CHECKPOINTS)):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        lock.release()


def unfinished(out: Path) -> Path:
    """Where the run that is to become `out` works."""
    return out.with_name(f"{out.name}.unfinished")


def checkpointed(work: Path) -> bool:
    """Whether there is anything to go on with in an unfinished run."""
    return any(work.rglob(f"{CHECKPOINTS}/step-*"))


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise ValueError(f"{out} exists: choose another folder, or pass --overwrite to replace it")
    if not (out / CONFIG).is_file():
        raise ValueError(f"{out} is not a run folder (it has no {CONFIG}): it will not be replaced")


def _begun(work: Path, config: dict[str, Any], overwrite: bool, resume: bool) -> str:
    """Prepare the folder to begin or to go on in: when the run began."""
    if checkpointed(work) and resume:
        status = read_json(work / STATUS)
        before, now = ({k: v for k, v in json.loads(json.dumps(c)).items() if k not in _HOW}
                       for c in (status["config"], config))  # fmt: skip
        lines = [f"{k}: {before.get(k)} then, {now.get(k)} now" for k in before | now if before.get(k) != now.get(k)]
        if lines:
            shown = "".join(f"\n  {line}" for line in lines)
            raise ValueError(f"{work} was begun with other options:{shown}\nGive the same ones to go on with it")
        return status["began"]
    if checkpointed(work) and not overwrite:
        raise ValueError(
            f"{work} holds a run that was interrupted: pass --resume to go on with it, or --overwrite to begin again"
        )
    for path in work.iterdir():
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return datetime.now().isoformat(timespec="seconds")


def _replace(work: Path, out: Path) -> None:
    """Move a finished run into place. The earlier one is moved aside first: two renames, and both folders are whole at
    every moment."""
    if not out.exists():
        work.rename(out)
        return
    earlier = out.with_name(f".{out.name}-earlier-{os.getpid()}")
    out.rename(earlier)
    try:
        work.rename(out)
    except BaseException:
        earlier.rename(out)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write JSON atomically; NaN and infinity, which JSON does not have, become null."""
    write_atomically(path, (json.dumps(_finite(content), indent=2) + "\n").encode())


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file of a run. Raises `ValueError` where it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}. Is this a run folder?") from None


def versions() -> dict[str, str]:
    """What a result depends on beside its inputs."""
    packages = ("rotsparse", "jax", "jaxlib", "optax", "equinox", "numpy", "scikit-learn")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def _finite(value):
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if hasattr(value, "tolist"):
        return _finite(value.tolist())
    if isinstance(value, float) and value not in (float("inf"), float("-inf")) and value == value:
        return value
    return None if isinstance(value, float) else value
