"""Metrics: how sparse the rotated Jacobians of held-out examples are. Reported, never optimised.

Each is a number a reader can understand without the objective, with a 95% bootstrap interval over examples. Examples
stream through, twice: memory is one chunk of Jacobians and their sum, however many examples and resamples there are.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, PRNGKeyArray

from rotsparse._core.checks import activations
from rotsparse._core.intervals import Interval, bootstrap_counts, bootstrap_interval
from rotsparse._core.threads import in_threads
from rotsparse._core.types import Rows
from rotsparse.data.scales import Scale
from rotsparse.evaluation.concentration import Concentration, concentration, without_top
from rotsparse.evaluation.curves import THRESHOLDS, Curves, count_below, count_below_each, curves
from rotsparse.evaluation.names import HIGHER_IS_SPARSER
from rotsparse.evaluation.units import Matrix, MatrixOut, scaled_rows, sized
from rotsparse.layers.base import Layer
from rotsparse.layers.jacobians import jacobian_gram, jacobians
from rotsparse.layers.rotations import Rotations, checked

# A row, a column or a rest with a smaller rms than this, in units of the rms of all entries, has no influence: rounding
# errors of float32 are as large.
NO_INFLUENCE = 1e-5

# Jacobians that take no more memory than this are computed once, not twice.
_KEPT_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Evaluation:
    """What one basis leaves of the Jacobians of held-out examples: its metrics, how concentrated the energy is, and the
    curves of which the metrics are single points."""

    metrics: dict[str, Interval]
    concentration: Concentration
    curves: Curves


def evaluate(
    layer: Layer,
    x: Rows,
    rotations: Rotations,
    *,
    scale_inputs: Scale = True,
    scale_outputs: Scale = False,
    covariance: Matrix | None = None,
    covariance_out: MatrixOut | None = None,
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

    Edges and small entries are measured against the energy of all entries. Where one row or column holds most of it,
    they say nothing about the others; these do:

    - `edges_99_by_row` (`by_column`): edges needed where every row (column) keeps 99% of its own energy;
    - `small_by_row` (`by_column`): share of entries below 0.1 of the rms of their own row (column), over all examples;
    - `edges_99_without_top`, `small_without_top`: edges and small entries of what remains, measured by its own energy
      and rms, after the strongest 1% of rows and of columns (`concentration.without_top`) are taken out.

    Rows (columns) with an rms below 1e-5 of that of all entries have no influence and are left out: that they are zero
    is no evidence that the others are sparse. Where nothing remains without the top, all of it is small: 0 edges.
    The top and each rms are those of `x`, also in the resamples.

    Averages over examples leave out those whose Jacobian is zero: they have no direction to be sparse in.

    With `scale_inputs`, the default as in a fit, entry (o, i) of `Z` is multiplied by `√(r_i Σ r_iᵀ)`, the standard
    deviation of rotated input i. `covariance` is Σ, best that of the training inputs; without it that of `x` is taken.
    With `scale_outputs` it is also divided by that of rotated output o, `√(r_o Σ_y r_oᵀ)` (the variance is floored as
    in a fit): entries then have no unit. `covariance_out` is Σ_y, best that of the outputs on the training inputs. The
    rms takes a pass of its own then.
    `gram` is `E[JᵀJ]` over `x` (`statistics.jacobian_gram`), to save a pass over the examples where several bases are
    evaluated. The same `key` gives the same resamples of the examples, for every basis.

    Raises `ValueError` where shapes do not fit, the Jacobian is zero for every example, or outputs that should be
    scaled do not vary.
    """
    return examine(
        layer,
        x,
        rotations,
        scale_inputs=scale_inputs,
        scale_outputs=scale_outputs,
        covariance=covariance,
        covariance_out=covariance_out,
        gram=gram,
        key=key,
        resamples=resamples,
    ).metrics


