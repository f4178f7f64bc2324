"""The tensors in a Hugging Face folder: which files there are, and what is wrong where none can be read.

Tensors are read one at a time and come as float32 (float64 stays), aligned so that JAX uses them where they are.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from rotsparse._core.reading import regular_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_NUMBERED = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_OTHER_FORMATS = (".bin", ".h5", ".msgpack", ".onnx", ".ot", ".pt", ".pth", ".npz")
_FLOATS = {"F16": np.float16, "BF16": None, "F32": np.float32, "F64": np.float64}
_ALIGNMENT = 64  # bytes: JAX copies what is not aligned so


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `ValueError` if there is none."""
    try:
        content = json.loads(regular_file(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        pointer = ": it is a Git LFS pointer" if is_lfs_pointer(path) else ""
        raise ValueError(f"cannot read {path}: {str(error)[:200] or type(error).__name__}{pointer}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold a JSON object, not a {type(content).__name__}: it is no configuration")
    return content


def is_lfs_pointer(path: Path) -> bool:
    """Whether Git left a note in place of a large file."""
    try:
        with regular_file(path).open("rb") as f:
            return f.read(40).startswith(b"version https://git-lfs.github.com")
    except (OSError, ValueError):
        return False


class Checkpoint:
    """The tensors of a folder by their names in the files.

    Raises `ValueError` that names the cause: what is missing, damaged, ambiguous, or not a model at all.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._where: dict[str, str] = {}
        self._open: dict[str, Any] = {}
        for file in _files(folder):
            self._open[file] = _opened(folder / file)
            for name in self._open[file].keys():
                if name in self._where:
                    raise ValueError(
                        f"{folder}: tensor {name!r} is in {self._where[name]} and in {file}: keep the right one"
                    )
                self._where[name] = file

    @property
    def names(self) -> list[str]:
        return list(self._where)

    def floats(self, name: str) -> np.ndarray:
        """A tensor of numbers, widened: half precision is too coarse to rotate in. Raises `ValueError`."""
        kind = self._kind(name)
        if kind not in _FLOATS:
            named = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I8": "int8", "U8": "uint8", "I32": "int32"}
            raise ValueError(
                f"tensor {name!r} is {named.get(kind, kind)}: expected a float16, bfloat16, float32 or float64 "
                "checkpoint (of a quantised model, load the original)"
            )
        array = self.raw(name)
        return aligned(array, np.float64 if array.dtype == np.float64 else np.float32)

    def raw(self, name: str) -> np.ndarray:
        """A tensor as it is stored."""
        try:
            return self._file(name).get_tensor(name)
        except Exception as error:
            raise ValueError(f"cannot read tensor {name!r} of {self.folder}: {error}") from None

    def _kind(self, name: str) -> str:
        try:
            return str(self._file(name).get_slice(name).get_dtype())
        except Exception as error:
            raise ValueError(f"cannot read tensor {name!r} of {self.folder}: {error}") from None

    def _file(self, name: str):
        return self._open[self._where[name]]


def aligned(array: np.ndarray, dtype) -> np.ndarray:
    """A copy of this type, contiguous, at an address that JAX takes without copying again."""
    copy = aligned_empty(array.shape, dtype)
    copy[...] = array
    return copy


def aligned_empty(shape: tuple[int, ...], dtype) -> np.ndarray:
    """An array that is yet to be filled, at such an address."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def settled(array: np.ndarray) -> np.ndarray:
    """The array itself where JAX can use it as it lies in memory, otherwise a copy that it can."""
    ready = array.flags.c_contiguous and array.ctypes.data % _ALIGNMENT == 0
    return array if ready else aligned(array, array.dtype)


def _opened(path: Path):
    if is_lfs_pointer(path):
        raise ValueError(f"{path} is a Git LFS pointer, not the file itself: fetch it with git lfs pull")
    try:
        return safe_open(regular_file(path), framework="numpy").__enter__()
    except Exception as error:  # the library raises exceptions of its own, and Rust's
        raise ValueError(f"cannot read {path}: {error}. Damaged or truncated: fetch it again") from None


def _files(folder: Path) -> list[str]:
    """The safetensors files that make up the model."""
    single, index = (folder / SINGLE).exists(), (folder / INDEX).exists()
    if (single or index) and (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} has a whole model and an adapter (adapter_config.json), which transformers would add to its "
            "base model: merge it first (merge_and_unload in peft), or remove the one that is not meant"
        )
    if index:
        where = read_json(folder / INDEX).get("weight_map")
        files = _listed(folder, where)
        if single and files != [SINGLE]:
            raise ValueError(
                f"{folder} has a whole {SINGLE}, and {INDEX} names other files: two models? Remove the one that is not "
                "meant"
            )
        return files
    if single:
        return [SINGLE]
    return _numbered(folder)


def _listed(folder: Path, where: Any) -> list[str]:
    if not isinstance(where, Mapping) or not where or not all(isinstance(file, str) for file in where.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map from tensors to files")
    files = sorted(set(where.values()))
    for file in files:
        if Path(file).name != file or file in ("", ".", "..") or "\\" in file or "\0" in file:
            raise ValueError(f"{folder / INDEX} names {file!r}: expected files in the folder itself")
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} of its shards: {', '.join(missing[:5])}. Download them again")
    return files


def _numbered(folder: Path) -> list[str]:
    """Shards without an index, if all of them are there."""
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    shards = [match for file in found if (match := _NUMBERED.fullmatch(file))]
    if shards:
        total = int(shards[0][2])
        if [(int(m[1]), int(m[2])) for m in shards] == [(i + 1, total) for i in range(total)]:
            return [m[0] for m in shards]
        raise ValueError(
            f"{folder} has the shards {', '.join(m[0] for m in shards[:5])} and no {INDEX}: is a shard missing?"
        )
    raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}{_instead(folder, found)}")


def _instead(folder: Path, found: list[str]) -> str:
    """What the folder has in place of a model, and what to do."""
    if "adapter_model.safetensors" in found or (folder / "adapter_config.json").exists():
        return ": it is an adapter. Merge it into its base model first (merge_and_unload in peft), and save that"
    if found:
        return f": it has {', '.join(found[:5])}. Rename the whole model to {SINGLE}"
    if any(folder.glob("pytorch_model*")):
        return (
            ": there is a pytorch_model file. Save the model again with safe_serialization (from_pretrained, then "
            "save_pretrained of transformers)"
        )
    if ggufs := sorted(path.name for path in folder.glob("*.gguf")):
        return f": give the GGUF file itself, {folder / ggufs[0]}"
    others = sorted(path.name for path in folder.iterdir() if path.suffix in _OTHER_FORMATS)
    return f": it has {', '.join(others[:3])}. Save the model again from transformers, as safetensors" if others else ""


def why_not_a_model(folder: Path) -> str | None:
    """What a folder without config.json is, as far as one can tell."""
    if (folder / "adapter_config.json").exists():
        return f"{folder} is an adapter: merge it into its base model first (merge_and_unload in peft), and save that"
    snapshots = sorted(path for path in (folder / "snapshots").glob("*") if path.is_dir())
    if snapshots:
        return f"{folder} is a folder of the Hugging Face cache: give {snapshots[-1]}"
    if ggufs := sorted(folder.glob("*.gguf")):
        return f"{folder} has no config.json: give the GGUF file itself, {ggufs[0]}"
    return None
