"""Bases for sparse activations, shared by the experiments on language models: every method that is compared, and ours.

Ours minimises a smooth measure by annealing and then raises the energy of the largest coordinates itself. Everything
is chosen on held-out activations of the kind it was fitted on, by the energy that top-k loses, never by the network's
loss.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray
from threadpoolctl import threadpool_limits

import rotsparse as rs
from rotsparse.intervals import Interval, bootstrap_counts, bootstrap_interval
from rotsparse.objectives import ActivationSparsity
from rotsparse.solvers.activation import fit_activations
from rotsparse.substitution import KeepAbove, KeepLargest

Matrix = Float[np.ndarray, "d d"]

METHODS = {
    "none": "no rotation",
    "haar": "Haar",
    "pca": "PCA (LaRoSA)",
    "l4": "L4",
    "ica": "ICA",
    "log": "log measure",
    "ours": "ours",
    "none_threshold": "no rotation, threshold (TEAL)",
    "pca_threshold": "PCA, threshold",
    "ours_threshold": "ours, threshold",
}
STYLES = {
    "none": ("#222222", "-"),
    "haar": ("#8a8a8a", ":"),
    "pca": ("#0072b2", "-"),
    "l4": ("#009e73", "-"),
    "ica": ("#cc79a7", "-"),
    "log": ("#56b4e9", "-"),
    "ours": ("#d55e00", "-"),
    "none_threshold": ("#222222", "--"),
    "pca_threshold": ("#0072b2", "--"),
    "ours_threshold": ("#d55e00", "--"),
}
"""Colours of Okabe & Ito, and a line style where two methods share one."""


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is spent on our bases and on the methods that iterate."""

    steps: int
    polish: int
    batch: int
    eps: tuple[float, ...]
    """Scales of the measure to choose from on held-out activations."""
    ica_examples: int = 10_000
    """What ICA is fitted on: its time grows with them."""


def fit(
    x: Float[np.ndarray, "n d"], held_out: Float[np.ndarray, "m d"], effort: Effort, *, key: PRNGKeyArray
) -> tuple[dict[str, Matrix], dict[str, Any]]:
    """The basis of every method for the activations `x`, and what was chosen for ours."""
    d = x.shape[1]
    keys = jax.random.split(key, 5)
    # The baselines rotate both sides of a layer; one output is none to speak of.
    inputs_only = rs.FunctionLayer(function=lambda v: v[:1], d_in=d, d_out=1)
    sample = x[np.asarray(jax.random.permutation(keys[3], len(x)))[: effort.ica_examples]]
    found = {
        "none": np.eye(d, dtype=np.float32),
        "haar": rs.baselines.haar(inputs_only, x, key=keys[1]).r_in,
        "pca": rs.baselines.pca_uncentred(inputs_only, x).r_in,
        "l4": fit_activations(jnp.asarray(x), key=keys[2], measure=rs.L4())[0],
        "ica": _ica(inputs_only, sample, seed=int(jax.random.bits(keys[3], (), "uint16"))),
        "log": fit_activations(jnp.asarray(x), key=keys[4], measure=rs.Log(0.3))[0],
    }
    bases = {name: np.asarray(r) for name, r in found.items()}
    ours, chosen = sparsest(x, held_out, bases, effort, key=keys[0])
    return bases | {"ours": ours}, chosen


def sparsest(
    x: Float[np.ndarray, "n d"],
    held_out: Float[np.ndarray, "m d"],
    bases: dict[str, Matrix],
    effort: Effort,
    *,
    key: PRNGKeyArray,
) -> tuple[Matrix, dict[str, Any]]:
    """The basis whose d/2 largest coordinates hold most of the energy of the held-out activations: of one annealing for
    every ε of the effort and the `bases` at hand the best, and what `raise_largest` makes of it."""
    count = x.shape[1] // 2
    starts = {name: bases[name] for name in ("pca", "log")}
    for eps in effort.eps:
        objective = ActivationSparsity(x, rs.GemanMcClure(eps), batch_size=effort.batch)
        identity = {"in": jnp.eye(x.shape[1])}
        annealed = rs.minimize(objective, identity, key=key, steps=effort.steps).bases["in"]
        starts[f"annealed, ε = {eps}"] = np.asarray(annealed)
    lost = {name: energy_lost(held_out, r, count) for name, r in starts.items()}
    best = min(lost, key=lost.__getitem__)
    polished = raise_largest(x, starts[best], count, effort.polish)
    lost["polished"] = energy_lost(held_out, polished, count)
    return polished if lost["polished"] < lost[best] else starts[best], {"start": best, "energy_lost": lost}


