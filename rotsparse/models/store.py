"""Activations on disk: a folder with `manifest.json` and the rows in `.npy` shards.

The manifest says which model, layer, site and tokens they come from, and lists every finished shard with its rows and
SHA-256. It is replaced after each shard, so that whatever it lists is whole, and a capture can go on from there.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rotsparse.files import write_atomically
from rotsparse.models.model import Model
from rotsparse.sources import NpyFile, Shards, Source

_MANIFEST, _FORMAT = "manifest.json", "rotsparse activations 1"
_PROGRESS = ("rows", "shards", "complete", "heavy_rows")


class ActivationStore(Source):
    """A finished store: `rows x width` numbers, of which only what is asked for is read (as float32).

    Raises `ValueError` where a shard is missing or is not what the manifest says.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]):
        self.folder, self.manifest = folder, manifest
        self.shape = (int(manifest["rows"]), int(manifest["width"]))
        self._shards = Shards([self._shard(**shard) for shard in manifest["shards"]])

    def where(self, row):
        return self._shards.where(row)

    def __repr__(self):
        return f"the store {self.folder}"

    def _rows(self, rows):
        return self._shards._rows(rows)

    def verify(self) -> None:
        """Read everything once and compare it with the manifest's hashes. Raises `ValueError` that names the shard."""
        for shard in self.manifest["shards"]:
            with (self.folder / shard["file"]).open("rb") as f:
                if hashlib.file_digest(f, "sha256").hexdigest() != shard["sha256"]:
                    raise ValueError(f"{self.folder / shard['file']} is damaged: remove the store and capture again")

    def _shard(self, file: str, rows: int, sha256: str) -> NpyFile:
        shard = NpyFile(self.folder / file)
        if shard.shape != (rows, self.shape[1]):
            raise ValueError(f"{shard.path} has shape {list(shard.shape)}, expected {[rows, self.shape[1]]}")
        return shard


def open_store(folder: str | os.PathLike, model: Model | None = None) -> ActivationStore:
    """The store in a folder; with a model, only if it was captured from that model.

    Raises `ValueError` where there is no store, it is unfinished or a shard is missing, or another model wrote it.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise ValueError(f"{folder} holds no activations: there is no {_MANIFEST}")
    if model is not None and manifest["model"] != model.fingerprint():
        raise ValueError(
            f"the activations in {folder} come from another model (or from before it was folded): capture them again"
        )
    if not manifest["complete"]:
        raise ValueError(
            f"the capture into {folder} was interrupted: start it again with the same settings, it goes on"
        )
    missing = [shard["file"] for shard in manifest["shards"] if not (folder / shard["file"]).exists()]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing[:5])}: remove the store and capture again")
    return ActivationStore(folder, manifest)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest in a folder, `None` where there is none. Raises `ValueError` where it is something else."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read {folder / _MANIFEST}: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise ValueError(f"{folder / _MANIFEST} is not the manifest of an activation store")
    return manifest


class StoreWriter:
    """Adds shards to a store, beginning or going on.

    `settings` is everything that determines the rows; a store that was begun with others is refused.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.folder = folder
        self.manifest: dict[str, Any] = {"format": _FORMAT, **settings, "rows": 0, "shards": [], "complete": False}
        begun = read_manifest(folder)
        if begun is not None and begun["shards"]:
            self._check_same(begun)
            self.manifest = begun
        elif begun is None and folder.exists() and any(not p.name.startswith(".") for p in folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no activations: choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        self._open: _GrowingArray | None = None

    @property
    def complete(self) -> bool:
        return self.manifest["complete"]

    @property
    def shards(self) -> int:
        """How many shards are finished."""
        return len(self.manifest["shards"])

    def write(self, index: int, rows: np.ndarray) -> None:
        """Shard number `index`, whole; one that is there already is left alone."""
        self.append(index, rows)
        self.close(index)

    def append(self, index: int, rows: np.ndarray) -> None:
        """Add rows to shard number `index`, the next one, which nobody sees before `close`. Of one that is there
        already nothing changes."""
        if index < self.shards:
            return
        assert index == self.shards, "shards are written in order"
        if self._open is None:
            if index == 0:
                self._save()  # from now on the folder is known as this store, whatever happens
            self._open = _GrowingArray(self.folder / f".{index:05d}.npy.part")
        self._open.append(rows)

    def close(self, index: int) -> None:
        """Shard number `index` is whole."""
        if index < self.shards:
            return
        assert self._open is not None, "a shard has rows"
        file = f"{index:05d}.npy"
        rows, digest = self._open.move_to(self.folder / file)
        self._open = None
        self.manifest["shards"].append({"file": file, "rows": rows, "sha256": digest})
        self.manifest["rows"] += rows
        self._save()

    def abandon(self) -> None:
        """Forget a shard that was not closed."""
        if self._open is not None:
            self._open.remove()
            self._open = None

    def finish(self) -> ActivationStore:
        """Mark the store as complete."""
        if not self.complete:
            self.manifest["complete"] = True
            self._save()
        return ActivationStore(self.folder, self.manifest)

    def _save(self) -> None:
        write_atomically(self.folder / _MANIFEST, json.dumps(self.manifest, indent=1).encode())

    def _check_same(self, begun: Mapping[str, Any]) -> None:
        wanted = {name: value for name, value in self.manifest.items() if name not in _PROGRESS}
        found = {name: value for name, value in begun.items() if name not in _PROGRESS}
        if wanted["model"] != found["model"]:
            raise ValueError(f"{self.folder} holds activations of another model: choose another folder")
        # What was asked for comes before what follows from it.
        (before, now), derived = map(_flat, (found, wanted)), "sequences_per_shard"
        for name in sorted(before.keys() | now.keys(), key=lambda name: (name == derived, name)):
            if before.get(name) != now.get(name):
                raise ValueError(
                    f"{self.folder} was begun with {name} = {before.get(name)!r}, not {now.get(name)!r}: choose "
                    "another folder, or the same settings to go on"
                )


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """With the settings of what gave the tokens among the others."""
    return {**settings, **settings.get("tokens", {}), "tokens": None}


class _GrowingArray:
    """A `.npy` file that rows are added to, so that a shard never has to be in memory."""

    def __init__(self, path: Path):
        self._path, self._rows = path, 0
        self._file = path.open("w+b")

    def append(self, rows: np.ndarray) -> None:
        if not self._rows:
            self._like = rows[:0]
            self._write_header()
        self._file.write(np.ascontiguousarray(rows).data)
        self._rows += len(rows)

    def move_to(self, path: Path) -> tuple[int, str]:
        """Put the whole array in its place: the number of its rows, and its SHA-256."""
        with self._file as file:
            file.seek(0)
            self._write_header()
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.replace(self._path, path)
        return self._rows, digest

    def remove(self) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    def _write_header(self) -> None:
        # NumPy leaves room for any number of rows: the header can be written again in place.
        descr = np.lib.format.dtype_to_descr(self._like.dtype)
        shape = (self._rows, *self._like.shape[1:])
        np.lib.format.write_array_header_1_0(self._file, {"descr": descr, "fortran_order": False, "shape": shape})
