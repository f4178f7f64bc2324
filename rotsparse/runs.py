"""Run folders: what a run writes, and never half of it.

A run works in a folder of its own beside the one that was asked for and is moved there when it is complete, so a
failed or interrupted run leaves no half-written folder and never harms an earlier result.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rotsparse.files import write_atomically

CONFIG = "config.json"


@contextlib.contextmanager
def new_run(out: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write a run into; it becomes `out` when the block ends without an error.

    Raises `ValueError` where `out` exists, unless `overwrite` is set and it is an earlier run.
    """
    out = Path(out)
    if out.exists():
        if not overwrite:
            raise ValueError(f"{out} exists: choose another folder, or pass --overwrite to replace it")
        if not (out / CONFIG).is_file():
            raise ValueError(f"{out} is not a run folder (it has no {CONFIG}): it will not be replaced")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise ValueError(f"cannot write to {out.parent}: {error.strerror}") from None
    try:
        yield work
        work.chmod(0o755)
        _replace(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


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
