"""`compare`: one table of all metrics for all bases, on the same held-out examples and the same resamples of them."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray
from rich.table import Table

from rotsparse._core.checks import activations
from rotsparse._core.intervals import Interval, bootstrap_counts, bootstrap_interval
from rotsparse._core.types import Data, Rows
from rotsparse.data.scales import Scale, covariance_of
from rotsparse.evaluation import baselines, tables
from rotsparse.evaluation.concentration import Concentration
from rotsparse.evaluation.curves import Curves
from rotsparse.evaluation.metrics import examine
from rotsparse.evaluation.names import HIGHER_IS_SPARSER
from rotsparse.evaluation.units import Matrix, MatrixOut, units_of
from rotsparse.layers.base import Layer
from rotsparse.layers.jacobians import LayerStatistics, jacobian_gram, jacobians
from rotsparse.layers.rotations import Rotations, checked
from rotsparse.objectives.jacobian import output_covariance
from rotsparse.objectives.measures import GemanMcClure, Measure


@dataclass(frozen=True)
class Comparison:
    """Metrics of several bases: `metrics[basis][metric]` is an `Interval`. Every basis has the same metrics.

    `concentration[basis]`: what share of the energy a single row, column, entry or example holds; where it is large,
    the metrics that use one rms for all entries mislead. `curves[basis]`: shares of small entries for every threshold,
    and the energy in every number of entries.
    """

    metrics: dict[str, dict[str, Interval]]
    concentration: dict[str, Concentration] = field(default_factory=dict)
    curves: dict[str, Curves] = field(default_factory=dict)

    def best(self, metric: str) -> str:
        """The basis that is sparsest by that metric (the first in a tie). Raises `ValueError` for an unknown metric."""
        return self.best_of(metric, list(self.metrics))

    def to_json(self) -> dict[str, dict[str, Any]]:
        """`{"metrics": {basis: {metric: {"value", "low", "high"}}}, "concentration": {basis: ...}, "curves": ...}`,
        ready for `json.dump`."""
        return {
            "metrics": {basis: {name: m._asdict() for name, m in of.items()} for basis, of in self.metrics.items()},
            "concentration": {basis: of._asdict() for basis, of in self.concentration.items()},
            "curves": {basis: of._asdict() for basis, of in self.curves.items()},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Comparison":
        """What `to_json` wrote; JSON has null for NaN. Raises `KeyError` or `TypeError` for anything else."""
        number = lambda of: {name: math.nan if v is None else v for name, v in of.items()}  # noqa: E731
        metrics = {b: {name: Interval(**number(m)) for name, m in of.items()} for b, of in content["metrics"].items()}
        shares = {basis: Concentration(**number(of)) for basis, of in content["concentration"].items()}
        lines = {b: Curves(**{name: tuple(v) for name, v in of.items()}) for b, of in content["curves"].items()}
        return cls(metrics, shares, lines)

    def table(self, title: str | None = None, *, seconds: dict[str, float] | None = None) -> Table:
        """A rich table (see `tables.rich_table`)."""
        return tables.rich_table(self.metrics, concentration=self.concentration, title=title, seconds=seconds)

    def markdown(self, *, seconds: dict[str, float] | None = None) -> str:
        """The same table in Markdown, with half the widths of the intervals."""
        return tables.markdown_table(self.metrics, concentration=self.concentration, seconds=seconds)

    @property
    def names(self) -> list[str]:
        """The metrics' names."""
        return list(next(iter(self.metrics.values())))

    def best_of(self, metric: str, bases: Sequence[str]) -> str:
        """The sparsest of some bases by that metric (the first in a tie). Raises `ValueError` for an unknown metric."""
        if metric not in self.names:
            raise ValueError(f"unknown metric {metric!r}: expected one of {', '.join(self.names)}")
        sign = 1 if HIGHER_IS_SPARSER[metric] else -1
        return max(bases, key=lambda basis: sign * self.metrics[basis][metric].value)


