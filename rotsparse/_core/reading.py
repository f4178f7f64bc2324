"""Reading files that may be damaged, cut short, or made to do harm: what a file declares is compared with what it holds
before memory is taken for it, and nothing but regular files is opened."""

import contextlib
import math
import os
import stat
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from rotsparse._core.digests import arrays_digest
from rotsparse._core.errors import CheckError

# A compressed archive may unpack to so many times its size (what sparse activations come to), and to so many bytes in
# any case: a few megabytes of zeros are no bomb.
MOST_INFLATION = 200
ALWAYS_ALLOWED = 2**24

# The metadata of a safetensors file under which rotsparse keeps a hash of the arrays.
DIGEST = "rotsparse_digest"

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@contextlib.contextmanager
def reading(path: str | os.PathLike) -> Iterator[None]:
    """Whatever is wrong with a file, and however the code that reads it takes it, a user gets a `ValueError`; a missing
    extra stays an `ImportError`."""
    try:
        yield
    except (ValueError, ImportError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"cannot read {path}: {type(error).__name__}: {str(error)[:300]}. Is it damaged, or another format?"
        ) from error


def regular_file(path: str | os.PathLike, *, most: float = math.inf) -> Path:
    """The path, if a regular file of at most so many bytes is there. Raises `ValueError`, where opening a FIFO would
    wait for ever."""
    path = Path(path)
    try:
        about = path.stat()
        mode = about.st_mode
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from None
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a FIFO" if stat.S_ISFIFO(mode) else "no regular file"
        raise ValueError(f"cannot read {path}: it is {what}")
    if about.st_size > most:
        raise ValueError(f"cannot read {path}: it has {about.st_size:,} bytes, more than rotsparse writes")
    return path


def npy_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether the order is Fortran's, and type of the `.npy` data that an open file is at the start of. Raises
    what NumPy does, and `ValueError` for objects."""
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"version {version} of the format is unknown")
    shape, fortran_order, dtype = _HEADERS[version](file)
    if dtype.hasobject or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"it holds {dtype} {list(shape)}, expected numbers")
    return shape, fortran_order, dtype


def check_typed(path: str | os.PathLike, dtype: np.dtype) -> None:
    """Raise `ValueError` that says what to do for bfloat16, whose type a `.npy` file does not keep."""
    if dtype.kind == "V" and dtype.itemsize == 2:
        raise ValueError(
            f"{path} holds {dtype.str}, numbers of two bytes whose type NumPy did not keep: save them "
            "as float32, np.load(path).view(ml_dtypes.bfloat16).astype('float32')"
        )


def load_npy(path: str | os.PathLike) -> np.ndarray:
    """The array in a `.npy` file. Raises `ValueError` that names the file."""
    path = regular_file(path)
    try:
        with path.open("rb") as file:
            return _array(file, path.stat().st_size)
    except Exception as error:
        raise CheckError(f"{path} cannot be read, it may be damaged or cut short: {error}") from None


def load_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays in a `.npz` file, by name. Raises `ValueError` that names the file."""
    path = regular_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len(members) != _count_at_the_end(path):
                raise ValueError("its directory is not the one that was written")
            declared, size = sum(member.file_size for member in members), path.stat().st_size
            if declared > max(ALWAYS_ALLOWED, MOST_INFLATION * size):
                raise ValueError(
                    f"it has {size:,} bytes and would unpack to {declared:,}: if that is right, save it with np.savez, "
                    "uncompressed"
                )
            return {member.filename.removesuffix(".npy"): _member(archive, member) for member in members}
    except Exception as error:  # zipfile and zlib have exceptions of their own for damaged archives
        raise CheckError(f"{path} cannot be read, it may be damaged or cut short: {error}") from None


def _count_at_the_end(path: Path) -> int | None:
    """How many members an archive says it has, which `zipfile` does not look at: a damaged entry of its directory may
    swallow the next ones."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2**16 - 22))
        tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    return int.from_bytes(tail[at + 10 : at + 12], "little") if at >= 0 else None


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as file:
        return _array(file, member.file_size)


def _array(file, size: int) -> np.ndarray:
    """The array that an open file of `size` bytes holds, and that alone."""
    shape, fortran_order, dtype = npy_header(file)
    count = 1
    for n in shape:
        count *= n
    left = size - file.tell()
    if count * dtype.itemsize > left:
        raise ValueError(f"{dtype} {list(shape)} take {count * dtype.itemsize:,} bytes, and {left:,} are left")
    payload = np.empty(left, np.uint8)
    rest = payload.data
    while rest:  # to the end: an archive's checksum is compared there
        read = file.readinto(rest)
        if not read:
            raise ValueError(f"it ends {len(rest):,} bytes early")
        rest = rest[read:]
    array = payload[: count * dtype.itemsize].view(dtype)
    return array.reshape(shape, order="F" if fortran_order else "C")


def load_safetensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays in a safetensors file, by name, and its metadata. Raises `ValueError` that names the file: also where
    rotsparse wrote it and an array is not what was written."""
    path = regular_file(path)
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}
            metadata = dict(file.metadata() or {})
    except Exception as error:
        raise CheckError(f"{path} cannot be read, it may be damaged or cut short: {error}") from None
    if metadata.get(DIGEST, arrays_digest(arrays)) != arrays_digest(arrays):
        raise CheckError(f"{path} is damaged: its arrays are not those that were written")
    return arrays, metadata


def safetensors(arrays: Mapping[str, np.ndarray], **metadata: str) -> bytes:
    """The bytes of a safetensors file, with metadata and a hash of the arrays."""
    return save(dict(arrays), metadata={**metadata, DIGEST: arrays_digest(arrays)})