def raise_largest(x: Float[np.ndarray, "n d"], r: Matrix, count: int, steps: int) -> Matrix:
    """Raise `E ‖k(R x)‖²`, the energy of the `count` largest coordinates of each example, by `R ← polar(E[k(R x) xᵀ])`.

    The energy is a maximum over choices of coordinates of convex functions of R, so it is convex itself, lies above its
    linearisation, and every step goes up (the generalised power method: Journée et al. 2010). Steps are taken twice as
    long; one that goes down is taken again at its own length.
    """
    x, r = np.asarray(x), np.asarray(r)
    reached, long, plain, best = -np.inf, True, r, r
    with threadpool_limits(1, user_api="blas"):
        for _ in range(steps):
            z = x @ r.T
            square = np.square(z)
            kept = np.where(square >= _kth_largest(square, count), z, 0)
            energy = float(np.square(kept).sum(dtype=np.float64))
            if energy < reached and long:
                r, long = plain, False
                continue
            reached, long, best = energy, True, r
            plain = _polar(kept.T @ x)
            r = _polar(2 * plain - r)
    return best.astype(np.float32)


def energy_lost(x: Float[np.ndarray, "n d"], r: Matrix, count: int) -> float:
    """`E‖x - x̂‖² / E‖x‖²` when each example keeps its `count` largest rotated coordinates."""
    square = np.square(x @ r.T)
    kept = np.where(square >= _kth_largest(square, count), square, 0)
    return 1 - float(kept.sum(dtype=np.float64) / square.sum(dtype=np.float64))


def keeper(method: str, held_out: Float[np.ndarray, "n d"], bases: dict[str, Matrix], sparsity: float):
    """The basis of a method, and which of its coordinates stay: the largest of each example, or those above the one
    threshold with that sparsity on held-out activations (on those that a basis was fitted on it would be too low)."""
    r = bases[method.removesuffix("_threshold")]
    if method.endswith("_threshold"):
        # An array, so that no new threshold compiles anew.
        return r, KeepAbove(jnp.asarray(KeepAbove.at_sparsity(held_out, r, sparsity).threshold))
    return r, KeepLargest(kept(held_out.shape[1], sparsity))


def kept(d: int, sparsity: float) -> int:
    """How many of `d` coordinates stay."""
    return round(d * (1 - sparsity))


def mean_interval(
    values: Float[np.ndarray, "n"],
    groups: np.ndarray,
    relative_to: Float[np.ndarray, "n"] | None = None,
    *,
    key: PRNGKeyArray,
) -> Interval:
    """The mean of `values`, or its ratio to the mean of `relative_to`, with an interval from resampling whole groups:
    neighbouring tokens are not independent."""
    _, number = np.unique(groups, return_inverse=True)
    below = np.bincount(number, weights=relative_to)
    above = np.bincount(number, weights=np.asarray(values, np.float64))
    counts = bootstrap_counts(len(above), 500, key=key).astype(np.float64)
    return bootstrap_interval(above.sum() / below.sum(), (counts @ above) / (counts @ below))


def _ica(layer: rs.FunctionLayer, x: Float[np.ndarray, "n d"], seed: int):
    """ICA's basis; where FastICA diverges, as it may with few examples a dimension, the principal axes it starts from,
    with a message."""
    try:
        return rs.baselines.ica(layer, x, seed=seed).r_in
    except np.linalg.LinAlgError as error:
        print(f"FastICA diverged ({error}): principal axes stand in for ICA")
        return rs.baselines.pca(layer, x).r_in


def _kth_largest(square, count):
    d = square.shape[1]
    return np.partition(square, d - count, axis=1)[:, d - count, None]


def _polar(a):
    left, _, right = np.linalg.svd(a.astype(np.float64))
    return (left @ right).astype(a.dtype)
