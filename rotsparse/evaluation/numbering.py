"""The numbers and signs of directions: a sparsity objective leaves both open, so one rule fixes them for every table,
figure and file.

Direction 0 of a space has the largest influence, the last one the smallest. The sign is the one for which the
coordinate is skewed to positive values, `E[(z - E z)³] ≥ 0`: where a direction has a long tail, that is its positive
end. Where the skewness is below 1e-3 in magnitude, the largest entry of the direction is positive.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from rotsparse._core.alignment import reordered
from rotsparse._core.types import AnyArray, Rows
from rotsparse.engine.solution import Solution
from rotsparse.evaluation.units import scaled_rows
from rotsparse.layers.base import Layer
from rotsparse.layers.jacobians import apply, jacobians
from rotsparse.layers.rotations import Rotations

# Below this the sign of a skewness is noise.
SKEWED = 1e-3


class Numbering(NamedTuple):
    """`signs[i] · r[order[i]]` is direction i."""

    order: Int[np.ndarray, "d"]
    signs: Float[np.ndarray, "d"]


def influences(
    layer: Layer, x: Rows, bases: Mapping[str, AnyArray], units: Mapping[str, Any]
) -> dict[str, Float[np.ndarray, "_"]]:
    """For every space, the share of the mean squared (scaled) Jacobian that each of its directions holds, as a column
    ("in") or row ("out"). A single basis "in" is on both sides: the mean of the two. `units`: as `scaled_rows` takes
    them. One pass over the Jacobians."""
    r_in, r_out = scaled_rows(layer, x, bases["in"], bases.get("out", bases["in"]), **units)
    square = sum(np.square(z, dtype=np.float64).sum(axis=0) for z in jacobians(layer, x, r_in, r_out))
    share = square / np.sum(square)
    columns, rows = share.sum(axis=0), share.sum(axis=1)
    return {"in": columns, "out": rows} if "out" in bases else {"in": (columns + rows) / 2}


def numbering(layer: Layer, x: Rows, bases: Mapping[str, AnyArray], units: Mapping[str, Any]) -> dict[str, Numbering]:
    """The order by influence and the signs of every space's directions, on the inputs `x`."""
    influence = influences(layer, x, bases, units)
    found = {}
    for space, r in bases.items():
        values = np.asarray(x if space == "in" else apply(layer, jnp.asarray(x)), np.float64)
        order = np.argsort(-influence[space], kind="stable")
        found[space] = Numbering(order, _signs(values, np.asarray(r, np.float64)[order]))
    return found


def numbered(layer: Layer, x: Rows, solution: Solution, **units: Any) -> Solution:
    """The solution with the directions of every space that was fitted in their order and with their signs. Spaces that
    were held stay as they are: their directions have names of their own, as neurons have."""
    numbers = numbering(layer, x, {name: np.asarray(r) for name, r in solution.bases.items()}, units)
    return solution.renumbered({name: of for name, of in numbers.items() if solution.free[name].any()})


def numbered_rotations(layer: Layer, x: Rows, rotations: Rotations, **units: Any) -> Rotations:
    """Rotations with their directions in order and with their signs, on both sides."""
    bases = {"in": np.asarray(rotations.r_in), "out": np.asarray(rotations.r_out)}
    numbers = numbering(layer, x, bases, units)
    return Rotations(*(reordered(bases[name], *numbers[name]) for name in ("in", "out")))


def _signs(values: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Of every row of `r`, the sign that the rule gives it."""
    z = (values - values.mean(axis=0)) @ r.T
    spread = np.sqrt(np.square(z).mean(axis=0))
    skew = (z**3).mean(axis=0) / np.where(spread > 0, spread, 1) ** 3
    largest = np.take_along_axis(r, np.abs(r).argmax(axis=1)[:, None], axis=1)[:, 0]
    return np.where(np.where(np.abs(skew) > SKEWED, skew, largest) < 0, -1.0, 1.0)
