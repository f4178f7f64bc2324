"""Hashes of the inputs of a run: written to `config.json`, and checked by every command that reads the run again.

A relative path in the config names a file within the run's folder. An absolute path names a file that the user gave on
the command line; it is followed only if the config has a hash of that file and the file still matches it. So a run
folder from elsewhere cannot make rotsparse read files whose content the folder does not already know.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rotsparse._core.confined import confined
from rotsparse._core.reading import regular_file
from rotsparse.data.store import MANIFEST
from rotsparse.runs import folders


def hashes(**paths: str | os.PathLike | None) -> dict[str, str]:
    """The SHA-256 of every input that is not `None`, by its name in the config. For a folder of activations it is that
    of the manifest, which in turn lists the hashes of the files."""
    return {name: file_hash(path) for name, path in paths.items() if path is not None}


def file_hash(path: str | os.PathLike) -> str:
    """The SHA-256 of a file, or of the manifest of a folder of activations. Raises `ValueError` if it cannot be
    read."""
    file = Path(path)
    file = file / MANIFEST if file.is_dir() else file
    try:
        with regular_file(file).open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from None


def located(run: Path, config: Mapping[str, Any], name: str) -> Path | None:
    """The path of an input of a run; `None` if the run had none of that name. Raises `ValueError`, which names the
    file, if it does not exist, has changed since the run, or may not be read."""
    written, source = config.get(name), run / folders.CONFIG
    if written is None:
        return None
    if not isinstance(written, str):
        raise ValueError(f"{source} has {written!r} as {name!r}, expected a path")
    recorded = config.get(folders.INPUTS)
    expected = recorded.get(name) if isinstance(recorded, Mapping) else None
    if os.path.isabs(written):
        path = Path(written)
        if not isinstance(expected, str):
            raise ValueError(
                f"{source} names {path} as {name!r} and has no hash of it: nothing shows that this file is still the "
                "one that the run was computed from (an earlier version wrote no hashes). Give the command of the run "
                "again with another --out"
            )
    else:
        path = confined(run, written, source)
        if not path.resolve().is_relative_to(run.resolve()):
            raise ValueError(f"{path}, which {source} names as {name!r}, is a link that leads out of {run}: remove it")
    if not path.exists():
        raise ValueError(f"{path}, which {source} names as {name!r}, does not exist: where is it now?")
    if expected is not None and file_hash(path) != expected:
        raise ValueError(
            f"{path} has changed since {run} was computed from it (its SHA-256 is not the one in {source}): put the "
            "earlier file back, or give the command of the run again"
        )
    return path


def check_layer(run: Path, layer: Path) -> None:
    """Raise `ValueError` if a run was fitted to another layer than the one in this file. A folder with rotations but no
    config is accepted."""
    if not os.path.lexists(run / folders.CONFIG):
        return
    config = folders.read_object(run / folders.CONFIG)
    recorded = config.get(folders.INPUTS)
    expected = recorded.get("layer") if isinstance(recorded, Mapping) else None
    if expected is not None and file_hash(layer) != expected:
        raise ValueError(
            f"{run} was fitted to another layer than the one that {layer} holds now (its SHA-256 is not the one in "
            f"{run / folders.CONFIG}): give that layer, or name the run's rotations file itself to use it all the same"
        )
