"""Folders that are either complete or not there."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