def examine(
    layer: Layer,
    x: Rows,
    rotations: Rotations,
    *,
    scale_inputs: Scale = True,
    scale_outputs: Scale = False,
    covariance: Matrix | None = None,
    covariance_out: MatrixOut | None = None,
    gram: Matrix | None = None,
    key: PRNGKeyArray,
    resamples: int = 200,
) -> Evaluation:
    """`evaluate`, with the concentration and the curves, which the same passes over the examples give."""
    x, rotations = activations("x", x, layer.d_in), checked("rotations", rotations)
    r_in, r_out = scaled_rows(
        layer,
        x,
        rotations.r_in,
        rotations.r_out,
        scale_inputs=scale_inputs,
        scale_outputs=scale_outputs,
        covariance=covariance,
        covariance_out=covariance_out,
    )
    entries = layer.d_in * layer.d_out
    if scale_outputs:
        mean = sum(np.square(z, dtype=np.float64).sum() for z in jacobians(layer, x, r_in, r_out)) / len(x)
    else:
        # ‖Z‖_F² = Σ_i r_i JᵀJ r_iᵀ, whatever R_out: the rms needs no pass of its own.
        jtj = jacobian_gram(layer, x) if gram is None else sized("gram", gram, layer.d_in)
        mean = np.einsum("id,de,ie->", r_in, jtj, r_in, optimize=True)
    rms = math.sqrt(max(mean, 0) / entries)
    if rms == 0:
        raise ValueError("the layer's Jacobian is zero for every example: nothing moves, so nothing can be sparse")

    counts = bootstrap_counts(len(x), resamples, key=key)

    few = 4 * entries * len(x) <= _KEPT_BYTES
    first_pass: list[np.ndarray] = []  # for the second one, if they are few

    def normalised():
        if first_pass:
            yield from first_pass
            return
        computed = []
        for z in jacobians(layer, x, r_in, r_out):
            z = np.abs(z.reshape(len(z), entries)) / z.dtype.type(rms)
            if few:
                computed.append(z)
            yield z
        first_pass.extend(computed)

    def first(z):
        square, ordered = np.square(z), np.sort(z, axis=1)
        return _example_metrics(z, square, ordered), square.sum(axis=0, dtype=np.float64), count_below(ordered)

    per_example: list[dict[str, np.ndarray]] = []
    mean_square, below = np.zeros(entries), np.zeros(len(THRESHOLDS), np.int64)
    for of_examples, squares, counted in in_threads(first, normalised()):
        per_example.append(of_examples)
        mean_square += squares / len(x)
        below += counted
    energy = np.concatenate([of.pop("energy") for of in per_example])

    mean_square = mean_square.reshape(layer.d_out, layer.d_in)
    kept = np.ix_(*without_top(mean_square))
    holding = {
        "edges_90": _Holding(mean_square.reshape(1, -1), 0.9),
        "edges_99": _Holding(mean_square.reshape(1, -1), 0.99),
        "edges_99_by_row": _Holding(mean_square, 0.99),
        "edges_99_by_column": _Holding(mean_square.T, 0.99).transposed(),
        "edges_99_without_top": _Holding(mean_square[kept].reshape(1, -1), 0.99).within(mean_square.shape, kept),
    }
    units = {
        "small_by_row": _Units.of_groups(mean_square, axis=1),
        "small_by_column": _Units.of_groups(mean_square, axis=0),
        "small_without_top": _Units.of_part(mean_square, kept),
    }

    def second(z):
        square = np.square(z)
        influence = {name: h.influence(square) for name, h in holding.items()}
        small = {name: unit.share_small(z) for name, unit in units.items()}
        return influence, small, count_below_each(z, units["small_by_row"].rms)

    influences: dict[str, list[np.ndarray]] = {name: [] for name in holding}
    small: dict[str, list[np.ndarray]] = {name: [] for name in units}
    below_by_row = np.zeros(len(THRESHOLDS), np.int64)
    for influence, share, counted in in_threads(second, normalised()):
        for name, values in influence.items():
            influences[name].append(values)
        for name, values in share.items():
            small[name].append(values)
        below_by_row += counted
    results = {}
    for name, h in holding.items():
        results[name] = bootstrap_interval(h.count, h.count + counts @ np.concatenate(influences[name]) / len(x))
    for name in units:
        results[name] = _mean(np.concatenate(small[name]), counts)
    for name in per_example[0]:
        results[name] = _mean(np.concatenate([m[name] for m in per_example]), counts)
    return Evaluation(
        {name: results[name] for name in HIGHER_IS_SPARSER if name in results},
        concentration(mean_square, energy),
        curves(mean_square, below / (entries * len(x)), below_by_row / (units["small_by_row"].entries * len(x))),
    )


