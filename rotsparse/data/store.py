"""Activations on disk: a folder with `manifest.json` and the rows in `.npy` shards.

The manifest names the model, layer, site and tokens, and lists every complete shard with its number of rows and its
SHA-256. It is rewritten after each shard, so every listed shard is complete, and a capture can resume from there.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rotsparse._core import files
from rotsparse._core.confined import confined
from rotsparse._core.differences import differences
from rotsparse._core.errors import CheckError
from rotsparse._core.files import write_atomically
from rotsparse._core.reading import regular_file
from rotsparse.data.sources import NpyFile, Shards, Source

MANIFEST, _FORMAT = "manifest.json", "rotsparse activations 1"
_PROGRESS = ("rows", "shards", "complete", "heavy_rows")


class ActivationStore(Source):
    """A complete store: `rows x width` numbers, of which only requested rows are read (as float32).

    Raises `ValueError` if a shard is missing or differs from the manifest.
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
        """Compare every shard with its hash in the manifest. Raises `CheckError`, with the name of the shard, if they
        differ."""
        for shard in self.manifest["shards"]:
            with (self.folder / shard["file"]).open("rb") as f:
                if hashlib.file_digest(f, "sha256").hexdigest() != shard["sha256"]:
                    raise CheckError(f"{self.folder / shard['file']} is damaged: remove the store and capture again")

    def _shard(self, file: str, rows: int, sha256: str) -> NpyFile:
        shard = NpyFile(self.folder / file)
        if shard.shape != (rows, self.shape[1]):
            raise ValueError(f"{shard.path} has shape {list(shard.shape)}, expected {[rows, self.shape[1]]}")
        return shard


def open_store(folder: str | os.PathLike, fingerprint: str | None = None) -> ActivationStore:
    """Open the store in a folder. `fingerprint`: that of the model from which it must have been captured.

    Raises `ValueError` if there is no store, if it is incomplete or lacks a shard, or if it is from another model.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise ValueError(f"{folder} holds no activations: there is no {MANIFEST}")
    if fingerprint is not None and manifest["model"] != fingerprint:
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
    """The manifest in a folder; `None` if there is none. Raises `ValueError` if the file is not a manifest."""
    try:
        if not os.path.lexists(folder / MANIFEST):
            return None
        manifest = json.loads(regular_file(folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {folder / MANIFEST}: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise ValueError(f"{folder / MANIFEST} is not the manifest of an activation store")
    if not _whole(manifest):
        raise CheckError(f"{folder / MANIFEST} is damaged: remove the store and capture again")
    for shard in manifest["shards"]:
        confined(folder, shard["file"], folder / MANIFEST)
    return manifest


def _whole(manifest: Mapping[str, Any]) -> bool:
    """Whether all entries of a manifest that are read exist and have the right type."""
    shards = manifest.get("shards")
    return (
        isinstance(manifest.get("model"), str)
        and isinstance(manifest.get("complete"), bool)
        and isinstance(manifest.get("tokens", {}), dict)
        and _count(manifest.get("width"))
        and isinstance(shards, list)
        and all(isinstance(s, dict) and set(s) == {"file", "rows", "sha256"} and _count(s["rows"]) for s in shards)
        and sum(shard["rows"] for shard in shards) == manifest.get("rows")
    )


def _count(number: Any) -> bool:
    return type(number) is int and number > 0


class StoreWriter:
    """Add shards to a new store or to an incomplete one.

    `settings`: everything that determines the rows. Raises `ValueError` for a store that began with other settings.
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
        files.make_folder(folder)
        self._open: _GrowingArray | None = None

    @property
    def complete(self) -> bool:
        return self.manifest["complete"]

    @property
    def shards(self) -> int:
        """Number of complete shards."""
        return len(self.manifest["shards"])

    def write(self, index: int, rows: np.ndarray) -> None:
        """Write shard number `index` as a whole. Does nothing if it exists."""
        self.append(index, rows)
        self.close(index)

    def append(self, index: int, rows: np.ndarray) -> None:
        """Add rows to shard number `index`, the next one; `close` then completes it. Does nothing if it exists."""
        if index < self.shards:
            return
        assert index == self.shards, "shards are written in order"
        if self._open is None:
            if index == 0:
                files.adopt(self.folder)
                self._save()  # from now on the folder is recognised as this store, also after an interruption
            files.remove_leftovers(self.folder)
            self._open = _GrowingArray(self.folder / f"{index:05d}.npy")
        self._open.append(rows)

    def close(self, index: int) -> None:
        """Complete shard number `index` and list it in the manifest."""
        if index < self.shards:
            return
        assert self._open is not None, "a shard has rows"
        file = f"{index:05d}.npy"
        rows, digest = self._open.finish()
        self._open = None
        self.manifest["shards"].append({"file": file, "rows": rows, "sha256": digest})
        self.manifest["rows"] += rows
        self._save()

    def abandon(self) -> None:
        """Remove a shard that was not closed."""
        if self._open is not None:
            self._open.remove()
            self._open = None

    def finish(self) -> ActivationStore:
        """Mark the store as complete and open it."""
        if not self.complete:
            self.manifest["complete"] = True
            self._save()
        return ActivationStore(self.folder, self.manifest)

    def _save(self) -> None:
        write_atomically(self.folder / MANIFEST, json.dumps(self.manifest, indent=1).encode())

    def _check_same(self, begun: Mapping[str, Any]) -> None:
        wanted = {name: value for name, value in self.manifest.items() if name not in _PROGRESS}
        found = {name: value for name, value in begun.items() if name not in _PROGRESS}
        if wanted["model"] != found["model"]:
            raise ValueError(f"{self.folder} holds activations of another model: choose another folder")
        if lines := differences(_flat(found), _flat(wanted)):
            shown = "".join(f"\n  {line}" for line in lines)
            raise ValueError(
                f"{self.folder} was begun with other settings:{shown}\nGive the same ones to go on with it, or choose "
                "another folder"
            )


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with those of `tokens` on the top level."""
    return {**settings, **settings.get("tokens", {}), "tokens": None}


class _Abandoned(Exception):
    """Raised to discard a shard that is not complete."""


class _GrowingArray:
    """A `.npy` file to which rows are appended, so that a shard need not fit into memory."""

    def __init__(self, path: Path):
        self._rows, self._writing = 0, contextlib.ExitStack()
        self._file = self._writing.enter_context(files.writing(path))

    def append(self, rows: np.ndarray) -> None:
        if not self._rows:
            self._like = rows[:0]
            self._write_header()
        self._file.write(np.ascontiguousarray(rows).data)
        self._rows += len(rows)

    def finish(self) -> tuple[int, str]:
        """Complete the file under its final name. Returns the number of rows and the SHA-256."""
        with self._writing:
            self._file.seek(0)
            self._write_header()
            self._file.flush()
            self._file.seek(0)
            digest = hashlib.file_digest(self._file, "sha256").hexdigest()
        return self._rows, digest

    def remove(self) -> None:
        with contextlib.suppress(_Abandoned, OSError), self._writing:  # a full disk does not take what is left, either
            raise _Abandoned

    def _write_header(self) -> None:
        # NumPy pads its header for any number of rows, so the header can be overwritten.
        descr = np.lib.format.dtype_to_descr(self._like.dtype)
        shape = (self._rows, *self._like.shape[1:])
        np.lib.format.write_array_header_1_0(self._file, {"descr": descr, "fortran_order": False, "shape": shape})
