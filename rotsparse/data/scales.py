"""The covariances from which the standard deviations that scale a Jacobian are taken."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from rotsparse._core.checks import weight
from rotsparse._core.types import Rows
from rotsparse.data.moments import Moments, covariance, evenly_spaced, scale_covariance

Covariance = Callable[[Rows], Float[np.ndarray, "d d"]]

# Whether a side of the Jacobian is scaled by standard deviations, or from which covariance these are taken (`True`:
# `scale_covariance`).
Scale = bool | Covariance

# So many rows at either end of every principal component are drawn in.
TAIL = 0.02

_QUANTILE_ROWS = 8192


def winsorised(x: Rows) -> Float[np.ndarray, "d d"]:
    """A covariance that one row in fifty cannot move far, however far these rows are:

        Σ = Vᵀ cov(clip(V (x - mean), q_low, q_high)) V

    with the principal components of `x` in the rows of V, and for each of them its quantiles at 2% and 98%.

    Rows that are far in the same direction (attention sinks) lie along a principal component, and count there like the
    98th percentile. Standard deviations of normal inputs become 4% smaller, all alike, which the root mean square of
    entries takes out. A direction in which fewer than one row in fifty moves has next to no deviation left: where such
    rare directions matter, use the default, which leaves out rows only if they are far from all others.
    """
    mean, sigma = covariance(x)
    components = np.linalg.eigh(sigma)[1].T
    some = (np.asarray(evenly_spaced(x, _QUANTILE_ROWS)) - mean) @ components.T
    low, high = np.quantile(some, [TAIL, 1 - TAIL], axis=0)
    found = Moments.none(len(mean))
    for start in range(0, len(x), _QUANTILE_ROWS):
        rows = np.asarray(x[start : start + _QUANTILE_ROWS]) - mean
        found = found.with_block(np.clip(rows @ components.T, low, high))
    return components.T @ found.covariance @ components


def covariance_of(scale: Scale, x: Rows) -> Float[np.ndarray, "d d"]:
    """The covariance of `x` that a scale asks for. Raises `ValueError` if a function of the user's returns no finite
    `[d, d]`."""
    if isinstance(scale, bool):
        assert scale
        return scale_covariance(x)
    return np.asarray(weight("the covariance that scales", scale(x), (x.shape[1],) * 2), np.float64)


_NAMES: dict[str, Scale] = {"std": True, "robust": winsorised, "none": False}


def by_name(name: str) -> Scale:
    """The scale that a name on the command line stands for. Raises `ValueError` for another name."""
    if name not in _NAMES:
        raise ValueError(f"a scale is one of {', '.join(_NAMES)}, got {name!r}")
    return _NAMES[name]


def named(scale: Scale) -> bool | str:
    """A scale as JSON."""
    return scale if isinstance(scale, bool) else getattr(scale, "__name__", type(scale).__name__)
