"""The weights of a model as the decode step reads them: whole, or transposed for those inputs that are sparse."""

from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float

from rotsparse.models.model import Model
from rotsparse.models.transformer import read_by
from rotsparse.sparse.file import SparseInputs
from rotsparse.sparse.inputs import SparseInput

LINE = 64
"""The bytes of a cache line."""
PAD = 64
"""Rows are padded to a multiple of so many numbers: whole cache lines of every type."""
TYPES = {np.dtype(np.float32): np.float32, np.dtype(ml_dtypes.bfloat16): np.uint16, np.dtype(np.int8): np.int8}
"""The types of stored weights, and what the kernels take for them."""


def weight_type(dtype: Any) -> np.dtype:
    """Raises `ValueError` for a type that no kernel reads."""
    if np.dtype(dtype) not in TYPES:
        raise ValueError(f"weights are stored as float32, bfloat16 or int8, not as {np.dtype(dtype)}")
    return np.dtype(dtype)


def padded(n: int) -> int:
    """The next multiple of `PAD`."""
    return -(-n // PAD) * PAD


def aligned(shape: int | tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Zeros that begin where a cache line does. (NumPy's begin in the midst of one: each register then takes two.)"""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    room = np.zeros(size + LINE, np.uint8)
    first = -room.ctypes.data % LINE
    return room[first : first + size].view(dtype).reshape(shape)


def stored(rows: Float[np.ndarray, "rows n"], dtype: np.dtype) -> tuple[np.ndarray, Float[np.ndarray, "rows"]]:
    """A matrix in a type, its rows padded, flat; and what to multiply each row by (int8: its largest entry / 127)."""
    rows = np.asarray(rows, np.float32)
    wide, scales = aligned((len(rows), padded(rows.shape[1])), dtype), np.ones(len(rows), np.float32)
    if dtype == np.int8:
        largest = np.abs(rows).max(axis=1)
        scales = np.where(largest > 0, largest / 127, 1).astype(np.float32)
        rows = np.rint(rows / scales[:, None])
    wide[:, : rows.shape[1]] = rows.astype(dtype)
    return wide.view(TYPES[dtype]).reshape(-1), scales


def restored(flat: np.ndarray, scales: Float[np.ndarray, "rows"], n: int, dtype: np.dtype) -> np.ndarray:
    """The matrix `[rows, n]` that `stored` rounded, in float32."""
    return flat.view(dtype).reshape(len(scales), -1)[:, :n].astype(np.float32) * scales[:, None]


def site_arrays(
    model: Model, site: str, inputs: SparseInputs, dtype: np.dtype, rotation_dtype: np.dtype
) -> dict[str, np.ndarray]:
    """The fields of `decode_step.Matrix` of one site. Of a sparse input `W x̂ = W R⁻¹ k(R x - c) + W R⁻¹ c`: what is
    stored is `R⁻ᵀ Wᵀ`, whose rows are read, and the last term is a bias. R is the rotation as it was rounded, so that
    its rounding changes what is dropped, but not the function."""
    parts = [read_by(block, site)[0] for block in model.params["layers"]]
    _, letters = read_by(model.params["layers"][0], site)
    n_in, n_out = parts[0][f"w_{letters[0]}"].shape[1], sum(len(parts[0][f"w_{letter}"]) for letter in letters)
    count, wide = len(parts), padded(n_in)
    sparse = [inputs.get((layer, site)) for layer in range(count)]
    rotated = np.array([s is not None and s.rotation is not None for s in sparse])
    sizes = [n_out * wide if s is None else n_in * padded(n_out) for s in sparse]
    begins = np.cumsum([0, *sizes])
    arrays: dict[str, np.ndarray] = {
        "weights": aligned(begins[-1], TYPES[dtype]),
        "begins": begins[:-1],
        "widths": np.array([wide if s is None else padded(n_out) for s in sparse]),
        "gathered": np.array([s is not None for s in sparse]),
        "scales": np.ones((count, max(n_in, n_out)), np.float32),
        "biases": np.zeros((count, n_out), np.float32),
        "threshold": np.zeros(count, np.float32),
        "count": np.full(count, -1),
        "shifts": np.zeros((count, wide), np.float32),
        "scores": np.ones((count, wide), np.float32),
        "rotations": aligned(rotated.sum() * n_in * wide, TYPES[rotation_dtype]),
        "rotation_begins": np.where(rotated, (np.cumsum(rotated) - 1) * n_in * wide, -1),
        "rotation_scales": np.ones((count, n_in), np.float32),
    }
    for layer, (p, s) in enumerate(zip(parts, sparse, strict=True)):
        w = np.concatenate([np.asarray(p[f"w_{letter}"], np.float32) for letter in letters])
        _fill_bias(arrays["biases"][layer], p, letters)
        rows = w if s is None else w.T
        if s is not None and s.rotation is not None:
            begin = arrays["rotation_begins"][layer]
            flat, scales = stored(np.asarray(s.rotation), rotation_dtype)
            arrays["rotations"][begin : begin + n_in * wide], arrays["rotation_scales"][layer] = flat, scales
            rows = _behind(s, restored(flat, scales, n_in, rotation_dtype), rows)
        if s is not None:
            _fill_selection(arrays, layer, s, rows)
        weights, arrays["scales"][layer, : len(rows)] = stored(rows, dtype)
        arrays["weights"][begins[layer] : begins[layer + 1]] = weights
    return arrays


def _fill_bias(bias: np.ndarray, p, letters) -> None:
    at = 0
    for letter in letters:
        n = len(p[f"w_{letter}"])
        if f"b_{letter}" in p:
            bias[at : at + n] = p[f"b_{letter}"]
        at += n


def _behind(s: SparseInput, rounded: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """`R⁻ᵀ Wᵀ` of the rounded R. Of one that was not rounded the inverse is known."""
    if np.array_equal(np.asarray(s.rotation), rounded):
        return np.asarray(s.back).T @ rows
    return np.linalg.solve(rounded.T.astype(np.float64), rows).astype(np.float32)


def _fill_selection(arrays: dict[str, np.ndarray], layer: int, s: SparseInput, rows: np.ndarray) -> None:
    """What says which rows are read, where the kernels look for it."""
    for field, name in (("shift", "shifts"), ("scores", "scores")):
        if (value := getattr(s, field)) is not None:
            arrays[name][layer, : len(rows)] = value
    if s.shift is not None:
        arrays["biases"][layer] += np.asarray(s.shift, np.float32) @ rows
    if s.threshold is not None:
        arrays["threshold"][layer] = s.threshold
    if s.count is not None:
        arrays["count"][layer] = s.count
