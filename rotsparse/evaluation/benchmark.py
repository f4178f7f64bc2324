"""`benchmark`: is a layer's learned basis worth anything? One table that a sceptic would ask for.

The learned basis beside every baseline on held-out examples, what each of them costs, the same fit on the same
activations with the weights redrawn three times, and how many of its directions another start finds again.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Float, PRNGKeyArray
from rich.table import Table

from rotsparse._core.intervals import Interval
from rotsparse._core.types import Data
from rotsparse.data.moments import covariance
from rotsparse.data.sources import Source, in_memory
from rotsparse.engine.run import Run
from rotsparse.engine.solution import Solution
from rotsparse.evaluation import tables
from rotsparse.evaluation.compare import Comparison, compare, compare_with_baselines
from rotsparse.evaluation.nulls import random_weights
from rotsparse.evaluation.verdict import against_baselines, another_redraw, beyond_control
from rotsparse.fit.find_rotations import find_rotations
from rotsparse.layers.base import Layer

LEARNED = "learned"
CONTROL = "learned, random weights"

# What the control is judged by: it needs no ranking of entries and is no objective.
SHARE = "fraction_below_0.1_rms"

# Null models: the fewest whose spread says anything about where the next one would lie.
REDRAWS = 3


@dataclass(frozen=True)
class Benchmark:
    """`comparison`: every metric of the learned basis and of all baselines. `controls`: those of the learned basis of
    every null model. `seconds`: what each basis took to fit by itself, compilation included.
    `reproduced`: for each side the share of directions that every other restart found again, after more than one."""

    comparison: Comparison
    controls: tuple[dict[str, Interval], ...]
    seconds: dict[str, float]
    reproduced: dict[str, float] | None
    solution: Solution

    @property
    def control(self) -> dict[str, Interval] | None:
        """Every metric's mean over the null models, and where one more of them would lie."""
        if not self.controls:
            return None
        return {name: another_redraw([control[name] for control in self.controls]) for name in self.controls[0]}

    @property
    def conclusion(self) -> str:
        """Sparser than the baselines? Than random weights? The same directions again?"""
        said = [against_baselines(self.comparison, LEARNED)]
        if self.controls:
            shares = [control[SHARE] for control in self.controls]
            words = beyond_control(self.comparison.metrics[LEARNED][SHARE], shares)[1]
            said.append(f"{words[0].upper()}{words[1:]}.")
        if self.reproduced:
            shares = " and ".join(f"{share:.0%} of the '{side}' directions" for side, share in self.reproduced.items())
            said.append(f"Other starts find {shares} again.")
        return " ".join(said)

    def table(self) -> Table:
        """A rich table; the control in the last row."""
        concentration = self.comparison.concentration
        return tables.rich_table(
            self.comparison.metrics, concentration=concentration, controls=self._controls, seconds=self.seconds
        )

    def markdown(self) -> str:
        """The same in Markdown, with half the widths of the intervals."""
        concentration = self.comparison.concentration
        return tables.markdown_table(
            self.comparison.metrics, concentration=concentration, controls=self._controls, seconds=self.seconds
        )

    @property
    def _controls(self) -> dict[str, dict[str, Interval]]:
        control = self.control
        return {} if control is None else {CONTROL: control}

    def to_json(self) -> dict[str, Any]:
        """Everything but the rotations, ready for `json.dump`."""
        return {
            "metrics": self.comparison.to_json(),
            "control": None if (control := self.control) is None else {k: m._asdict() for k, m in control.items()},
            "controls": [{k: m._asdict() for k, m in of.items()} for of in self.controls],
            "seconds": self.seconds,
            "reproduced": self.reproduced,
            "result": self.solution.result.name,
            "conclusion": self.conclusion,
        }


def benchmark(
    layer: Layer,
    train: Float[Data, "n d_in"] | Source,
    test: Float[Data, "m d_in"],
    *,
    key: PRNGKeyArray,
    nulls: Sequence[Layer] | None = None,
    scale_inputs: bool = True,
    **fit: Any,
) -> Benchmark:
    """Fit a layer on `train` and compare with every baseline, fitted on the same, on the held-out `test`.

    `fit` holds further arguments of `find_rotations`; `restarts=2` or more tell whether other starts find the same
    directions. Where `train` is a source, the baselines see the part of it that a fit keeps in memory. `nulls` are
    fitted the same way to the same activations: by default three redraws by `random_weights(layer)`, because
    redraws differ by more than the examples' intervals say (for a layer without weights of its own, a `FunctionLayer`
    say, there are none unless given).

    Raises `ValueError` where the inputs are unfit, `KeyboardInterrupt` where a fit was interrupted.
    """
    keys = jax.random.split(key, 4)
    if nulls is None:
        draws = jax.random.split(keys[0], REDRAWS) if layer.weights() else []
        nulls = [random_weights(layer, key=k) for k in draws]
    sample, _ = in_memory(train)
    judged: dict[str, Any] = {"scale_inputs": scale_inputs, "covariance": covariance(sample)[1]}
    seconds: dict[str, float] = {}

    def learn(layer, part):
        # Each fit has checkpoints and a log of its own.
        own: dict[str, Any] = {"run": Run.of(fit.get("run")).subrun(part)}
        return find_rotations(layer, train, key=keys[1], scale_inputs=scale_inputs, **fit | own).completed()

    begun = time.perf_counter()
    solution = learn(layer, "learned")
    seconds[LEARNED] = time.perf_counter() - begun
    controls = []
    for i, null in enumerate(nulls):
        begun = time.perf_counter()
        rotations = learn(null, f"control-{i}").rotations
        seconds[CONTROL] = time.perf_counter() - begun
        controls.append(compare(null, test, {CONTROL: rotations}, key=keys[3], **judged).metrics[CONTROL])
    comparison, _ = compare_with_baselines(
        layer, sample, test, {LEARNED: solution.rotations}, scale_inputs=scale_inputs, keys=(keys[2], keys[3]),
        seconds=seconds,
    )  # fmt: skip
    again = solution.reproduced()
    return Benchmark(
        comparison=comparison,
        controls=tuple(controls),
        seconds=seconds,
        reproduced=None if again is None else {side: float(found.mean()) for side, found in again.items()},
        solution=solution,
    )
