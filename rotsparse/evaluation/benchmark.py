"""`benchmark`: is a layer's learned basis worth anything? One table that a sceptic would ask for.

The learned basis beside every baseline on held-out examples, what each of them costs, the same fit on the same
activations through three draws of every null model, and how many of its directions another start finds again.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Float, PRNGKeyArray
from rich.table import Table

from rotsparse._core.intervals import Interval
from rotsparse._core.types import Data
from rotsparse.data.scales import Scale
from rotsparse.data.sources import Source, in_memory
from rotsparse.engine.run import Run
from rotsparse.engine.solution import Solution
from rotsparse.evaluation import tables
from rotsparse.evaluation.compare import Comparison, compare_with_baselines
from rotsparse.evaluation.control import Control
from rotsparse.evaluation.fit_nulls import REDRAWS, measured
from rotsparse.evaluation.nulls import draw_nulls
from rotsparse.evaluation.verdict import against_baselines, structure
from rotsparse.fit.find_rotations import find_rotations
from rotsparse.layers.base import Layer
from rotsparse.layers.rotations import Rotations

LEARNED = "learned"


@dataclass(frozen=True)
class Benchmark:
    """`comparison`: every metric of the learned basis and of all baselines. `control`: what the same fit reaches for
    the nulls (`None` where there are none). `seconds`: what each basis took to fit by itself, compilation included (of
    nulls, the last draw). `reproduced`: for each side the share of directions that every other restart found again,
    after more than one."""

    comparison: Comparison
    control: Control | None
    seconds: dict[str, float]
    reproduced: dict[str, float] | None
    solution: Solution

    @property
    def conclusion(self) -> str:
        """Sparser than the nulls? Than the baselines? The same directions again?"""
        said = [] if self.control is None else [structure(self.control).sentence()]
        said.append(against_baselines(self.comparison, LEARNED))
        if self.reproduced:
            shares = " and ".join(f"{share:.0%} of the '{side}' directions" for side, share in self.reproduced.items())
            said.append(f"Other starts find {shares} again.")
        return " ".join(said)

    def table(self) -> Table:
        """A rich table; the nulls in the last rows."""
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
        if self.control is None:
            return {}
        return {null_row(null): self.control.metrics(null) for null in self.control.nulls}

    def to_json(self) -> dict[str, Any]:
        """Everything but the rotations, ready for `json.dump`."""
        return {
            **self.comparison.to_json(),
            "control": None if self.control is None else self.control.to_json(),
            "seconds": self.seconds,
            "reproduced": self.reproduced,
            "result": self.solution.result.name,
            "conclusion": self.conclusion,
        }


def null_row(null: str) -> str:
    """The name of a null's row in tables."""
    return f"{LEARNED}, {null}"


def benchmark(
    layer: Layer,
    train: Float[Data, "n d_in"] | Source,
    test: Float[Data, "m d_in"],
    *,
    key: PRNGKeyArray,
    nulls: Mapping[str, Sequence[Layer]] | None = None,
    scale_inputs: Scale = True,
    scale_outputs: Scale = False,
    **fit: Any,
) -> Benchmark:
    """Fit a layer on `train` and compare with every baseline, fitted on the same, on the held-out `test`.

    `fit` holds further arguments of `find_rotations`; `restarts=2` or more tell whether other starts find the same
    directions. Where `train` is a source, the baselines see the part of it that a fit keeps in memory. `nulls` are
    fitted the same way to the same activations: by default three draws of each that the layer has (`draw_nulls`),
    because draws differ by more than the examples' intervals say (a layer without weights of its own, a
    `FunctionLayer` say, has none unless given; `{}`: none).

    Raises `ValueError` where the inputs are unfit, `KeyboardInterrupt` where a fit was interrupted.
    """
    keys = jax.random.split(key, 4)
    sample, _ = in_memory(train)
    if nulls is None:
        nulls = draw_nulls(layer, sample, key=keys[0], draws=REDRAWS)
    seconds: dict[str, float] = {}
    units: dict[str, Any] = {"scale_inputs": scale_inputs, "scale_outputs": scale_outputs}

    def learn(layer: Layer, name: str) -> Solution:
        # Each fit has checkpoints and a log of its own.
        own: dict[str, Any] = {"run": Run.of(fit.get("run")).subrun(name)}
        return find_rotations(layer, train, key=keys[1], **units, **fit | own).completed()

    def find(layer: Layer, null: str, number: int) -> Rotations:
        begun = time.perf_counter()
        rotations = learn(layer, f"{null.replace(' ', '-')}-{number}").rotations
        seconds[null_row(null)] = time.perf_counter() - begun
        return rotations

    begun = time.perf_counter()
    solution = learn(layer, LEARNED)
    seconds[LEARNED] = time.perf_counter() - begun
    controls = measured(nulls, sample, test, find, **units, key=keys[3])
    comparison, _ = compare_with_baselines(
        layer, sample, test, {LEARNED: solution.rotations}, keys=(keys[2], keys[3]), seconds=seconds, **units
    )
    again = solution.reproduced()
    return Benchmark(
        comparison=comparison,
        control=Control(comparison.metrics[LEARNED], controls) if controls else None,
        seconds=seconds,
        reproduced=None if again is None else {side: float(found.mean()) for side, found in again.items()},
        solution=solution,
    )
