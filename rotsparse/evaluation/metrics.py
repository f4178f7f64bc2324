"""Metrics: how sparse the rotated Jacobians of held-out examples are. Reported, never optimised.

Each is a number a reader can understand without the objective, with a 95% bootstrap interval over examples. Examples
stream through, twice: memory is one chunk of Jacobians and their sum, however many examples and resamples there are.
"""

import math

import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from rotsparse._core.checks import activations, weight
from rotsparse._core.intervals import Interval, bootstrap_counts, bootstrap_interval
from rotsparse._core.types import Rows
from rotsparse.data.moments import covariance as input_covariance
from rotsparse.layers.base import Layer
from rotsparse.layers.jacobians import jacobian_gram, jacobians
from rotsparse.layers.rotations import Rotations, checked

Matrix = Float[Array, "d d"] | Float[np.ndarray, "d d"]

# `gap_closed` is computed by `compare`, which has the random basis and the floor at hand.
HIGHER_IS_SPARSER: dict[str, bool] = {
    "edges_90": False,
    "edges_99": False,
    "fraction_below_0.1_rms": True,
    "hoyer": True,
    "gini": True,
    "participation_ratio": False,
    "top_1_percent_energy": True,
    "top_5_percent_energy": True,
    "gap_closed": True,
}


def evaluate(
    layer: Layer,
    x: Rows,
    rotations: Rotations,
    *,
    scale_inputs: bool = True,
    covariance: Matrix | None = None,
    gram: Matrix | None = None,
    key: PRNGKeyArray,
    resamples: int = 200,
) -> dict[str, Interval]:
    """The metrics of `Z = R_out J(x) R_inᵀ` on held-out `x` (`[n, d_in]`), N entries an example:

    - `edges_90`, `edges_99`: how many entries of the mean squared Jacobian `E[Z²]` hold 90% (99%) of its sum;
    - `fraction_below_0.1_rms`: share of all entries with `|z| < 0.1 rms(Z)`, the rms over all entries and examples;
    - `hoyer`: mean over examples of `(√N - ‖z‖₁/‖z‖₂)/(√N - 1)`, 0 (all equal) to 1 (one entry) (Hoyer 2004);
    - `gini`: mean Gini index of `|z|`, 0 to 1 (Hurley & Rickard, "Comparing Measures of Sparsity", 2009);
    - `participation_ratio`: mean of `(Σz²)²/Σz⁴`, an effective number of entries, 1 to N;
    - `top_1_percent_energy`, `top_5_percent_energy`: mean share of `Σz²` in an example's largest 1% (5%).

    Averages over examples leave out those whose Jacobian is zero: they have no direction to be sparse in.

    With `scale_inputs`, the default as in a fit, entry (o, i) of `Z` is multiplied by `√(r_i Σ r_iᵀ)`, the standard
    deviation of rotated input i. `covariance` is Σ, best that of the training inputs; without it that of `x` is taken.
    `gram` is `E[JᵀJ]` over `x` (`statistics.jacobian_gram`), to save a pass over the examples where several bases are
    evaluated. The same `key` gives the same resamples of the examples, for every basis.

    Raises `ValueError` where shapes do not fit, or the Jacobian is zero for every example.
    """
    x, rotations = activations("x", x, layer.d_in), checked("rotations", rotations)
    r_in = _sized("r_in", rotations.r_in, layer.d_in)
    r_out = _sized("r_out", rotations.r_out, layer.d_out)
    if scale_inputs:
        sigma = input_covariance(x)[1] if covariance is None else _sized("covariance", covariance, layer.d_in)
        r_in = r_in * np.sqrt(np.maximum(np.einsum("id,de,ie->i", r_in, sigma, r_in, optimize=True), 0))[:, None]
    # ‖Z‖_F² = Σ_i r_i JᵀJ r_iᵀ, whatever R_out: the rms needs no pass of its own.
    jtj = jacobian_gram(layer, x) if gram is None else _sized("gram", gram, layer.d_in)
    entries = layer.d_in * layer.d_out
    rms = math.sqrt(max(np.einsum("id,de,ie->", r_in, jtj, r_in, optimize=True), 0) / entries)
    if rms == 0:
        raise ValueError("the layer's Jacobian is zero for every example: nothing moves, so nothing can be sparse")

    counts = bootstrap_counts(len(x), resamples, key=key)

    def normalised():
        for z in jacobians(layer, x, r_in, r_out):
            yield np.abs(z.reshape(len(z), entries)) / z.dtype.type(rms)

    per_example: list[dict[str, np.ndarray]] = []
    mean_square = np.zeros(entries)
    for z in normalised():
        square = np.square(z)
        per_example.append(_example_metrics(z, square))
        mean_square += square.sum(axis=0, dtype=np.float64) / len(x)

    holding = {"edges_90": _Holding(mean_square, 0.9), "edges_99": _Holding(mean_square, 0.99)}
    influences = [[h.influence(square) for h in holding.values()] for square in map(np.square, normalised())]
    results = {}
    for (name, h), influence in zip(holding.items(), map(np.concatenate, zip(*influences, strict=True)), strict=True):
        results[name] = bootstrap_interval(h.count, h.count + counts @ influence / len(x))
    for name in per_example[0]:
        results[name] = _mean(np.concatenate([m[name] for m in per_example]), counts)
    return results


