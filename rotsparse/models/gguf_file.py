"""The header of a GGUF file, and its tensors as float32.

    magic "GGUF", version, number of tensors, number of entries, entries, tensor descriptions, padding, tensors

The gguf library dequantises tensors. Its reader of headers is not used, because it trusts every length in a header, and
a damaged file would fill the memory.
(Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.)
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rotsparse._core.reading import regular_file
from rotsparse.models.checkpoint import aligned_empty, is_lfs_pointer

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
_NUMBERS = 1 << 18  # that are dequantised together


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies in the file. `shape` is `[out, in]`, as NumPy has it."""

    shape: tuple[int, ...]
    kind: int
    start: int
    size: int


class GgufFile:
    """`metadata` by key, and `tensors` by name.

    Raises `ValueError` if the file is missing, not GGUF, damaged, or not as long as its header says.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._data = np.memmap(regular_file(path), np.uint8, "r")
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read the GGUF file {path}: {error}") from None
        if is_lfs_pointer(path):
            raise ValueError(f"{path} is a Git LFS pointer, not the file itself: fetch it with git lfs pull")
        cursor = _Cursor(self._data, path)
        if cursor.take(4) != b"GGUF":
            raise ValueError(f"{path} is no GGUF file: it does not begin with the letters GGUF")
        version, tensors, entries = cursor.scalars("<IQQ")
        if version not in (2, 3):
            raise ValueError(f"{path} has version {version} of GGUF: expected 2 or 3, little-endian. Convert it again")
        # An entry takes 13 bytes at least, a tensor's description 24.
        cursor.check_count(entries, 13, "entries")
        self.metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = cursor.string()
            if key in self.metadata:
                raise ValueError(f"{path} is damaged: it has {key!r} twice")
            self.metadata[key] = cursor.value(cursor.scalars("<I")[0])
        cursor.check_count(tensors, 24, "tensors")
        described = [self._description(cursor) for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
            raise ValueError(f"{path} is damaged: its alignment is {alignment!r}")
        self._start = -(-cursor.at // alignment) * alignment
        self.tensors: dict[str, GgufTensor] = {}
        for name, tensor in described:
            if name in self.tensors:
                raise ValueError(f"{path} is damaged: it has the tensor {name!r} twice")
            if self._start + tensor.start + tensor.size > len(self._data):
                raise ValueError(f"{path} ends inside the tensor {name!r}: it is truncated, fetch it again")
            self.tensors[name] = tensor

    def floats(self, name: str) -> np.ndarray:
        """A tensor, dequantised to float32. Raises `ValueError` if its format is unknown."""
        gguf, tensor = library(), self.tensors[name]
        kind = gguf.GGMLQuantizationType(tensor.kind)
        plain = {"F32": "<f4", "F16": "<f2"}.get(kind.name)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        floats = aligned_empty(tensor.shape, np.float32)
        rows = floats.reshape(-1, tensor.shape[-1])
        row_bytes = rows.shape[1] // block * size
        step = max(1, _NUMBERS // rows.shape[1])
        # Read a few rows at a time, not mapped: pages of a map would stay in memory beside the weights.
        with self.path.open("rb") as file:
            file.seek(self._start + tensor.start)
            for start in range(0, len(rows), step):
                part = rows[start : start + step]
                stored = np.fromfile(file, np.uint8, len(part) * row_bytes).reshape(len(part), row_bytes)
                try:
                    part[...] = gguf.dequantize(stored, kind) if plain is None else stored.view(plain)
                except NotImplementedError:
                    raise ValueError(
                        f"{self.path}: the gguf library cannot read tensor {name!r}, a {kind.name}"
                    ) from None
        return floats

    def _description(self, cursor: "_Cursor") -> tuple[str, GgufTensor]:
        gguf = library()
        name = cursor.string()
        (dimensions,) = cursor.scalars("<I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"{self.path} is damaged: tensor {name!r} has {dimensions} dimensions")
        shape = cursor.scalars(f"<{dimensions}Q")[::-1]
        kind, start = cursor.scalars("<IQ")
        try:
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise ValueError(f"{self.path}: tensor {name!r} has the unknown format {kind}") from None
        if min(shape) < 1 or shape[-1] % block:
            raise ValueError(f"{self.path} is damaged: tensor {name!r} has shape {list(shape)} in blocks of {block}")
        return name, GgufTensor(tuple(shape), kind, start, math.prod(shape) // block * size)


class _Cursor:
    """Reads what stands next, and never beyond the end."""

    def __init__(self, data: np.ndarray, path: Path):
        self._data, self._path, self.at = data, path, 0

    def take(self, size: int) -> bytes:
        if size > len(self._data) - self.at:
            raise ValueError(f"{self._path} ends inside its header: it is truncated, fetch it again")
        self.at += size
        return self._data[self.at - size : self.at].tobytes()

    def scalars(self, pattern: str) -> tuple:
        return struct.unpack(pattern, self.take(struct.calcsize(pattern)))

    def string(self) -> str:
        return self.take(self.scalars("<Q")[0]).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalars(f"<{self._scalar(kind)}")[0]
        of, count = self.scalars("<IQ")
        if of == _STRING:
            self.check_count(count, 8, "strings")
            return self._each(count, self.string)
        letter = self._scalar(of)  # arrays of arrays are in no file
        self.check_count(count, struct.calcsize(f"<{letter}"), "numbers")
        return list(self.scalars(f"<{count}{letter}"))

    def check_count(self, count: int, least: int, what: str) -> None:
        if count * least > len(self._data) - self.at:
            raise ValueError(
                f"{self._path} says that {count:,} {what} follow, which {len(self._data) - self.at:,} bytes cannot "
                "hold: it is truncated or damaged"
            )

    def _scalar(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise ValueError(f"{self._path} is damaged: there is no type {kind} of values")
        return _SCALARS[kind]

    @staticmethod
    def _each(count: int, read: Callable[[], Any]) -> list:
        return [read() for _ in range(count)]


def library():
    """The gguf library. Raises `ImportError` that says how to get it."""
    try:
        import gguf
    except ImportError:
        raise ImportError("reading GGUF files needs the gguf library: pip install 'rotsparse[gguf]'") from None
    return gguf
