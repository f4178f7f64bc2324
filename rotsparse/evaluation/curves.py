"""Whole curves instead of one threshold: the share of entries below every size, the energy in every number of them."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

THRESHOLDS = np.geomspace(0.01, 1, 21)
"""From a hundredth of the rms to the rms, ten a decade."""


class Curves(NamedTuple):
    """`below[k]`: the share of all entries of all examples with `|z| < thresholds[k] rms`. `below_by_row`: the same in
    units of the rms of each entry's own row, rows without influence left out. `energy[k]`: the share of the mean
    squared Jacobian in its `top[k]` largest entries."""

    thresholds: tuple[float, ...]
    below: tuple[float, ...]
    below_by_row: tuple[float, ...]
    top: tuple[int, ...]
    energy: tuple[float, ...]


def curves(
    mean_square: Float[np.ndarray, "d_out d_in"],
    below: Float[np.ndarray, "t"],
    below_by_row: Float[np.ndarray, "t"],
) -> Curves:
    """Curves from `E[Z²]` and the shares below each of `THRESHOLDS`."""
    top = np.unique(np.geomspace(1, mean_square.size, 25).round().astype(int))
    held = np.cumsum(-np.sort(-mean_square, axis=None))
    lists = (THRESHOLDS, below, below_by_row, top, held[top - 1] / held[-1])
    return Curves(*(tuple(values.tolist()) for values in lists))


def count_below(ordered: Float[np.ndarray, "n N"]) -> Int[np.ndarray, "t"]:
    """How many entries are below each threshold, from every example's |z| in ascending order, in units of the rms."""
    limits = THRESHOLDS.astype(ordered.dtype)
    return sum((np.searchsorted(example, limits) for example in ordered), np.zeros(len(limits), np.int64))


def count_below_each(z: Float[np.ndarray, "n N"], rms: Float[np.ndarray, "N"]) -> Int[np.ndarray, "t"]:
    """How many entries are below each threshold times an `rms` of their own; none where that is zero."""
    relative = np.full_like(z, np.inf)
    np.divide(z, rms.astype(z.dtype), out=relative, where=rms > 0)
    return count_below(np.sort(relative, axis=1))
