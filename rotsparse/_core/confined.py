"""Paths that files name, such as the shards in a manifest: only within the folder of the file."""

import os
from pathlib import Path


def confined(folder: Path, name: object, source: object) -> Path:
    """The file `name` in `folder`, which `source` names. Raises `ValueError` for absolute names, names that lead out of
    the folder, and anything that is no name."""
    inside = isinstance(name, str) and name not in ("", ".") and "\0" not in name and not os.path.isabs(name)
    if not inside or ".." in Path(str(name)).parts:
        raise ValueError(f"{source} names {name!r}, which is no file within {folder}: it is not read")
    return folder / str(name)
