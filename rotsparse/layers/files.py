"""Layers and activations in files: `.npy`, `.npz` and safetensors.

A layer file holds named arrays, matrices `[out, in]`:

- `w`, `b`: a single layer `φ(Wx + b)`
- `w_in`, `b_in`, `w_out`, `b_out`: an MLP block
- `w_gate`, `w_up`, `w_down` (and `b_gate`, `b_up`, `b_down`): a gated block

Biases are optional. `norm_scale` (and `norm_bias`) put an RMSNorm or a LayerNorm in front; `norm_eps` is its ε (one
number, by default 1e-5). `skip` is the matrix of a skip connection. A LayerNorm removes the component along
`norm_mean_direction`, a unit vector (by default the one with equal entries); an RMSNorm has no such vector.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from rotsparse._core import checks
from rotsparse._core.files import SIGNATURE, write_atomically, writing
from rotsparse._core.reading import check_typed, load_npy, load_npz, load_safetensors, safetensors
from rotsparse.data.sources import RESIDENT_BYTES, NpyFile, Source
from rotsparse.data.store import open_store
from rotsparse.layers.activations import Activation
from rotsparse.layers.base import ClosedForm, Layer
from rotsparse.layers.gated import GatedMLP
from rotsparse.layers.mlp import MLP, Dense
from rotsparse.layers.norms import Norm, layer_norm

# Activations of more bytes (in float32) stay on disk.
LOADED_BYTES = RESIDENT_BYTES

_KINDS = {"w": ("b",), "w_in": ("b_in", "w_out", "b_out"), "w_gate": ("w_up", "w_down", "b_gate", "b_up", "b_down")}
_COMMON = ("norm_scale", "norm_bias", "norm_mean_direction", "norm_eps", "skip")


def load_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """All named arrays of a safetensors or `.npz` file; the array of a `.npy` file is called "array". Half precision
    becomes float32.

    Raises `ValueError` if the file is missing, damaged, or of another kind.
    """
    path = Path(path)
    return {name: _widened(path, array) for name, array in _stored(path).items()}


def _widened(path: Path, array: np.ndarray) -> np.ndarray:
    """float16 and bfloat16 as float32: too coarse to rotate in."""
    if path.suffix != ".safetensors":
        check_typed(path, array.dtype)
    return array.astype(np.float32) if array.dtype.name in ("float16", "bfloat16") else array


def _stored(path: Path) -> dict[str, np.ndarray]:
    match path.suffix:
        case ".safetensors":
            return load_safetensors(path)[0]
        case ".npz":
            return load_npz(path)
        case ".npy":
            return {"array": load_npy(path)}
    raise ValueError(f"{path}: expected a .npy, .npz or .safetensors file, got {path.suffix or 'no extension'!r}")


def load_activations(path: str | os.PathLike, width: int) -> np.ndarray:
    """Read the only array `[examples, width]` of a file. Raises `ValueError` for several arrays, another shape, or
    values that are not finite."""
    arrays = load_arrays(path)
    if len(arrays) != 1:
        raise ValueError(
            f"{path} holds {len(arrays)} arrays ({', '.join(sorted(arrays))}): expected just the activations"
        )
    return np.asarray(checks.activations(str(path), next(iter(arrays.values())), width))


def open_activations(path: str | os.PathLike, width: int) -> np.ndarray | Source:
    """Open the activations in a file, or in a folder that `rotsparse capture` wrote: as a source, if a `.npy` file or a
    folder holds more than `LOADED_BYTES`, otherwise as an array. Folders are compared with their hashes. Raises
    `ValueError` for activations that do not fit; of a source only the width is checked."""
    path = Path(path)
    if path.is_dir():
        source = open_store(path)
        source.verify()  # takes less time than the pass for the covariance that a fit makes
    elif path.suffix == ".npy" and path.is_file() and path.stat().st_size > LOADED_BYTES:
        source = NpyFile(path)
    else:
        return load_activations(path, width)
    if source.shape[1] != width:
        raise ValueError(
            f"{path} should have shape [examples, {width}], the inputs of the layer, got {list(source.shape)}"
        )
    if 4 * len(source) * width <= LOADED_BYTES:
        return np.asarray(checks.activations(str(path), source.read(range(len(source))), width))
    return source


def load_layer(
    path: str | os.PathLike, activation: str | Activation, *, norm: str | None = None, skip: bool = False
) -> Layer:
    """Read a layer. `norm` ("rms" or "layer"): the kind of norm to which `norm_scale` belongs. `skip`: add a skip
    connection. Raises `ValueError`, with the expected names and those found, for other arrays."""
    arrays = load_arrays(path)
    kinds = [kind for kind in _KINDS if kind in arrays]
    known = {kinds[0], *_KINDS[kinds[0]], *_COMMON} if len(kinds) == 1 else set()
    if not set(arrays) <= known:
        raise ValueError(
            f"{path} holds {', '.join(sorted(arrays))}: expected w, b (single layer), or w_in, b_in, w_out, b_out (MLP "
            "block), or w_gate, w_up, w_down (gated block), and if need be norm_scale, norm_bias, skip"
        )
    common = {name: arrays.pop(name) for name in _COMMON if name in arrays}
    if skip and "skip" in common:
        raise ValueError(f"{path} already holds the matrix of a skip connection: leave out the option")
    options = {"activation": activation, "norm": _norm(path, common, norm), "skip": common.get("skip", skip)}
    try:
        match kinds[0]:
            case "w":
                return Dense(arrays["w"], arrays.get("b"), **options)
            case "w_in" if not {"w_out", "b_out"} & arrays.keys():
                return Dense(arrays["w_in"], arrays.get("b_in"), **options)
            case "w_in":
                return MLP(*(arrays.get(name) for name in ("w_in", "b_in", "w_out", "b_out")), **options)
            case _:
                missing = {"w_up", "w_down"} - set(arrays)
                if missing:
                    raise ValueError(
                        f"a gated block needs w_gate, w_up and w_down: {', '.join(sorted(missing))} missing"
                    )
                return GatedMLP(**arrays, **options)
    except ValueError as error:
        raise ValueError(f"{path}: {error}{_advice(arrays)}") from None


def _advice(arrays: dict[str, np.ndarray]) -> str:
    """A likely cause for arrays whose shapes do not fit each other, to append to the message."""
    if "w_in" in arrays and "b_out" in arrays and "w_out" not in arrays:
        return "; there is no w_out: is it missing?"
    for matrix, bias in (("w", "b"), ("w_in", "b_in"), ("w_gate", "b_gate"), ("w_up", "b_up"), ("w_down", "b_down")):
        shape = np.shape(arrays.get(matrix, 0))
        if len(shape) == 2 and shape[0] != shape[1] and np.shape(arrays.get(bias, 0)) == shape[1:]:
            return f"; {matrix} is {list(shape)}: is it transposed?"
    return ""


def save_layer(path: str | os.PathLike, layer: Layer) -> None:
    """Write a layer as safetensors, for `load_layer`. Atomic. Raises `ValueError` for a layer without weights."""
    if not isinstance(layer, ClosedForm):
        raise ValueError(f"a {type(layer).__name__} has no weights to write")
    arrays: dict[str, Any] = {**layer.weights(), "skip": layer.skip}
    if layer.norm is not None:
        fields = {"norm_scale": "scale", "norm_bias": "bias", "norm_mean_direction": "mean_direction"}
        arrays |= {name: getattr(layer.norm, field) for name, field in fields.items()}
        arrays["norm_eps"] = np.float64(layer.norm.eps)
        if layer.norm.scale is None:  # absorbed by a fold, but its presence in the file says that there is a norm
            arrays["norm_scale"] = np.ones(
                layer.norm.d, layer.norm.mean_direction.dtype if layer.norm.mean_direction is not None else np.float32
            )
    held = {k: np.ascontiguousarray(v) for k, v in arrays.items() if v is not None}
    write_atomically(path, safetensors(held, **{SIGNATURE: "layer"}))


def save_array(path: str | os.PathLike, array: np.ndarray) -> None:
    """Write one array as `.npy`. Atomic."""
    with writing(path) as file:
        np.save(file, array)


def _norm(path, common, kind) -> Norm | None:
    held = [name for name in common if name.startswith("norm_")]
    if kind is None and not held:
        return None
    if "norm_scale" not in held:
        whose = f"no norm_scale, the scale γ of the {kind} norm" if kind else f"{', '.join(held)} but no norm_scale"
        raise ValueError(f"{path} holds {whose}: add it (ones, if the norm has none), or leave the norm out altogether")
    if kind is None:
        raise ValueError(f"{path} holds norm_scale: say which norm it belongs to (rms or layer)")
    if kind not in ("rms", "layer"):
        raise ValueError(f"unknown norm {kind!r}: expected rms or layer")
    eps = np.asarray(common.get("norm_eps", 1e-5))
    if eps.size != 1 or not 0 <= eps.item() < np.inf:
        raise ValueError(f"{path}: norm_eps should be one number that is not negative, got {eps.tolist()}")
    norm = layer_norm(common["norm_scale"], common.get("norm_bias"), float(eps.item()))
    if "norm_mean_direction" not in held:
        # An RMSNorm may have a bias: folding leaves one where it centred the stream of a LayerNorm.
        return norm if kind == "layer" else Norm(norm.scale, norm.bias, None, norm.d, norm.eps)
    if kind == "rms":
        raise ValueError(f"{path} holds norm_mean_direction, which an RMSNorm does not have: its norm is layer")
    direction = checks.weight("norm_mean_direction", common["norm_mean_direction"], (norm.d,))
    length = float(np.linalg.norm(direction))
    if abs(length - 1) > 1e-3:
        raise ValueError(f"{path}: norm_mean_direction should be a vector of length 1, got length {length:.3g}")
    return Norm(norm.scale, norm.bias, direction, norm.d, norm.eps)