class _Holding:
    """The fewest entries that hold a share of the mean square, and how far each example moves their number.

    Resampling would need a matrix of entries for every resample. To first order it needs one number an example: with
    m the mean squares, M their sum and t the smallest that counts, a change δ of m leaves the counted ones
    `share Σδ - Σ_counted δ` short of their share, and `1/t` times as many entries make up for it. (The influence
    function of the count: Hampel, "The Influence Curve and its Role in Robust Estimation", 1974.)
    """

    def __init__(self, mean_square: Float[np.ndarray, "N"], share: float):
        order = np.argsort(-mean_square, kind="stable")
        cumulative = np.cumsum(mean_square[order])
        self.count = int(np.searchsorted(cumulative, share * cumulative[-1])) + 1
        self.smallest = mean_square[order[self.count - 1]]
        self.weights = np.full(len(mean_square), share, np.float32)
        self.weights[order[: self.count]] -= 1

    def influence(self, square: Float[np.ndarray, "n N"]) -> Float[np.ndarray, "n"]:
        """By how many entries the count would grow, times n, if each of these examples had twice its weight."""
        return (square @ self.weights).astype(np.float64) / self.smallest


def _example_metrics(z: Float[np.ndarray, "n N"], square: Float[np.ndarray, "n N"]) -> dict[str, np.ndarray]:
    """Metrics of each example from its |z|, in units of the rms, and z². NaN where they are not defined."""
    entries = z.shape[1]
    rank = np.arange(1, entries + 1)
    ordered = np.sort(z, axis=1)
    energy = square.sum(axis=1, dtype=np.float64)
    length = z.sum(axis=1, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        top = {p: np.square(ordered[:, -math.ceil(p / 100 * entries) :]).sum(axis=1) / energy for p in (1, 5)}
        return {
            "fraction_below_0.1_rms": np.count_nonzero(z < 0.1, axis=1) / entries,
            "hoyer": (math.sqrt(entries) - length / np.sqrt(energy)) / (math.sqrt(entries) - 1),
            "gini": ordered @ ((2 * rank - entries - 1) / entries).astype(z.dtype) / length,
            "participation_ratio": np.square(energy) / np.square(square).sum(axis=1, dtype=np.float64),
            "top_1_percent_energy": top[1],
            "top_5_percent_energy": top[5],
        }


def _mean(values: Float[np.ndarray, "n"], counts) -> Interval:
    """Mean over the examples where the metric is defined, resampled by `counts`."""
    defined = np.isfinite(values)
    counts = counts[:, defined]
    total = counts.sum(axis=1)
    resampled = (counts @ values[defined])[total > 0] / total[total > 0]
    return bootstrap_interval(values[defined].mean(), resampled)


def _sized(name: str, value, d: int) -> Float[np.ndarray, "d d"]:
    return np.asarray(weight(name, value, (d, d)), np.float64)
