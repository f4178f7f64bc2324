"""Fits of null models: as long as the layer's own (`measured`), or shorter ones of the layer and of its nulls
(`quick_control`), so that every fit of the command line can have a control. A control is as good as its fits are like
each other."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from rotsparse._core.types import Data
from rotsparse.data.moments import evenly_spaced, scale_covariance
from rotsparse.evaluation.compare import compare
from rotsparse.evaluation.control import Control, Metrics
from rotsparse.evaluation.nulls import draw_nulls
from rotsparse.fit.find_rotations import find_rotations
from rotsparse.layers.base import ClosedForm, Layer
from rotsparse.layers.rotations import Rotations
from rotsparse.objectives.measures import Log, Measure
from rotsparse.solvers.anneal import Anneal

# Null models of each kind: the fewest whose spread says anything about where the next one would lie.
REDRAWS = 3

# A quick control: steps of each fit, of so many examples, and what is enough to fit and to measure them on.
QUICK_STEPS, FEWEST_STEPS, BATCH = 600, 100, 16
QUICK_TRAIN, QUICK_TEST = 2000, 300
# All fits of a quick control together take about so many floating-point operations where the layer is wide.
QUICK_FLOPS = 1e13


def measured(
    layers: Mapping[str, Sequence[Layer]],
    test: Float[Data, "m d_in"],
    find: Callable[[Layer, str, int], Rotations],
    **judged: Any,
) -> dict[str, tuple[Metrics, ...]]:
    """The held-out metrics of every draw of every null after `find(layer, null, number of the draw)`."""
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
    scale_inputs: bool = True,
    scale_outputs: bool = False,
    measure: Measure = Log(0.1),  # noqa: B008 (immutable)
    draws: int = REDRAWS,
    shown: Callable[[str], None] = lambda name: None,
    **fit: Any,
) -> Control | None:
    """Fit the layer, and three draws of each of its nulls, by a few hundred steps of annealing; `None` for a layer
    that has no nulls (one without weights). `fit`: further arguments of `find_rotations`; `shown` is told what is
    fitted next.

    Wide layers get fewer steps, as many as keep the whole at about 10^13 floating-point operations, and at least 100.
    """
    trained = layer
    train, test = evenly_spaced(np.asarray(train), QUICK_TRAIN), evenly_spaced(np.asarray(test), QUICK_TEST)
    keys = jax.random.split(key, 3)
    nulls = draw_nulls(layer, train, key=keys[0], draws=draws)
    if not nulls:
        return None
    fits = 1 + draws * len(nulls)
    steps = int(np.clip(QUICK_FLOPS / (fits * BATCH * _flops(layer)), FEWEST_STEPS, QUICK_STEPS))
    units: dict[str, Any] = {"scale_inputs": scale_inputs, "scale_outputs": scale_outputs}
    method = Anneal(steps=steps, batch_size=BATCH)
    options: dict[str, Any] = {"measure": measure, "method": method} | units | fit

    def find(layer: Layer, null: str, number: int) -> Rotations:
        shown("the layer itself" if layer is trained else f"{null}, draw {number + 1} of {draws}")
        return find_rotations(layer, train, key=keys[1], **options).completed().rotations

    found = measured(
        {"learned": [layer], **nulls}, test, find, **units, covariance=scale_covariance(train), key=keys[2]
    )
    return Control(found.pop("learned")[0], found, f"{steps} steps of annealing each, {draws} draws of each null")


def _flops(layer: Layer) -> float:
    """Of one value and gradient on one example, about."""
    d_in, d_out = layer.d_in, layer.d_out
    hidden = len(layer.rights) * len(layer.rights[0]) if isinstance(layer, ClosedForm) and layer.left is not None else 0
    return 2.0 * d_out * d_in * (hidden + d_in + d_out)
