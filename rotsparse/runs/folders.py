"""Run folders: complete, or not there.

A run works in the folder `OUT.unfinished`, which is renamed to `OUT` when the run is complete. A run that fails or is
interrupted leaves no half-written `OUT` and no damage to an earlier result, or to a user's files under either name:
only what the run's own record says it made is replaced or removed (see `_core.files`). If the run had saved
checkpoints, the unfinished folder stays and the run can be resumed; otherwise the folder is removed. A complete run
that cannot be renamed stays in `OUT.unfinished`. One process at a time works in the folder.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from rotsparse._core import files
from rotsparse._core.differences import differences
from rotsparse._core.digests import digest
from rotsparse._core.errors import CheckError
from rotsparse._core.interrupt import Interrupted
from rotsparse._core.lock import LOCK, FolderLock
from rotsparse._core.reading import regular_file

CONFIG = "config.json"

# Files of a fit's results.
METRICS = "metrics.json"
SOLUTION = "solution.npz"
ROTATIONS = "rotations.safetensors"
TABLE = "table.md"
PICTURES = "pictures.npz"

# In the metadata of the rotations: how their directions are ordered.
NUMBERED = "by influence"

# The state of a run, its config, when it began, and the error if it failed: all that is known before there are results.
STATUS = "status.json"
RUNNING, INTERRUPTED, FAILED, COMPLETE = "running", "interrupted", "failed", "complete"

# Key of a config: the SHA-256 of every input file, by the name of its option (see `inputs`).
INPUTS = "inputs"

# Name of the folder in which a run, or a layer of a run, keeps its checkpoints.
CHECKPOINTS = "checkpoints"

# Key of the last entry of every JSON file that is written here: a hash of all others, which shows damage.
DIGEST = "digest"

# A JSON file of more bytes is none of ours.
LARGEST = 2**28

# Options that change how a command runs, but not its result.
_HOW = (INPUTS, "out", "overwrite", "resume", "checkpoint_minutes", "tensorboard", "devices")


@contextlib.contextmanager
def new_run(
    out: str | os.PathLike, *, config: dict[str, Any] | None = None, overwrite: bool = False, resume: bool = False
) -> Iterator[Path]:
    """Give a folder to write a run into, and rename it to `out` when the block ends without an error. `config` holds
    the options of the command, as JSON.

    With `resume`, the folder is that of an earlier run that was interrupted, if there is one. Raises `ValueError` if
    `out` exists, at the start or at the end, unless `overwrite` is set and it is a run; if another process works on the
    same run; if there is an interrupted run and neither `resume` nor `overwrite` is set; and if that run has another
    config. An interruption that leaves checkpoints is raised as `Interrupted`, whose message says how to resume.
    """
    out = Path(out)
    work = unfinished(out)
    _check_work(work)
    files.make_folder(work, own=True)
    lock = FolderLock(work)
    try:
        _check_work(work)
        identity = files.identity(work)
        try:
            _check_target(out, overwrite)
            begun = _begun(work, config or {}, overwrite, resume)
        except BaseException:
            if not _kept(work):
                _remove(work)
            raise
        status = {"began": begun, "config": config or {}}
        write_json(work / STATUS, {"state": RUNNING, **status})
        try:
            yield work
            write_json(work / STATUS, {"state": COMPLETE, **status})
        except BaseException as error:
            if not checkpointed(work):
                _remove(work)
                raise
            interrupted = isinstance(error, KeyboardInterrupt)
            status |= {"state": INTERRUPTED} if interrupted else {"state": FAILED, "error": str(error)}
            with contextlib.suppress(OSError, ValueError):  # a full disk must not hide what went wrong first
                write_json(work / STATUS, status)
            if interrupted:
                raise Interrupted(f"interrupted: to go on, give the same command with --resume ({work})") from None
            raise
        _move(work, identity, out, overwrite)
        for folder in list(out.rglob(CHECKPOINTS)):
            with contextlib.suppress(OSError):
                files.remove(folder)
    finally:
        lock.release()


def unfinished(out: Path) -> Path:
    """The folder in which a run works before it becomes `out`."""
    return out.with_name(f"{out.name}.unfinished")


def checkpointed(work: Path) -> bool:
    """Whether an unfinished run has checkpoints to resume from."""
    return any(work.rglob(f"{CHECKPOINTS}/step-*"))


def is_run(folder: Path) -> bool:
    """Whether a run wrote this folder, by its status, or, for runs of versions that wrote none, by the keys of its
    config (folders of Hugging Face models also hold a `config.json`)."""
    status, config = seen_object(folder / STATUS), seen_object(folder / CONFIG)
    return status.get("state") in (RUNNING, INTERRUPTED, FAILED, COMPLETE) or {"command", "versions"} <= config.keys()


def _check_work(work: Path) -> None:
    """Raise `ValueError` if there is something at the place of an unfinished run that rotsparse did not make."""
    if not os.path.lexists(work):
        return
    files.check_folder(work)
    if not files.is_made(work):
        raise ValueError(
            f"{work}, where the run would work until it is complete, was not made by rotsparse (or by an earlier "
            f"version: it has no {files.RECORD}) and is left alone: rename it, remove it yourself, or choose another "
            "--out"
        )


def _remove(work: Path) -> None:
    """Remove an unfinished run without checkpoints."""
    with contextlib.suppress(OSError):
        files.remove(work)


def _kept(work: Path) -> bool:
    """Whether the folder of an unfinished run holds checkpoints or a complete run."""
    return checkpointed(work) or _complete(work)


def _complete(work: Path) -> bool:
    return seen_object(work / STATUS).get("state") == COMPLETE


def _check_target(out: Path, overwrite: bool) -> None:
    if not os.path.lexists(out):
        return
    files.check_folder(out)
    if not is_run(out):
        raise ValueError(
            f"{out} is not a run folder (no run wrote a {STATUS} there): it will not be replaced, choose another name"
        )
    if not overwrite:
        raise ValueError(f"{out} exists: choose another folder, or pass --overwrite to replace it")
    files.check_replaceable(out)


def _begun(work: Path, config: dict[str, Any], overwrite: bool, resume: bool) -> str:
    """Prepare the folder to begin or to resume in. Returns the time at which the run began."""
    if checkpointed(work) and resume:
        status = read_object(work / STATUS)
        asked, began = status.get("config"), status.get("began")
        if not isinstance(asked, dict) or not isinstance(began, str):
            raise ValueError(f"{work / STATUS} does not say how the run was begun: pass --overwrite to begin again")
        before, now = ({k: v for k, v in json.loads(json.dumps(c)).items() if k not in _HOW}
                       for c in (asked, config))  # fmt: skip
        lines = differences(before, now) + _changed(asked, config)
        if lines:
            shown = "".join(f"\n  {line}" for line in lines)
            raise ValueError(f"{work} was begun with other options:{shown}\nGive the same ones to go on with it")
        return began
    if _complete(work) and not overwrite:
        raise ValueError(
            f"{work} holds a complete run that could not be moved into place: move it to where you want it, or pass "
            "--overwrite to begin again"
        )
    if checkpointed(work) and not overwrite:
        raise ValueError(
            f"{work} holds a run that was interrupted: pass --resume to go on with it, or --overwrite to begin again"
        )
    others = [path for path in files.foreign(work) if path.name != LOCK]
    if others:
        raise ValueError(f"{others[0]} was not written by rotsparse, and {work} is to be emptied: move it elsewhere")
    files.empty(work, keep=(LOCK,))
    return datetime.now().isoformat(timespec="seconds")


def _move(work: Path, identity: str | None, out: Path, overwrite: bool) -> None:
    """Rename a complete run to `out`. Raises `ValueError` if something that may not be replaced has appeared there."""
    if os.path.lexists(out) and not (overwrite and is_run(out) and files.is_made(out) and not files.foreign(out)):
        raise ValueError(
            f"{out} appeared while the run was under way and is left alone: the complete run is in {work}, move it to "
            "where you want it"
        )
    if files.identity(work) != identity:
        raise ValueError(f"{work} is no longer the folder that this run made: look there for what has become of it")
    files.put(work, out, replace=overwrite)


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for every input that differs between two configs of the same command."""
    then, today = (found if isinstance(found := config.get(INPUTS), dict) else {} for config in (before, now))
    names = [name for name in today if then.get(name) != today[name]]
    return [f"{now.get(name, name)} has changed: its SHA-256 was {then.get(name)}, is {today[name]}" for name in names]


