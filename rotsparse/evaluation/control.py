"""`Control`: what the same fit of the same activations reaches in null models of the layer, measured alike."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rotsparse._core.intervals import Interval

Metrics = dict[str, Interval]


@dataclasses.dataclass(frozen=True)
class Control:
    """The metrics that one way to fit reaches for a layer (`learned`) and for some draws of each of its nulls; `made`
    says how, in words."""

    learned: Metrics
    nulls: Mapping[str, tuple[Metrics, ...]]
    made: str = ""

    def another(self, null: str, metric: str) -> Interval:
        """The mean of a null's draws, and where one more would lie (see `another_redraw`)."""
        return another_redraw([draw[metric] for draw in self.nulls[null]], counted=counted(metric))

    def metrics(self, null: str) -> Metrics:
        """`another` for every metric."""
        return {metric: self.another(null, metric) for metric in self.learned}

    def to_json(self) -> dict[str, Any]:
        """Every metric of every draw, ready for `json.dump`."""
        plain = lambda of: {name: m._asdict() for name, m in of.items()}  # noqa: E731
        nulls = {null: [plain(draw) for draw in draws] for null, draws in self.nulls.items()}
        return {"made": self.made, "learned": plain(self.learned), "nulls": nulls}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Control":
        """What `to_json` wrote."""
        metrics = lambda of: {name: Interval(**m) for name, m in of.items()}  # noqa: E731
        nulls = {null: tuple(map(metrics, draws)) for null, draws in content["nulls"].items()}
        return cls(metrics(content["learned"]), nulls, content["made"])


def another_redraw(controls: Sequence[Interval], *, counted: bool = False) -> Interval:
    """The mean of some null models that differ in their draw, and where one more of them would lie: the 95% prediction
    interval `mean ± t s √(1 + 1/k)` (Student's t with k - 1 degrees of freedom), and no less than what the intervals of
    the k controls cover. It is taken of the logits of shares and of the logarithms of what is `counted`, so that it
    does not pass the ends of the scale. A single control has its own interval only, which is too narrow: it knows
    examples, not draws.
    """
    values = np.array([control.value for control in controls], np.float64)
    low, high = min(control.low for control in controls), max(control.high for control in controls)
    k = len(values)
    if k > 1:
        from scipy.special import expit, logit, stdtrit  # here, because it takes a tenth of a second

        if counted:
            to, back = np.log, np.exp
            inside = np.maximum(values, 0.5)
        elif values.min() >= 0 and values.max() <= 1:
            to, back = logit, expit
            inside = np.clip(values, 1e-6, 1 - 1e-6)
        else:  # such as a gap that opened instead of closing
            to = back = np.asarray
            inside = values
        scaled = to(inside)
        reach = float(stdtrit(k - 1, 0.975) * scaled.std(ddof=1) * np.sqrt(1 + 1 / k))
        low, high = min(low, float(back(scaled.mean() - reach))), max(high, float(back(scaled.mean() + reach)))
    return Interval(float(values.mean()), low, high)


def counted(metric: str) -> bool:
    """Whether a metric is a number of entries, and no share."""
    return metric.startswith("edges") or metric == "participation_ratio"
