"""Fits of null models: as long as the layer's own (`measured`), or shorter ones of the layer and of its nulls
(`quick_control`), so that every fit of the command line can have a control. A control is as good as its fits are like
each other."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from rotsparse._core.types import Data, Rows
from rotsparse.data.moments import evenly_spaced
from rotsparse.data.scales import Scale, covariance_of
from rotsparse.evaluation.compare import compare
from rotsparse.evaluation.control import Control, Metrics
from rotsparse.evaluation.nulls import draw_nulls, null_kinds
from rotsparse.fit.find_rotations import find_rotations
from rotsparse.layers.base import Layer
from rotsparse.layers.jacobians import jacobian_flops
from rotsparse.layers.rotations import Rotations
from rotsparse.objectives.measures import Log, Measure
from rotsparse.solvers.anneal import Anneal

# Null models of each kind: the fewest whose spread says anything about where the next one would lie.
REDRAWS = 3

# A quick control: steps of each fit, of so many examples, and what is enough to fit and to measure them on.
QUICK_STEPS, BATCH = 600, 16
QUICK_TRAIN, QUICK_TEST = 2000, 300
# All fits of a quick control together take about so many floating-point operations where the layer is wide: fewer
# steps, of fewer examples, looked at and measured on fewer.
QUICK_FLOPS = 2e13
FEWEST_STEPS, FEWER_EXAMPLES, FEWEST_LOOKED_AT, FEWEST_TEST = 50, 4, 32, 64


class QuickControl(NamedTuple):
    """The size of a quick control: so many fits of so many steps of `batch` examples, each looked at on `looks`
    examples and measured on `test`."""

    fits: int
    steps: int
    batch: int
    looks: int
    test: int

    @classmethod
    def of(cls, layer: Layer, fits: int | None = None) -> "QuickControl":
        """The size for a layer, and so many fits (default: of the layer and `REDRAWS` draws of each of its nulls)."""
        fits = 1 + REDRAWS * len(null_kinds(layer)) if fits is None else fits
        examples = QUICK_FLOPS / (fits * jacobian_flops(layer))  # gradients of so many in each fit
        batch = BATCH if examples >= BATCH * FEWEST_STEPS else FEWER_EXAMPLES
        return cls(
            fits,
            int(np.clip(examples / batch, FEWEST_STEPS, QUICK_STEPS)),
            batch,
            int(np.clip(examples / 8, FEWEST_LOOKED_AT, QUICK_TRAIN)),
            int(np.clip(examples / 4, FEWEST_TEST, QUICK_TEST)),
        )


def measured(
    layers: Mapping[str, Sequence[Layer]],
    train: Rows,
    test: Float[Data, "m d_in"],
    find: Callable[[Layer, str, int], Rotations],
    *,
    scale_inputs: Scale,
    scale_outputs: Scale,
    key: PRNGKeyArray,
) -> dict[str, tuple[Metrics, ...]]:
    """The held-out metrics of every draw of every null after `find(layer, null, number of the draw)`. The covariance
    that scales inputs is that of `train`; outputs are scaled by each layer's own."""
    judged: dict[str, Any] = {"scale_inputs": scale_inputs, "scale_outputs": scale_outputs, "key": key}
    judged["covariance"] = covariance_of(scale_inputs, train) if scale_inputs else None
    found: dict[str, tuple[Metrics, ...]] = {}
    for null, draws in layers.items():
        fits = (find(layer, null, i) for i, layer in enumerate(draws))
        found[null] = tuple(
            compare(layer, test, {null: rotations}, **judged).metrics[null]
            for layer, rotations in zip(draws, fits, strict=True)
        )
    return found


def quick_control(
    layer: Layer,
    train: Float[Data, "n d_in"],
    test: Float[Data, "m d_in"],
    *,
    key: PRNGKeyArray,
    scale_inputs: Scale = True,
    scale_outputs: Scale = False,
    measure: Measure = Log(0.1),  # noqa: B008 (immutable)
    draws: int = REDRAWS,
    nulls: Mapping[str, Sequence[Layer]] | None = None,
    shown: Callable[[str], None] = lambda name: None,
    **fit: Any,
) -> Control | None:
    """Fit the layer, and three draws of each of its nulls, by a few hundred steps of annealing; `None` for a layer
    that has no nulls (one without weights). `nulls`: others than its own, as many draws of each; `draws`: how many of
    its own. `fit`: further arguments of `find_rotations`; `shown` is told what is fitted next.

    Wide layers get fewer steps, as many as keep the whole at about 2·10^13 floating-point operations, and at least 50
    of 4 examples.
    """
    trained = layer
    train = evenly_spaced(np.asarray(train), QUICK_TRAIN)
    keys = jax.random.split(key, 3)
    if nulls is None:
        nulls = draw_nulls(layer, train, key=keys[0], draws=draws)
    if not nulls:
        return None
    draws = max(map(len, nulls.values()))
    quick = QuickControl.of(layer, 1 + sum(map(len, nulls.values())))
    test = evenly_spaced(np.asarray(test), quick.test)
    units: dict[str, Any] = {"scale_inputs": scale_inputs, "scale_outputs": scale_outputs}
    method = Anneal(steps=quick.steps, batch_size=quick.batch)
    options: dict[str, Any] = {"measure": measure, "method": method, "looks": quick.looks} | units | fit

    def find(layer: Layer, null: str, number: int) -> Rotations:
        shown("the layer itself" if layer is trained else f"{null}, draw {number + 1} of {draws}")
        return find_rotations(layer, train, key=keys[1], **options).completed().rotations

    found = measured({"learned": [layer], **nulls}, train, test, find, **units, key=keys[2])
    return Control(found.pop("learned")[0], found, f"{quick.steps} steps of annealing each, {draws} draws of each null")
