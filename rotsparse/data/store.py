"""Activations on disk: a folder with `manifest.json` and the rows in `.npy` shards.

The manifest names the model, layer, site and tokens, and lists every complete shard with its number of rows and its
SHA-256. It is rewritten after each shard, so every listed shard is complete, and a capture can resume from there.

Format 2 says of every row where it comes from: beside each shard lie `places`, the sequence (or image) and the position
of every row, and, for a text, `tokens`, the token numbers of all its sequences; `vocabulary.json` holds the text of
every token. Format 1 has none of these, and opens as before.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from rotsparse._core import files
from rotsparse._core.confined import confined
from rotsparse._core.differences import differences
from rotsparse._core.errors import CheckError
from rotsparse._core.files import write_atomically
from rotsparse._core.reading import load_npy, regular_file
from rotsparse.data.sources import NpyFile, Shards, Source

MANIFEST, VOCABULARY = "manifest.json", "vocabulary.json"
_FORMAT, _FORMATS = "rotsparse activations 2", ("rotsparse activations 1", "rotsparse activations 2")
_PROGRESS = ("format", "rows", "shards", "complete", "heavy_rows", "vocabulary")

# Stands for no token: padding, and what lies behind the end of a sequence.
NO_TOKEN = -1


class ActivationStore(Source):
    """A complete store: `rows x width` numbers, of which only requested rows are read (as float32).

    Raises `ValueError` if a shard is missing or differs from the manifest.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]):
        self.folder, self.manifest = folder, manifest
        self.shape = (int(manifest["rows"]), int(manifest["width"]))
        self._shards = Shards([self._shard(shard["file"], shard["rows"]) for shard in manifest["shards"]])

    def where(self, row):
        return self._shards.where(row)

    def __repr__(self):
        return f"the store {self.folder}"

    def _rows(self, rows):
        return self._shards._rows(rows)

    def verify(self) -> None:
        """Compare every file with its hash in the manifest. Raises `CheckError`, with the name of the file, if they
        differ."""
        about = self.manifest.get("vocabulary")
        for shard in [*self.manifest["shards"], *([about] if about else [])]:
            for of in [shard, *shard.get("beside", {}).values()]:
                with (self.folder / of["file"]).open("rb") as f:
                    if hashlib.file_digest(f, "sha256").hexdigest() != of["sha256"]:
                        raise CheckError(f"{self.folder / of['file']} is damaged: remove the store and capture again")

    def places(self) -> Int[np.ndarray, "rows 2"]:
        """The sequence (or image) and the position of every row, both from 0. Raises `ValueError` for a store that
        does not say."""
        places = self._beside("places", 2)
        if len(places) != len(self):
            raise CheckError(f"{self} has {len(self)} rows and says of {len(places)} where they come from")
        return places

    def tokens(self) -> Int[np.ndarray, "sequences positions"]:
        """The token numbers of every sequence, `NO_TOKEN` where there is none. Raises `ValueError` for a store that
        does not have them: one of images, or of an earlier version."""
        return self._beside("tokens", None)

    def vocabulary(self) -> list[str] | None:
        """The text of every token; `None` if the capture had no tokenizer. Raises `ValueError` for a damaged file."""
        about = self.manifest.get("vocabulary")
        if about is None:
            return None
        path = self.folder / about["file"]
        try:
            words = json.loads(regular_file(path).read_text(encoding="utf-8"))["tokens"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckError(f"cannot read {path}: {error}") from None
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise CheckError(f"{path} holds no list of words: remove the store and capture again")
        return words

    def _beside(self, name: str, width: int | None) -> np.ndarray:
        """The arrays `name` beside all shards, one after the other."""
        files = [shard.get("beside", {}).get(name) for shard in self.manifest["shards"]]
        if not all(files):
            why = "it was captured by an earlier version" if self.manifest["format"] == _FORMATS[0] else "it has none"
            raise ValueError(f"{self} does not hold the {name} of its rows ({why}): capture again to have them")
        arrays = [load_npy(self.folder / of["file"]) for of in files]
        if any(a.ndim != 2 or a.dtype != np.int32 or a.shape[1] != (width or arrays[0].shape[1]) for a in arrays):
            raise CheckError(f"the {name} of {self} are not what was written: remove the store and capture again")
        return np.concatenate(arrays)

    def _shard(self, file: str, rows: int) -> NpyFile:
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
    if not isinstance(manifest, dict) or manifest.get("format") not in _FORMATS:
        raise ValueError(f"{folder / MANIFEST} is not the manifest of an activation store")
    if not _whole(manifest):
        raise CheckError(f"{folder / MANIFEST} is damaged: remove the store and capture again")
    for listed in _listed(manifest):
        confined(folder, listed["file"], folder / MANIFEST)
    return manifest


def _listed(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every file that a manifest names, with its hash."""
    shards, words = manifest["shards"], manifest.get("vocabulary")
    return [*shards, *(of for s in shards for of in s.get("beside", {}).values()), *([words] if words else [])]


def _whole(manifest: Mapping[str, Any]) -> bool:
    """Whether all entries of a manifest that are read exist and have the right type."""
    shards = manifest.get("shards")
    return (
        isinstance(manifest.get("model"), str)
        and isinstance(manifest.get("complete"), bool)
        and isinstance(manifest.get("tokens", {}), dict)
        and _count(manifest.get("width"))
        and isinstance(shards, list)
        and all(isinstance(s, dict) and _hashed(s) and _count(s.get("rows")) for s in shards)
        and all(isinstance(s.get("beside", {}), dict) for s in shards)
        and all(map(_hashed, _listed(manifest)))
        and sum(shard["rows"] for shard in shards) == manifest.get("rows")
    )


def _hashed(entry: Any) -> bool:
    """Whether an entry names a file and its hash."""
    return isinstance(entry, dict) and "file" in entry and isinstance(entry.get("sha256"), str)


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
            if begun["format"] != _FORMAT and not begun["complete"]:
                raise ValueError(f"{folder} was begun by an earlier version: remove it, or choose another folder")
            self.manifest = begun
        elif begun is None and folder.exists() and any(not p.name.startswith(".") for p in folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no activations: choose another folder")
        files.make_folder(folder)
        self._open: dict[str, _GrowingArray] = {}

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

    def append(self, index: int, rows: np.ndarray, **beside: np.ndarray) -> None:
        """Add rows to shard number `index`, the next one; `close` then completes it. Does nothing if it exists.
        `beside`: further arrays to which is added, each in a file of its own."""
        if index < self.shards:
            return
        assert index == self.shards, "shards are written in order"
        if not self._open:
            if index == 0:
                files.adopt(self.folder)
                self._save()  # from now on the folder is recognised as this store, also after an interruption
            files.remove_leftovers(self.folder)
            names = {_ROWS: f"{index:05d}.npy", **{name: f"{index:05d}.{name}.npy" for name in beside}}
            for name, file in names.items():
                self._open[name] = _GrowingArray(self.folder / file)
        for name, array in {_ROWS: rows, **beside}.items():
            self._open[name].append(array)

    def close(self, index: int) -> None:
        """Complete shard number `index` and list it in the manifest."""
        if index < self.shards:
            return
        assert self._open, "a shard has rows"
        written = {}
        for name in list(self._open):
            count, digest = self._open[name].finish()
            written[name] = {"file": self._open.pop(name).name, "rows": count, "sha256": digest}
        shard = written.pop(_ROWS)
        if written:
            shard["beside"] = {name: {"file": of["file"], "sha256": of["sha256"]} for name, of in written.items()}
        self.manifest["shards"].append(shard)
        self.manifest["rows"] += shard["rows"]
        self._save()

    def abandon(self) -> None:
        """Remove a shard that was not closed."""
        for name in list(self._open):
            self._open.pop(name).remove()

    def finish(self, vocabulary: Sequence[str] | None = None) -> ActivationStore:
        """Mark the store as complete and open it. `vocabulary`: the text of every token."""
        if not self.complete:
            if vocabulary is not None:
                # Halves of surrogate pairs, which UTF-8 lacks, are escaped by JSON.
                words = json.dumps({"format": "rotsparse vocabulary 1", "tokens": list(vocabulary)}).encode()
                write_atomically(self.folder / VOCABULARY, words)
                self.manifest["vocabulary"] = {"file": VOCABULARY, "sha256": hashlib.sha256(words).hexdigest()}
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


# Among the arrays of a shard, its rows.
_ROWS = "rows"


class _Abandoned(Exception):
    """Raised to discard a shard that is not complete."""


class _GrowingArray:
    """A `.npy` file to which rows are appended, so that a shard need not fit into memory."""

    def __init__(self, path: Path):
        self.name, self._rows, self._writing = path.name, 0, contextlib.ExitStack()
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
