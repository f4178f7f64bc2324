"""Short hashes of bytes and arrays."""

import hashlib
from collections.abc import Mapping

import numpy as np


def digest(payload: bytes | memoryview) -> str:
    """A short hash of some bytes (BLAKE2b, 128 bits)."""
    return hashlib.blake2b(payload, digest_size=16).hexdigest()


def array_digest(array: np.ndarray) -> str:
    """A hash of an array's bytes, dtype and shape."""
    array = np.ascontiguousarray(array)
    about = f"{array.dtype.str} {array.dtype.name} {array.shape}".encode()
    return digest(about + digest(array.reshape(-1).view(np.uint8).data).encode())


def arrays_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """A hash of named arrays, independent of their order."""
    return digest(
        "".join(f"{name} {array_digest(arrays[name])}\n" for name in sorted(arrays)).encode("utf-8", "replace")
    )
