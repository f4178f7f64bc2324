"""Agreement of two bases, up to the order and the signs of their directions.

A basis is a matrix whose rows are its directions. A sparsity objective determines a basis only up to a signed
permutation, so every comparison here is invariant to one.
"""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray

from rotsparse._core import orthogonal
from rotsparse._core.checks import weight
from rotsparse._core.intervals import Interval
from rotsparse._core.types import AnyArray

Directions = Float[AnyArray, "_ d"]


class Match(NamedTuple):
    """`signs[i] · b[permutation[i]]` is the partner of `a[i]`, and `cosines[i]` the absolute cosine between them."""

    permutation: Int[np.ndarray, "k"]
    signs: Float[np.ndarray, "k"]
    cosines: Float[np.ndarray, "k"]


def match(a: Directions, b: Directions) -> Match:
    """The one-to-one match of the rows of `a` to rows of `b` with the largest sum of `|cos|` (Hungarian algorithm).

    `a` is `[k, d]`, `b` is `[m, d]` with `m ≥ k`; rows need not be orthogonal or of unit length. Cost O(k² m).

    Raises `ValueError` if the widths differ, `b` has fewer rows than `a`, or a row is zero.
    """
    a, b = _unit_rows("a", a), _unit_rows("b", b)
    if a.shape[1] != b.shape[1] or len(a) > len(b):
        raise ValueError(
            "a and b should have rows of the same width, and b at least as many as a: "
            f"got {list(a.shape)} and {list(b.shape)}"
        )
    cosines = a @ b.T
    from scipy.optimize import linear_sum_assignment  # imported here, because it takes a tenth of a second

    rows, permutation = linear_sum_assignment(np.abs(cosines), maximize=True)
    matched = cosines[rows, permutation]
    return Match(permutation, np.where(matched < 0, -1.0, 1.0), np.minimum(np.abs(matched), 1.0))


def mean_max_cosine(a: Directions, b: Directions) -> float:
    """Mean `|cos|` over the rows of the best one-to-one match: 1 if the bases are equal up to sign and order.

    Compare it with `chance_cosine`, because for two unrelated bases it is far from 0.
    """
    return float(match(a, b).cosines.mean())


def amari_distance(a: Directions, b: Directions) -> float:
    """Amari distance of two orthogonal matrices: 0 if and only if they are equal up to sign and order, at most 1.

    With `P = |A Bᵀ|`, the mean of `Σ_j p_ij / max_j p_ij - 1` over rows and of the same over columns, divided by its
    largest possible value `d - 1`. (Amari, Cichocki & Yang, "A New Learning Algorithm for Blind Signal Separation",
    1996.)

    Raises `ValueError` if the matrices are not square, not of one size, or not orthogonal.
    """
    a, b = _unit_rows("a", a), _unit_rows("b", b)
    for name, m in (("a", a), ("b", b)):
        if m.shape != (len(a), len(a)) or np.abs(m @ m.T - np.eye(len(a))).max() > 1e-3:
            raise ValueError(
                f"a and b should be orthogonal matrices of one size: {name} {list(m.shape)} is not as it should be"
            )
    if len(a) == 1:
        return 0.0
    p = np.abs(a @ b.T)
    rows = (p.sum(axis=1) / p.max(axis=1) - 1).mean()
    columns = (p.sum(axis=0) / p.max(axis=0) - 1).mean()
    return float((rows + columns) / (2 * (len(a) - 1)))


def chance_cosine(d: int, *, key: PRNGKeyArray, draws: int = 20) -> Interval:
    """`mean_max_cosine` of two independent Haar bases of dimension `d`: its mean, and the range of 95% of the draws.

    Agreement inside this range is no more than chance. (One basis can be fixed to the identity, because the Haar
    measure is invariant.)
    """
    identity = np.eye(d)
    reached = [mean_max_cosine(np.asarray(orthogonal.haar(k, d)), identity) for k in jax.random.split(key, draws)]
    low, high = np.quantile(reached, [0.025, 0.975])
    return Interval(float(np.mean(reached)), float(low), float(high))


def _unit_rows(name, a):
    a = np.asarray(weight(name, a, (None, None)), np.float64)
    lengths = np.linalg.norm(a, axis=1, keepdims=True)
    if not lengths.all():
        raise ValueError(f"{name} has a zero row: it is no direction")
    return a / lengths


def reordered(r: AnyArray, order: Int[np.ndarray, "d"], signs: Float[np.ndarray, "d"]) -> np.ndarray:
    """`signs[i] · r[order[i]]` as row i."""
    r = np.asarray(r)
    return r[order] * signs.astype(r.dtype)[:, None]
