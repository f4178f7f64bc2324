"""The data of the figures: a few small arrays, computed from streamed examples.

All magnitudes are in units of `rms(Z)`, the root mean square of all entries over all examples in the same basis.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from rotsparse._core.checks import activations
from rotsparse._core.errors import CheckError
from rotsparse._core.files import npz, write_atomically
from rotsparse._core.reading import load_npz
from rotsparse._core.types import Data
from rotsparse.data.moments import evenly_spaced
from rotsparse.data.scales import Scale
from rotsparse.evaluation.units import Matrix, MatrixOut, scaled_rows
from rotsparse.layers.base import Layer
from rotsparse.layers.jacobians import jacobians
from rotsparse.layers.rotations import Rotations

BEFORE, AFTER = "neurons", "learned"

_BY_BASIS = ("mean", "examples", "curves")

# The histogram's bins: 1% wide, over the whole range of float32, so that no scale is needed in advance.
_BIN = 0.01
_LOWEST = -110.0
_BINS = round(220 / _BIN)
# A picture of a wide layer needs no more examples than give so many entries.
_PICTURED_ENTRIES, _FEWEST_PICTURED = 2**25, 25


@dataclass(frozen=True)
class PictureData:
    """`mean[basis]` is `E|Z|`, `[d_out, d_in]`, and `examples[basis]` the |Z| of the same few single examples, for the
    two bases that are drawn as matrices, "neurons" and "learned".

    `curves[basis]`, for every basis, holds the magnitude |z| at each of `ranks`: a share `ranks[k]` of all entries of
    all examples is at least `curves[basis][k]`.
    """

    mean: dict[str, Float[np.ndarray, "d_out d_in"]]
    examples: dict[str, Float[np.ndarray, "k d_out d_in"]]
    ranks: Float[np.ndarray, "r"]
    curves: dict[str, Float[np.ndarray, "r"]]

    def save(self, path: Path) -> None:
        """Write the arrays to a `.npz` file, atomically."""
        arrays = {"ranks": self.ranks}
        for name in _BY_BASIS:
            arrays |= {f"{name} {basis}": array for basis, array in getattr(self, name).items()}
        write_atomically(path, npz(**{name: np.asarray(array, np.float32) for name, array in arrays.items()}))

    @classmethod
    def load(cls, path: Path) -> "PictureData":
        """What `save` wrote. Raises `ValueError` if the file is missing, damaged or of another kind."""
        arrays = load_npz(path)
        parts: dict[str, dict[str, np.ndarray]] = {name: {} for name in _BY_BASIS}
        for key, array in arrays.items():
            name, _, basis = key.partition(" ")
            if name in parts:
                parts[name][basis] = array
        both = {BEFORE, AFTER}
        if "ranks" not in arrays or not (both == set(parts["mean"]) == set(parts["examples"]) <= set(parts["curves"])):
            raise CheckError(f"{path} holds no pictures")
        shapes = {of.shape for of in parts["mean"].values()} | {of.shape[1:] for of in parts["examples"].values()}
        lengths = {of.shape for of in parts["curves"].values()}
        if len(shapes) != 1 or len(next(iter(shapes))) != 2 or lengths != {arrays["ranks"].shape}:
            raise CheckError(f"{path} is damaged: its arrays do not fit each other")
        return cls(parts["mean"], parts["examples"], arrays["ranks"], parts["curves"])


def picture_data(
    layer: Layer,
    x: Float[Data, "n d_in"],
    bases: dict[str, Rotations],
    *,
    scale_inputs: Scale,
    scale_outputs: Scale = False,
    covariance: Matrix | None = None,
    covariance_out: MatrixOut | None = None,
    examples: int = 3,
) -> PictureData:
    """Compute the arrays for all figures from held-out inputs `x`, with one pass over the examples for each basis.

    `bases` holds at least "neurons" and "learned". Scales and covariances are as in `metrics.evaluate`. The single
    examples are spread evenly over `x`. The curves come from a histogram with bins 1% wide.

    Raises `ValueError` if one of the two is missing, `x` does not fit, or the Jacobian is zero for every example.
    """
    x = activations("x", x, layer.d_in)
    if not {BEFORE, AFTER} <= set(bases):
        raise ValueError(f"a report needs bases called {BEFORE!r} and {AFTER!r}, got {', '.join(bases) or 'none'}")
    units: dict[str, Any] = {"scale_inputs": scale_inputs, "scale_outputs": scale_outputs}
    units |= {"covariance": covariance, "covariance_out": covariance_out}
    picked = x[np.linspace(0, len(x) - 1, min(examples, len(x))).round().astype(int)]
    entries = layer.d_in * layer.d_out
    # Logarithmic steps for the few largest entries, even steps for the many small ones.
    ranks = np.unique(np.concatenate([np.geomspace(1 / entries, 1, 100), np.linspace(0.01, 1, 100)]))

    x = evenly_spaced(x, max(_FEWEST_PICTURED, _PICTURED_ENTRIES // entries))
    mean, single, curves = {}, {}, {}
    for name, rotations in bases.items():
        r_in, r_out = scaled_rows(layer, x, rotations.r_in, rotations.r_out, **units)
        total, square_sum, counts = np.zeros((layer.d_out, layer.d_in)), 0.0, np.zeros(_BINS, np.int64)
        for z in jacobians(layer, x, r_in, r_out):
            z = np.abs(z)
            total += z.sum(axis=0, dtype=np.float64)
            square_sum += np.square(z, dtype=np.float64).sum()
            counts += _histogram(z)
        rms = np.sqrt(square_sum / (entries * len(x)))
        if rms == 0:
            raise ValueError("the layer's Jacobian is zero for every example: there is nothing to show")
        curves[name] = _magnitudes(counts, ranks) / rms
        if name in (BEFORE, AFTER):
            mean[name] = total / (len(x) * rms)
            single[name] = np.abs(np.concatenate(list(jacobians(layer, picked, r_in, r_out)))) / rms
    return PictureData(mean, single, ranks, curves)


def _histogram(z: Float[np.ndarray, "*s"]) -> Int[np.ndarray, "bins"]:
    """Counts of |z| in bins of equal logarithmic width; zeros are in the first bin."""
    with np.errstate(divide="ignore"):
        place = (np.log(z.ravel()) - _LOWEST) / _BIN
    return np.bincount(np.maximum(place, 0).astype(np.int64), minlength=_BINS)


def _magnitudes(counts: Int[np.ndarray, "bins"], ranks: Float[np.ndarray, "r"]) -> Float[np.ndarray, "r"]:
    """The magnitude that a share `ranks` of the counted entries reaches or exceeds."""
    at_least = np.cumsum(counts[::-1]) / counts.sum()
    # The tolerance avoids an index beyond the last bin when the last cumulative sum is rounded.
    bins = _BINS - 1 - np.searchsorted(at_least, ranks * (1 - 1e-12))
    return np.where(bins > 0, np.exp(_LOWEST + (bins + 0.5) * _BIN), 0)
