"""Concentration: how much of a Jacobian's energy a single row, column, entry or example holds.

A share of entries below 0.1 rms, and the number of edges that hold 99%, divide by the energy of all entries. Where one
row holds most of it, that row alone is measured: all other entries count as small, whether they are sparse or not.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

TOP = 0.01
"""The share of rows and of columns that the metrics "without top" take out."""


class Concentration(NamedTuple):
    """Shares of the energy of the scaled Jacobians, `Σ z²` over all examples and entries: those of the output direction
    (`row`), the input direction (`column`), the `entry` and the `example` that hold most of it."""

    row: float
    column: float
    entry: float
    example: float


def concentration(mean_square: Float[np.ndarray, "d_out d_in"], energy: Float[np.ndarray, "n"]) -> Concentration:
    """`mean_square` is `E[Z²]`, not all zero; `energy` is `‖Z‖²` of every example."""
    total = mean_square.sum()
    parts = (mean_square.sum(axis=1), mean_square.sum(axis=0), mean_square)
    row, column, entry = (float(part.max() / total) for part in parts)
    return Concentration(row, column, entry, float(energy.max() / energy.sum()))


def without_top(
    mean_square: Float[np.ndarray, "d_out d_in"],
) -> tuple[Bool[np.ndarray, "d_out"], Bool[np.ndarray, "d_in"]]:
    """Which rows and columns stay when 1% of each are taken out (rounded up; none of a side that has a single one).

    One after the other, always the row or column that holds most of what is left: a column that stands out only after
    the strongest row is gone goes, too.
    """
    energy = [mean_square.sum(axis=1), mean_square.sum(axis=0)]
    kept = [np.ones(d, bool) for d in mean_square.shape]
    to_go = [math.ceil(TOP * d) if d > 1 else 0 for d in mean_square.shape]
    while any(to_go):
        candidates = [np.where(kept[side] & (to_go[side] > 0), energy[side], -np.inf) for side in (0, 1)]
        side = int(candidates[1].max() > candidates[0].max())
        which = int(np.argmax(candidates[side]))
        kept[side][which] = False
        to_go[side] -= 1
        energy[1 - side] = energy[1 - side] - np.take(mean_square, which, axis=side)
    return kept[0], kept[1]
