"""`compare`: one table of all metrics for all bases, on the same held-out examples and the same resamples of them."""

from collections import defaultdict
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray
from rich import box
from rich.table import Table
from rich.text import Text

from rotsparse._core.checks import activations
from rotsparse._core.intervals import Interval, bootstrap_counts, bootstrap_interval
from rotsparse._core.printable import markdown, visible
from rotsparse._core.types import Rows
from rotsparse.data.moments import covariance as input_covariance
from rotsparse.evaluation.metrics import HIGHER_IS_SPARSER, Matrix, evaluate
from rotsparse.layers.base import Layer
from rotsparse.layers.jacobians import jacobian_gram, jacobians
from rotsparse.layers.rotations import Rotations, checked
from rotsparse.objectives.measures import GemanMcClure, Measure

LABELS: dict[str, str] = {
    "edges_90": "edges@90",
    "edges_99": "edges@99",
    "fraction_below_0.1_rms": "<0.1 rms",
    "hoyer": "Hoyer",
    "gini": "Gini",
    "participation_ratio": "particip.",
    "top_1_percent_energy": "top 1%",
    "top_5_percent_energy": "top 5%",
    "gap_closed": "gap closed",
}


@dataclass(frozen=True)
class Comparison:
    """Metrics of several bases: `metrics[basis][metric]` is an `Interval`. Every basis has the same metrics."""

    metrics: dict[str, dict[str, Interval]]

    def best(self, metric: str) -> str:
        """The basis that is sparsest by that metric (the first in a tie). Raises `ValueError` for an unknown metric."""
        return self._best(metric, list(self.metrics))

    def to_json(self) -> dict[str, dict[str, dict[str, float]]]:
        """`{basis: {metric: {"value", "low", "high"}}}`, ready for `json.dump`."""
        return {basis: {name: m._asdict() for name, m in of.items()} for basis, of in self.metrics.items()}

    def table(self, title: str | None = None, *, seconds: dict[str, float] | None = None) -> Table:
        """A rich table that fits 80 columns, a basis a row. Green is the best of each column (bold) and every other one
        whose interval overlaps the best's. `seconds`: what each basis took to fit, for a last column."""
        table = Table(title=title, box=box.SIMPLE_HEAD, caption="↑ higher is sparser, ↓ lower is sparser", padding=0)
        table.add_column("basis")
        for name in self._names():
            table.add_column(heading(name).replace(" ", "\n", 1), justify="right", no_wrap=True)
        if seconds is not None:
            table.add_column("fit\ns", justify="right", no_wrap=True)
        for basis, of in self.metrics.items():
            cells = []
            for name, m in of.items():
                best = self.best(name)
                style = "bold green" if best == basis else "green" if m.overlaps(self.metrics[best][name]) else ""
                cells.append(Text(number(name, m.value), style))
            cells += [] if seconds is None else [Text(f"{seconds[basis]:.1f}")]
            table.add_row(Text(visible(basis.replace("_", " "))), *cells)
        return table

    def markdown(self, *, seconds: dict[str, float] | None = None) -> str:
        """The same table in Markdown with half the widths of the intervals, the best of every column in bold."""
        names = self._names()
        best = {name: self.best(name) for name in names}
        headings = [heading(name) for name in names] + ([] if seconds is None else ["fit, s"])
        lines = ["| basis | " + " | ".join(headings) + " |", "|---|" + "---:|" * len(headings)]
        for basis, of in self.metrics.items():
            cells = [shown(name, m, bold=best[name] == basis) for name, m in of.items()]
            cells += [] if seconds is None else [f"{seconds[basis]:.1f}"]
            lines.append(f"| {markdown(basis)} | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"

    def verdict(self, learned: str = "learned") -> str:
        """One sentence: on which metrics the learned basis beats every other one, and on which it does not.

        Raises `ValueError` where there is no basis of that name, or nothing to compare it with.
        """
        rivals = [basis for basis in self.metrics if basis != learned]
        if learned not in self.metrics or not rivals:
            raise ValueError(f"expected {learned!r} and at least one other basis, got {', '.join(self.metrics)}")
        clear, close, behind = [], defaultdict(list), defaultdict(list)
        for name in self._names():
            rival = self._best(name, rivals)
            ours, theirs = self.metrics[learned][name], self.metrics[rival][name]
            if self._best(name, [rival, learned]) == rival:
                behind[rival].append(LABELS[name])
            elif ours.overlaps(theirs):
                close[rival].append(LABELS[name])
            else:
                clear.append(LABELS[name])
        total = len(self._names())
        if len(clear) == total:
            return (
                f"On held-out examples {learned} is sparser than every baseline on all {total} metrics, "
                "beyond the 95% intervals."
            )
        parts = [f"sparser than every baseline on {len(clear)} of {total} metrics"]
        parts[0] += f" ({', '.join(clear)})" if clear else ""
        parts += [f"ahead of {rival} within the 95% intervals on {', '.join(names)}" for rival, names in close.items()]
        parts += [f"not ahead of {rival} on {', '.join(names)}" for rival, names in behind.items()]
        return f"On held-out examples {learned} is {'; '.join(parts)}".rstrip(".") + "."

    def _names(self) -> list[str]:
        return list(next(iter(self.metrics.values())))

    def _best(self, metric: str, bases: list[str]) -> str:
        if metric not in self._names():
            raise ValueError(f"unknown metric {metric!r}: expected one of {', '.join(self._names())}")
        sign = 1 if HIGHER_IS_SPARSER[metric] else -1
        return max(bases, key=lambda basis: sign * self.metrics[basis][metric].value)


def compare(
    layer: Layer,
    x_test: Rows,
    bases: dict[str, Rotations],
    *,
    scale_inputs: bool = True,
    covariance: Matrix | None = None,
    key: PRNGKeyArray,
    resamples: int = 200,
) -> Comparison:
    """All metrics of `metrics.evaluate` for every basis on held-out `x_test`, and, for unscaled inputs, `gap_closed`:

        (mean S of a random basis - mean S of this basis) / (mean S of a random basis - floor)

    0 is what a Haar basis (drawn here) gives, and 1 the floor `E Σ_i S(σ_i(J)) / (d_out d_in)`, which no rotations
    can get below, since S is concave in z². S is `GemanMcClure(eps=0.1)` of `z / rms(Z)`: a measure other than the
    default of a fit, because here it evaluates. With scaled inputs there is no such floor and the metric is left out.
    The floor costs one singular value decomposition an example.

    `scale_inputs`, `covariance`, `key` and `resamples` are as in `metrics.evaluate`.

    Raises `ValueError` where there are no bases, or shapes do not fit.
    """
    if not bases:
        raise ValueError("compare needs at least one basis, got none")
    bases = {name: checked(f"bases[{name!r}]", r) for name, r in bases.items()}
    x = activations("x_test", x_test, layer.d_in)
    gram = jacobian_gram(layer, x)
    if scale_inputs and covariance is None:
        covariance = input_covariance(x)[1]
    metrics = {
        name: evaluate(
            layer, x, r, scale_inputs=scale_inputs, covariance=covariance, gram=gram, key=key, resamples=resamples
        )
        for name, r in bases.items()
    }
    if not scale_inputs:
        rms = float(np.sqrt(np.trace(gram) / (layer.d_in * layer.d_out)))
        counts = bootstrap_counts(len(x), resamples, key=key)
        gaps = _gaps_closed(layer, x, bases, GemanMcClure(eps=0.1), rms, counts, key=jax.random.fold_in(key, 1))
        metrics = {name: of | {"gap_closed": gaps[name]} for name, of in metrics.items()}
    return Comparison(metrics)


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


def heading(name: str) -> str:
    """A metric's label, with an arrow to where sparser is."""
    return f"{LABELS[name]} {'↑' if HIGHER_IS_SPARSER[name] else '↓'}"


def shown(name: str, m: Interval, *, bold: bool = False) -> str:
    """A metric's value and half the width of its interval, in Markdown."""
    value, half = number(name, m.value), number(name, (m.high - m.low) / 2)
    return f"**{value}** ±{half}" if bold else f"{value} ±{half}"


def number(name: str, value: float) -> str:
    """A metric's value with the digits that it deserves."""
    return f"{value:.{digits(name)}f}"


def digits(name: str) -> int:
    """Whole entries for counts, three decimals for shares."""
    return 0 if name.startswith("edges") else 1 if name == "participation_ratio" else 3
