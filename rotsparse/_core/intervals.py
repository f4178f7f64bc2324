"""Confidence intervals by bootstrap over examples (Efron & Tibshirani, "An Introduction to the Bootstrap", 1993)."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import PRNGKeyArray, Real, UInt16


class Interval(NamedTuple):
    """An estimate and its 95% interval."""

    value: float
    low: float
    high: float

    def overlaps(self, other: "Interval") -> bool:
        """Whether the two intervals have a point in common."""
        return self.low <= other.high and other.low <= self.high


def numpy_generator(key: PRNGKeyArray) -> np.random.Generator:
    """A NumPy generator seeded by a JAX key."""
    return np.random.default_rng(np.asarray(jax.random.bits(key, (4,), "uint32")))


def bootstrap_counts(n: int, resamples: int, *, key: PRNGKeyArray) -> UInt16[np.ndarray, "resamples n"]:
    """How often each of `n` examples is drawn in each resample (n draws with replacement).

    Small integers, so that they take little memory.
    """
    rng = numpy_generator(key)
    return np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(resamples)]).astype(np.uint16)


def bootstrap_interval(value: float, resampled: Real[np.ndarray, "resamples"]) -> Interval:
    """The 95% interval of a statistic from its values on resamples: percentiles, shifted so that their mean is
    `value`.

    A resample holds fewer distinct examples, and statistics such as "entries that hold 99% of the mean square" are
    lower on fewer examples. The shift removes that bias; for a mean it changes nothing.
    """
    low, high = np.quantile(resampled - resampled.mean(), [0.025, 0.975])
    # If a count rarely changes, both percentiles may lie on the same side of the mean.
    return Interval(float(value), float(value + min(low, 0)), float(value + max(high, 0)))