def compare(
    layer: Layer,
    x_test: Rows,
    bases: dict[str, Rotations],
    *,
    scale_inputs: Scale = True,
    scale_outputs: Scale = False,
    covariance: Matrix | None = None,
    covariance_out: MatrixOut | None = None,
    key: PRNGKeyArray,
    resamples: int = 200,
    shown: Callable[[str], None] = lambda name: None,
) -> Comparison:
    """All metrics of `metrics.evaluate` for every basis on held-out `x_test`, how concentrated the energy is, whole
    curves, and, for raw Jacobians, `gap_closed`:

        (mean S of a random basis - mean S of this basis) / (mean S of a random basis - floor)

    0 is what a Haar basis (drawn here) gives, and 1 the floor `E Σ_i S(σ_i(J)) / (d_out d_in)`, which no rotations
    can get below, since S is concave in z². S is `GemanMcClure(eps=0.1)` of `z / rms(Z)`: a measure other than the
    default of a fit, because here it evaluates. Scaled Jacobians have no such floor and the metric is left out.
    The floor costs one singular value decomposition an example.

    Options are as in `metrics.evaluate`; `shown` is told which basis comes next.

    Raises `ValueError` where there are no bases, or shapes do not fit.
    """
    if not bases:
        raise ValueError("compare needs at least one basis, got none")
    bases = {name: checked(f"bases[{name!r}]", r) for name, r in bases.items()}
    x = activations("x_test", x_test, layer.d_in)
    gram = jacobian_gram(layer, x)
    if scale_inputs and covariance is None:
        covariance = covariance_of(scale_inputs, x)
    if scale_outputs and covariance_out is None:
        covariance_out = output_covariance(layer, x, scale_outputs)
    options: dict[str, Any] = {
        "scale_inputs": scale_inputs,
        "scale_outputs": scale_outputs,
        "covariance": covariance,
        "covariance_out": covariance_out,
        "gram": gram,
    }
    found = {}
    for name, r in bases.items():
        shown(name)
        found[name] = examine(layer, x, r, **options, key=key, resamples=resamples)
    metrics = {name: of.metrics for name, of in found.items()}
    if not (scale_inputs or scale_outputs):
        rms = float(np.sqrt(np.trace(gram) / (layer.d_in * layer.d_out)))
        counts = bootstrap_counts(len(x), resamples, key=key)
        gaps = _gaps_closed(layer, x, bases, GemanMcClure(eps=0.1), rms, counts, key=jax.random.fold_in(key, 1))
        metrics = {name: of | {"gap_closed": gaps[name]} for name, of in metrics.items()}
    return Comparison(
        metrics,
        {name: of.concentration for name, of in found.items()},
        {name: of.curves for name, of in found.items()},
    )


def compare_with_baselines(
    layer: Layer,
    train: Rows,
    test: Float[Data, "m d"],
    given: dict[str, Rotations],
    *,
    keys: tuple[PRNGKeyArray, PRNGKeyArray],
    scale_inputs: Scale = True,
    scale_outputs: Scale = False,
    seconds: dict[str, float] | None = None,
    shown: Callable[[str], None] = lambda name: None,
) -> tuple[Comparison, dict[str, Rotations]]:
    """`compare` the given bases and every baseline, fitted on `train`, on the held-out `test`; and all these bases.

    The covariances that scale inputs and outputs are those of `train`. `keys`: for the baselines, and for the
    resamples. With `seconds`, each baseline is computed by itself, and what it took is noted there. `shown` is told
    what comes next.
    """
    if seconds is None:
        bases = given | baselines.all_baselines(
            layer, train, key=keys[0], shown=lambda name: shown(f"the basis {name}")
        )
    else:
        bases = dict(given)
        for name, compute in baselines.methods(layer, key=keys[0]).items():
            begun = time.perf_counter()
            bases[name] = compute(LayerStatistics(layer, train))
            seconds[name] = time.perf_counter() - begun
    units = units_of(layer, train, scale_inputs=scale_inputs, scale_outputs=scale_outputs)
    made = compare(layer, test, bases, **units, key=keys[1], shown=lambda name: shown(f"the metrics of {name}"))
    return made, bases


def _gaps_closed(layer, x, bases, measure, rms, counts, *, key) -> dict[str, Interval]:
    haar = Rotations.haar(key, layer.d_in, layer.d_out)
    random = _measure_of_examples(layer, x, haar, measure, rms)
    gap = random - _floor_of_examples(layer, x, measure, rms)
    gaps = {}
    for name, rotations in bases.items():
        closed = random - _measure_of_examples(layer, x, rotations, measure, rms)
        gaps[name] = bootstrap_interval(closed.mean() / gap.mean(), (counts @ closed) / (counts @ gap))
    return gaps


def _measure_of_examples(layer, x, rotations, measure: Measure, rms: float) -> Float[np.ndarray, "n"]:
    """`mean_oi S(z_oi / rms)` of every example."""
    scaled = rotations.r_in / rms
    parts = [_mean_measure(measure, z) for z in jacobians(layer, x, scaled, rotations.r_out)]
    return np.concatenate(parts).astype(np.float64)


def _floor_of_examples(layer, x, measure: Measure, rms: float) -> Float[np.ndarray, "n"]:
    """`Σ_i S(σ_i / rms) / (d_out d_in)` of every example."""
    singular = [np.linalg.svd(j, compute_uv=False) for j in jacobians(layer, x)]
    values = np.concatenate([np.asarray(measure(jnp.asarray(s / rms)), np.float64) for s in singular])
    return values.sum(axis=1) / (layer.d_in * layer.d_out)


@eqx.filter_jit
def _mean_measure(measure, z):
    return measure.example_value(z)
