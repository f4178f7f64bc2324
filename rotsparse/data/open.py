"""Open sources from paths."""

import os
from collections.abc import Sequence
from pathlib import Path

from rotsparse.data.sources import NpyFile, Shards, Source
from rotsparse.data.store import open_store


def open_source(paths: str | os.PathLike | Sequence[str | os.PathLike]) -> Source:
    """Examples on disk: a `.npy` file `[n, width]`, a folder that `rotsparse capture` wrote, or several of them, one
    after the other. Raises `ValueError` if they cannot be opened or differ in width."""
    if not isinstance(paths, str | os.PathLike):
        return Shards([open_source(path) for path in paths])
    path = Path(paths)
    if path.suffix in (".npz", ".safetensors"):
        raise ValueError(
            f"{path}: rows of a .npz or .safetensors file cannot be read one by one, load its array instead"
        )
    return open_store(path) if path.is_dir() else NpyFile(path)
