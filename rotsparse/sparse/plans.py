"""The ways to drop coordinates that are compared: a basis for each site, and how many coordinates stay there."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rotsparse.models.model import Model
from rotsparse.models.transformer import Point
from rotsparse.sparse.bases import Basis
from rotsparse.sparse.budget import MEASURED, SHARES, curve
from rotsparse.sparse.inputs import SparseInput
from rotsparse.sparse.perplexity import costs

# Every site keeps the same share of each token's coordinates; or of all coordinates, those above one threshold; or a
# share of its own, chosen by what its coordinates cost, and those above the threshold for it.
CHOICES = LARGEST, THRESHOLDS, BUDGETS = "largest", "thresholds", "budgets"

# The result of a run, in which what stands in for dropped coordinates is trained as well.
TRAINED = "trained"


class Measured(NamedTuple):
    """A basis of a site, the mean of what is dropped (`None`: left at zero), the threshold at each of `budget.SHARES`,
    and the number of coordinates."""

    basis: Basis
    shift: Float[np.ndarray, "d"] | None
    thresholds: Float[np.ndarray, "shares"]
    width: int


def measured_curves(
    model: Model, tokens: Int[np.ndarray, "sequences length"], sites: Mapping[Point, Measured], **progress
) -> dict[Point, Float[np.ndarray, "shares"]]:
    """What the coordinates that a site drops cost, for each site by itself (see `budget`)."""
    points = sorted(sites, key=lambda point: point.layer)
    trials: list[dict[tuple[int, str], SparseInput]] = [
        {point: _sparse_input(sites[point], keep, False)} for point in points for keep in MEASURED
    ]
    found = costs(model, tokens, trials, **progress).divergence.mean(axis=1).reshape(len(points), -1)
    return {point: curve(of.tolist()) for point, of in zip(points, found, strict=True)}


def sparse_inputs(
    sites: Mapping[Point, Measured], kept: Mapping[Point, float], choice: str
) -> dict[tuple[int, str], SparseInput]:
    """What every site drops, if it keeps these shares. Raises `ValueError` for an unknown choice."""
    if choice not in CHOICES:
        raise ValueError(f"unknown choice {choice!r}: expected one of {', '.join(CHOICES)}")
    return {point: _sparse_input(of, kept[point], choice == LARGEST) for point, of in sites.items()}


def _sparse_input(of: Measured, keep: float, largest: bool) -> SparseInput:
    rotation, scores, inverse = of.basis
    if not largest:
        threshold = float(np.interp(keep, SHARES, of.thresholds))
        return SparseInput(rotation, of.shift, scores, threshold=threshold, inverse=inverse)
    return SparseInput(rotation, of.shift, scores, count=round(keep * of.width), inverse=inverse)
