"""Bases for sparse activations, shared by the experiments on language models: every method that is compared, and ours.

Ours minimises the energy that is lost when each example keeps the larger half of its coordinates (`rs.find_basis`).
Everything is chosen on held-out activations of the kind it was fitted on, by that energy, never by the network's loss.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray

import rotsparse as rs
from rotsparse import models
from rotsparse._core.intervals import Interval, bootstrap_counts, bootstrap_interval
from rotsparse.evaluation.substitution import KeepAbove, KeepLargest, substitution

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
    batch: int
    ica_examples: int = 10_000
    """What ICA is fitted on: its time grows with them."""


def fit(
    x: Float[np.ndarray, "n d"], held_out: Float[np.ndarray, "m d"], effort: Effort, *, key: PRNGKeyArray
) -> tuple[dict[str, Matrix], dict[str, Any]]:
    """The basis of every method for the activations `x`, and the energy that each loses on the held-out ones."""
    d = x.shape[1]
    keys = jax.random.split(key, 5)
    # The baselines rotate both sides of a layer; one output is none to speak of.
    inputs_only = rs.FunctionLayer(function=lambda v: v[:1], d_in=d, d_out=1)
    sample = x[np.asarray(jax.random.permutation(keys[3], len(x)))[: effort.ica_examples]]
    haar = rs.baselines.haar(inputs_only, x, key=keys[1]).r_in

    def sparsest(measure, key):
        objective, start = rs.ActivationSparsity(x, measure), {"in": jnp.asarray(haar)}
        return rs.minimize(objective, start, method=rs.FixedPointNewton(), key=key).completed().bases["in"]

    found = {
        "none": np.eye(d, dtype=np.float32),
        "haar": haar,
        "pca": rs.baselines.pca_uncentred(inputs_only, x).r_in,
        "l4": sparsest(rs.L4(), keys[2]),
        "ica": rs.baselines.ica(inputs_only, sample, seed=int(jax.random.bits(keys[3], (), "uint16"))).r_in,
        "log": sparsest(rs.Log(0.3), keys[4]),
    }
    bases = {name: np.asarray(r) for name, r in found.items()}
    measure = rs.TopK(0.5)
    method = rs.default_basis_method(measure, steps=effort.steps, batch_size=effort.batch)
    solution = rs.find_basis(x, validation=held_out, key=keys[0], measure=measure, method=method).completed()
    bases["ours"] = np.asarray(solution.bases["x"])
    lost = {name: substitution(held_out, r, KeepLargest(d // 2)).energy_lost for name, r in bases.items()}
    return bases, {"energy_lost": lost, "reached": {stage.name: stage.value for stage in solution.stages}}


@eqx.filter_jit
def captured(params, config, tokens, points: tuple[tuple[int, str], ...]) -> list[Float[jax.Array, "b t d"]]:
    """What a model's activations are at some points `(layer, name)`."""
    seen = models.run(params, config, tokens, capture=points)[1]
    return [seen[point] for point in points]


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
