"""Writing files so that a reader never sees half of one."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: str | os.PathLike, payload: bytes) -> None:
    """Write `payload` to `path`: the file is either complete or what it was before, whenever the process stops.

    The bytes go to a temporary file in the same folder and reach the disk before the rename. Raises `OSError` where
    the folder is missing, read-only or full; the temporary file is then removed.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(payload)
            f.flush()
            os.fsync(f.fileno())
        # mkstemp's file is private to its owner; this one gets the mode of any new file.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and vanishes when it does not.

    Raises `ValueError` where `path` already exists.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} exists already: choose another name or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    outer = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    inner = outer / "new"  # with the access rights of any new folder, unlike what mkdtemp makes
    try:
        inner.mkdir()
        yield inner
        os.rename(inner, path)
    finally:
        shutil.rmtree(outer, ignore_errors=True)
