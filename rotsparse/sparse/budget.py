"""How many coordinates each site keeps, so that the model as a whole reads a given share of its weights.

A site's *curve* says what its dropped coordinates cost the model at each share kept. As long as costs add up, the
cheapest way to a budget is greedy on the curves' lower convex hulls: always give up the weights whose loss costs least
for each of them. Costs are measured: the divergence of the model's predictions when only this site drops coordinates.
(TEAL chooses greedily by the error of each block's output. Fisher information predicts these costs badly where much is
dropped, because it takes the errors at different tokens as independent.)
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Float

from rotsparse._core.types import AnyArray

Site = TypeVar("Site", bound=Hashable)

# The shares that a site may keep.
SHARES = np.round(np.arange(0.05, 1.001, 0.01), 2)

# Those at which the divergence is measured; in between its logarithm is interpolated.
MEASURED = (0.35, 0.65)


def importance(z: Float[AnyArray, "n d"], scores: Float[AnyArray, "d"] | None = None) -> Float[np.ndarray, "n d"]:
    """`s |z|`, by which coordinates stay."""
    return np.abs(z) if scores is None else np.abs(z) * np.asarray(scores)


def thresholds(z: Float[AnyArray, "n d"], scores: Float[AnyArray, "d"] | None = None) -> Float[np.ndarray, "shares"]:
    """The threshold of `s |z|` above which each of `SHARES` of all coordinates lies."""
    found = np.quantile(np.sort(importance(z, scores), axis=None), 1 - SHARES)  # sorted: half the time for so many
    found[-1] = -1.0  # all of them stay, zeros too
    return found


def curve(costs: Sequence[float]) -> Float[np.ndarray, "shares"]:
    """The cost at `SHARES` from those at `MEASURED`: log-linear in between, continued at both ends, and zero where all
    is kept."""
    logs = np.log(np.maximum(np.maximum.accumulate(np.asarray(costs, np.float64)[::-1])[::-1], 1e-9))
    inside = np.interp(SHARES, MEASURED, logs)
    low = logs[0] + (SHARES - MEASURED[0]) * (logs[1] - logs[0]) / (MEASURED[1] - MEASURED[0])
    high = logs[-1] + (SHARES - MEASURED[-1]) * (logs[-1] - logs[-2]) / (MEASURED[-1] - MEASURED[-2])
    found = np.exp(np.where(SHARES < MEASURED[0], low, np.where(SHARES > MEASURED[-1], high, inside)))
    found[-1] = 0.0
    return found


def allotted(
    curves: Mapping[Site, Float[AnyArray, "shares"]], weights: Mapping[Site, int], keep: float
) -> dict[Site, float]:
    """The share that each site keeps, of `SHARES`, so that all of them together keep at most the share `keep` of their
    weights at the least total cost. Raises `ValueError` for a share below the least of `SHARES`."""
    if not SHARES[0] <= keep <= 1:
        raise ValueError(f"keep is the share of the weights to read: expected {SHARES[0]:g} to 1, got {keep:g}")
    at = {site: len(SHARES) - 1 for site in curves}
    hulls = {site: _hull(np.asarray(curve, np.float64)) for site, curve in curves.items()}
    total = sum(weights[site] for site in curves)
    spare = sum(weights[site] * SHARES[at[site]] for site in curves) - keep * total

    def slope(site: Site) -> float:
        """What the next step down the hull costs for each weight."""
        here = hulls[site].index(at[site])
        if here == 0:
            return np.inf
        below = hulls[site][here - 1]
        saved = weights[site] * (SHARES[at[site]] - SHARES[below])
        return (curves[site][below] - curves[site][at[site]]) / saved

    while spare > 1e-9 * total:
        site = min(at, key=slope)
        below = hulls[site][hulls[site].index(at[site]) - 1]
        # The last step may give up more than it must: take the part of it that is needed.
        needed = np.searchsorted(SHARES, SHARES[at[site]] - spare / weights[site] + 1e-9, side="right") - 1
        to = max(below, int(max(needed, 0)))
        spare -= weights[site] * (SHARES[at[site]] - SHARES[to])
        if to != below:
            at[site] = to
            break
        at[site] = to
    return {site: float(SHARES[i]) for site, i in at.items()}


def _hull(curve: np.ndarray) -> list[int]:
    """The numbers of the points on the lower convex hull."""
    hull: list[int] = []
    for i in range(len(curve)):
        while len(hull) >= 2:
            (a, b), x = hull[-2:], SHARES
            if (curve[b] - curve[a]) * (x[i] - x[a]) < (curve[i] - curve[a]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(i)
    return hull
