"""Paths that are read from files, such as the shards in a manifest, must lie within the folder of the file."""

import os
from pathlib import Path


def confined(folder: Path, name: object, source: object) -> Path:
    """The file `name` in `folder`, as named by `source`. Raises `ValueError` for absolute paths, paths that lead out of
    the folder, and anything that is not a file name."""
    inside = isinstance(name, str) and name not in ("", ".") and "\0" not in name and not os.path.isabs(name)
    parts = Path(str(name)).parts if inside else ()
    # Longer names exist on no file system, and asking for one is an error of its own.
    if not inside or ".." in parts or any(len(part.encode("utf-8", "surrogatepass")) > 255 for part in parts):
        raise ValueError(f"{source} names {name!r}, which is no file within {folder}: it is not read")
    return folder / str(name)