def layer_folders(run: Path) -> list[Path]:
    """The folders of a fit-model run's layers, in their order."""
    numbers = (path.parent.name.removeprefix("layer-") for path in run.glob(f"layer-*/{METRICS}"))
    return [run / f"layer-{i}" for i in sorted(int(number) for number in numbers if number.isdecimal())]


def write_json(path: str | os.PathLike, content: Mapping[Any, Any]) -> None:
    """Write an object as JSON, atomically, with a hash of its content. NaN and infinity, which JSON lacks, become
    null."""
    written: dict[str, Any] = {str(name): _finite(value) for name, value in content.items()}
    written[DIGEST] = _content_digest(written)
    files.write_atomically(path, (json.dumps(written, indent=2) + "\n").encode())


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file of a run, and compare it with its hash, if it has one. Raises `ValueError` if it is missing or
    damaged."""
    try:
        content = json.loads(regular_file(path, most=LARGEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}. Is this a run folder?") from None
    if isinstance(content, dict) and DIGEST in content and content.pop(DIGEST) != _content_digest(content):
        raise CheckError(
            f"{path} is damaged: its content is not what was written. If you have edited it, remove its entry "
            f'"{DIGEST}"'
        )
    return content


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a run. Raises `ValueError` if the file is missing, damaged, or holds anything
    else."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no object. Is this a run folder?")
    return content


def seen_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or an empty one if `read_object` fails: to recognise a folder, not to use it."""
    try:
        return read_object(path)
    except ValueError:
        return {}


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that determine a result."""
    packages = ("rotsparse", "jax", "jaxlib", "optax", "equinox", "numpy", "scikit-learn")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def _content_digest(content: dict[str, Any]) -> str:
    return digest(json.dumps(content, sort_keys=True).encode())


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
