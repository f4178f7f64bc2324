"""The file of a model's sparse inputs, `rotsparse.safetensors`: arrays `layers.3.input.rotation`, `.inverse`, `.shift`,
`.scores` and `.threshold` of those that a site has; counts, the format and a hash of the model's weights in the
metadata.

Rotations are of no use with other weights, and nothing would show it but worse text. So the file is bound to the
matrices that read the sites (`readers`), and reading it with others is refused.
"""

import json
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from rotsparse._core import checks
from rotsparse._core.files import SIGNATURE, write_atomically
from rotsparse._core.modules import replace_fields
from rotsparse._core.reading import load_safetensors, reading, safetensors
from rotsparse.models.model import Model
from rotsparse.models.transformer import READ, Point, check_point, site_width
from rotsparse.sparse.inputs import SparseInput
from rotsparse.sparse.readers import reading_weights, weights_hash

FILE = "rotsparse.safetensors"
_KIND, _VERSION = "sparse inputs", "1"
_FIELDS = ("rotation", "inverse", "shift", "scores", "threshold")

# More than rounding explains.
_INVERTED = 1e-3

SparseInputs = Mapping[tuple[int, str], SparseInput]
"""By layer and site, what drops coordinates there."""


def write_sparse_inputs(path: str | os.PathLike, inputs: SparseInputs, model: Model) -> None:
    """Write the sparse inputs of a model. Atomic. A rotation that is the identity is left out.

    Raises `ValueError` for a point that no matrix of the model reads, or arrays of another width than the site's.
    """
    arrays, counts = {}, {}
    for (layer, site), sparse in checked_inputs(inputs, model).items():
        for field in _FIELDS:
            if (value := getattr(sparse, field)) is not None:
                value = np.asarray(value)
                arrays[f"layers.{layer}.{site}.{field}"] = np.ascontiguousarray(
                    value, np.float64 if value.dtype == np.float64 and value.ndim else np.float32
                ).reshape(value.shape)
        if sparse.count is not None:
            counts[f"layers.{layer}.{site}"] = int(sparse.count)
    metadata = {
        SIGNATURE: _KIND,
        "version": _VERSION,
        "weights": weights_hash(reading_weights(model)),
        "counts": json.dumps(counts),
    }
    write_atomically(path, safetensors(arrays, **metadata))


def read_sparse_inputs(path: str | os.PathLike, model: Model) -> dict[tuple[int, str], SparseInput]:
    """The sparse inputs that `write_sparse_inputs` wrote for this model.

    Raises `ValueError` for a file that is damaged or of another kind, or that was made for other weights (it says which
    were expected and which came).
    """
    inputs, expected = stored_inputs(path)
    check_weights(path, expected, weights_hash(reading_weights(model)))
    return checked_inputs(inputs, model)


def stored_inputs(path: str | os.PathLike) -> tuple[dict[tuple[int, str], SparseInput], str]:
    """What a file holds, for whichever model, and the hash of the weights that it belongs to."""
    with reading(path):
        arrays, metadata = load_safetensors(path)
        if metadata.get(SIGNATURE) != _KIND or metadata.get("version") != _VERSION:
            raise ValueError(
                f"{path} holds no sparse inputs of version {_VERSION}: it says {metadata.get(SIGNATURE)!r}, version "
                f"{metadata.get('version')!r}. Expected what write_sparse_inputs or export_sparse wrote"
            )
        parts: dict[tuple[int, str], dict] = {}
        for name, array in arrays.items():
            match = re.fullmatch(rf"layers\.(\d+)\.(\w+)\.({'|'.join(_FIELDS)})", name)
            if match is None:
                raise ValueError(f"{path} has an unexpected array {name!r}")
            parts.setdefault((int(match[1]), match[2]), {})[match[3]] = array
        for name, count in json.loads(metadata["counts"]).items():
            _, layer, site = name.split(".")
            parts.setdefault((int(layer), site), {})["count"] = int(count)
        return {Point(*point): SparseInput(**parts[point]) for point in sorted(parts)}, metadata["weights"]


def check_weights(path: str | os.PathLike, expected: str, found: str, hint: str = "") -> None:
    """Raise `ValueError` unless the weights are those that the file was made for."""
    if found != expected:
        raise ValueError(
            f"{path} belongs to another model: it was made for weights with SHA-256 {expected[:16]}…, and these have "
            f"{found[:16]}…. Use it with the model, fold included, that it was written for{hint}"
        )


def checked_inputs(inputs: SparseInputs, model: Model) -> dict[tuple[int, str], SparseInput]:
    """The inputs in order, their points and shapes checked, identities left out. Raises `ValueError`."""
    checked = {}
    for point, sparse in sorted(inputs.items()):
        layer, site = check_point(model.config, point)
        if site not in READ:
            raise ValueError(f"no matrix reads {layer}.{site}: expected one of the sites {', '.join(READ)}")
        width, where = site_width(model.config, site), f"layers.{layer}.{site}"
        rotation, inverse = checked_rotation(where, sparse, width)
        for field in ("shift", "scores"):
            if (value := getattr(sparse, field)) is not None:
                checks.weight(f"{where}.{field}", value, (width,))
        if sparse.count is not None and not 0 <= sparse.count <= width:
            raise ValueError(f"{where}: of {width} coordinates {sparse.count} cannot stay")
        checked[Point(layer, site)] = replace_fields(sparse, rotation=rotation, inverse=inverse)
    return checked


def checked_rotation(where: str, sparse: SparseInput, width: int | None = None) -> tuple[Any, Any]:
    """R and R⁻¹ of an input (`None`: the identity, Rᵀ). Raises `ValueError` where the two do not belong together."""
    rotation, inverse = sparse.rotation, sparse.inverse
    if inverse is not None:
        rotation = checks.weight(f"{where}.rotation", rotation, (width, width))
        inverse = checks.weight(f"{where}.inverse", inverse, np.shape(rotation)[::-1])
        error = np.abs(np.asarray(rotation, np.float64) @ np.asarray(inverse, np.float64) - np.eye(len(rotation))).max()
        if error > _INVERTED:
            raise ValueError(
                f"{where}.inverse is not that of {where}.rotation: the largest entry of |R R⁻¹ - I| is {error:.2g}, "
                f"expected < {_INVERTED:g}"
            )
    elif rotation is not None:
        rotation = checks.orthogonal(f"{where}.rotation", rotation, width)
        rotation = None if np.array_equal(rotation, np.eye(len(rotation))) else rotation
    return rotation, inverse
