"""Paths that are read from files, such as the shards in a manifest, must lie within the folder of the file."""

import os
from pathlib import Path


def confined(folder: Path, name: object, source: object) -> Path:
    """The file `name` in `folder`, as named by `source`. Raises `ValueError` for absolute paths, paths that lead out of
    the folder, and anything that is not a file name."""
    inside = isinstance(name, str) and name not in ("", ".") and "\0" not in name and not os.path.isabs(name)
    if not inside or ".." in Path(str(name)).parts:
        raise ValueError(f"{source} names {name!r}, which is no file within {folder}: it is not read")
    return folder / str(name)