class _Holding:
    """The fewest entries of every row of `mean_square` that hold a share of its sum, and how far each example moves
    their number. (A single row for all entries; rows without influence need none.)

    Resampling would need a matrix of entries for every resample. To first order it needs one number an example: with
    m the mean squares of a row, M their sum and t the smallest that counts, a change δ of m leaves the counted ones
    `share Σδ - Σ_counted δ` short of their share, and `1/t` times as many entries make up for it. (The influence
    function of the count: Hampel, "The Influence Curve and its Role in Robust Estimation", 1974.)
    """

    def __init__(self, mean_square: Float[np.ndarray, "g k"], share: float):
        order = np.argsort(-mean_square, axis=1, kind="stable")
        ordered = np.take_along_axis(mean_square, order, axis=1)
        cumulative = np.cumsum(ordered, axis=1)
        counts = np.count_nonzero(cumulative < share * cumulative[:, -1:], axis=1) + 1
        smallest = np.take_along_axis(ordered, counts[:, None] - 1, axis=1)
        matters = _rms(mean_square, axis=1) > NO_INFLUENCE
        self.count = int(counts[matters].sum())
        # Weights are in units of one over the smallest of the first row that matters.
        self.smallest = smallest[np.argmax(matters), 0] if matters.any() else 1.0
        counted = (np.arange(ordered.shape[1]) < counts[:, None]).astype(np.float32)
        if len(mean_square) > 1:
            # In a short row the last entry is more than what the share lacks: of it, only that part counts.
            held = np.take_along_axis(cumulative, counts[:, None] - 1, axis=1)
            surplus = (held - share * cumulative[:, -1:]) / np.where(smallest > 0, smallest, 1)
            np.put_along_axis(counted, counts[:, None] - 1, (1 - surplus).astype(np.float32), axis=1)
        left_out = np.full(ordered.shape, share, np.float32) - counted
        left_out[matters] *= (self.smallest / smallest[matters]).astype(np.float32)
        left_out[~matters] = 0
        self.weights = np.empty_like(left_out)
        np.put_along_axis(self.weights, order, left_out, axis=1)

    def transposed(self) -> "_Holding":
        """The same after `mean_square` was transposed."""
        self.weights = self.weights.T
        return self

    def within(self, shape: tuple[int, int], part) -> "_Holding":
        """The same where `mean_square` was a part of a matrix of this shape."""
        whole = np.zeros(shape, np.float32)
        whole[part] = self.weights.reshape(whole[part].shape)
        self.weights = whole
        return self

    def influence(self, square: Float[np.ndarray, "n N"]) -> Float[np.ndarray, "n"]:
        """By how many entries the count would grow, times n, if each of these examples had twice its weight."""
        return (square @ self.weights.ravel()).astype(np.float64) / self.smallest


@dataclass(frozen=True)
class _Units:
    """The rms that each entry is measured by, zero for entries that do not count, and how many do."""

    rms: Float[np.ndarray, "N"]
    entries: int

    @classmethod
    def of_groups(cls, mean_square: Float[np.ndarray, "d_out d_in"], axis: int) -> "_Units":
        """The rms along an axis, for every row or column that has influence."""
        rms = _rms(mean_square, axis=axis, keepdims=True)
        rms = np.broadcast_to(np.where(rms > NO_INFLUENCE, rms, 0), mean_square.shape)
        return cls(rms.ravel(), int(np.count_nonzero(rms)))

    @classmethod
    def of_part(cls, mean_square: Float[np.ndarray, "d_out d_in"], part) -> "_Units":
        """The rms of a part of the entries. If that has no influence, all of it is small."""
        rms, own = np.zeros(mean_square.shape), float(_rms(mean_square[part]))
        rms[part] = own if own > NO_INFLUENCE else np.inf
        return cls(rms.ravel(), int(np.count_nonzero(rms)))

    def share_small(self, z: Float[np.ndarray, "n N"]) -> Float[np.ndarray, "n"]:
        """The share of each example's entries that are below 0.1 of their rms."""
        return np.count_nonzero(z < (0.1 * self.rms).astype(z.dtype), axis=1) / self.entries


def _rms(mean_square, **axis):
    return np.sqrt(mean_square.mean(**axis))


def _example_metrics(
    z: Float[np.ndarray, "n N"], square: Float[np.ndarray, "n N"], ordered: Float[np.ndarray, "n N"]
) -> dict[str, np.ndarray]:
    """Metrics of each example, and its energy, from its |z| in units of the rms, z², and |z| in ascending order. NaN
    where they are not defined."""
    entries = z.shape[1]
    rank = np.arange(1, entries + 1)
    energy = square.sum(axis=1, dtype=np.float64)
    length = z.sum(axis=1, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        top = {p: np.square(ordered[:, -math.ceil(p / 100 * entries) :]).sum(axis=1) / energy for p in (1, 5)}
        return {
            "energy": energy,
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
