"""The graph of layers that follow each other, the outputs of one being the inputs of the next (`chain_graph`), and how
its edges are chosen (`Share`, `Needed`).

Where the outputs of a layer and the inputs of the next have the same rotation (a joint fit), they are one place.
Otherwise they are two, and the edges between them are those of the change of basis `R_in R_outᵀ`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from rotsparse._core.types import Rows
from rotsparse.evaluation.ablation import EdgeAblation, Score
from rotsparse.evaluation.numbering import influences
from rotsparse.evaluation.units import scaled_rows
from rotsparse.explain.directions import IN, OUT
from rotsparse.explain.effects import deviations_ratio, effects
from rotsparse.explain.graph import Graph, Place, Stage, shared_stage
from rotsparse.layers.base import Layer
from rotsparse.layers.jacobians import apply, jacobians
from rotsparse.layers.mlp import Dense
from rotsparse.layers.rotations import Rotations


@dataclass(frozen=True)
class Share:
    """Keep the fewest edges between two places that hold this share of the mean squared scaled Jacobian."""

    share: float = 0.9


@dataclass(frozen=True)
class Needed:
    """Keep the fewest edges between two places with which the score is at most `tolerance` worse than with all
    (`evaluation.ablation`), those of one stage cut at a time.

    `score`: of the network's outputs on the examples; for a run of a language model the mean log-probability of its
    held-out text, if none is given. `share`: where there is no ablation, between the layers of a model.
    """

    tolerance: float
    score: Score | None = None
    share: float = 0.9


Cut = Share | Needed


def chain_graph(
    layers: Sequence[Layer],
    x: Rows,
    rotations: Sequence[Rotations],
    *,
    units: Sequence[Mapping[str, Any]] | None = None,
    cut: Cut = Share(),
    ranked_on: Rows | None = None,
    example: int | None = None,
    title: str = "a chain of layers",
) -> Graph:
    """The graph of a chain of layers on the inputs `x` of the first.

    `units`: of each layer, as `scaled_rows` takes them (default: inputs scaled by their standard deviation on `x`).
    With a cut by `Needed`, edges are ranked on `ranked_on` (training inputs; default `x`), and the score is that of the
    last layer's outputs on `x`. `example`: a row of `x`; the graph is then that of its Jacobian, with the directions'
    coordinates as activations; cut by energy only.

    Raises `ValueError` if layers, rotations and inputs do not fit each other.
    """
    if len(layers) != len(rotations) or not layers:
        raise ValueError(
            f"a chain needs rotations for each layer, got {len(layers)} layers and {len(rotations)} of these"
        )
    units = [{"scale_inputs": True}] * len(layers) if units is None else units
    links = _links(layers, rotations, units)
    check_cut(cut, example)
    if example is not None and not -len(x) <= example < len(x):
        raise ValueError(f"there are {len(x)} examples, 0 to {len(x) - 1}: got {example}")
    inputs, ranked = [np.asarray(x)], [np.asarray(x if ranked_on is None else ranked_on)]
    for layer, *_ in links:
        if layer.d_in != inputs[-1].shape[1]:
            raise ValueError(
                f"a layer has {layer.d_in} inputs, and what comes before it has {inputs[-1].shape[1]} outputs"
            )
        inputs.append(np.asarray(apply(layer, jnp.asarray(inputs[-1]))))
        ranked.append(np.asarray(apply(layer, jnp.asarray(ranked[-1]))))
    stages, places = [], []
    for k, (layer, r, unit, name) in enumerate(links):
        if isinstance(cut, Needed):
            assert cut.score is not None
            score = _score_behind([of for of, *_ in links[k + 1 :]], cut.score)
            stages.append(needed(layer, ranked[k], inputs[k], r, unit, score, cut.tolerance))
        else:
            stages.append(
                layer_stage(layer, inputs[k], r, unit, cut.share, None if example is None else inputs[k][example])
            )
        if name is not None:
            shared = bool(places) and links[k - 1][3] is not None
            new = layer_places(layer, inputs[k], r, unit, name, example)
            if shared:  # one basis for what comes out of the layer before and goes into this one
                influence = (places[-1].influence + new[0].influence) / 2
                places[-1] = places[-1]._replace(key=new[0].key, title=new[0].title, influence=influence)
            places += new[shared:]
    return Graph(title, tuple(places), tuple(stages))


def check_cut(cut: Cut, example: object) -> None:
    """Raise `ValueError` for a cut by ablation that cannot be made."""
    if isinstance(cut, Needed):
        if example is not None:
            raise ValueError("edges of a single example are cut by their share of its energy: nothing to ablate")
        if cut.score is None:
            raise ValueError("the score of the network's outputs is not known: give one (evaluation.ablation.accuracy)")


def layer_places(
    layer: Layer, x: Rows, r: Rotations, units: Mapping[str, Any], name: str, example: int | None = None
) -> list[Place]:
    """The inputs and the outputs of a layer. `name` is in front of their keys and titles."""
    share = influences(layer, x, {"in": r.r_in, "out": r.r_out}, units)
    sides = {IN: np.asarray(r.apply_in(x)), OUT: np.asarray(r.apply_out(apply(layer, jnp.asarray(x))))}
    found = []
    for side, z in sides.items():
        title = f"{name} {'inputs' if side == IN else 'outputs'}".strip()
        key = f"{name.replace(' ', '-')}/{side}" if name else side
        at = None if example is None else standardised(z, z[example])
        found.append(Place(key, title, share[side], at))
    return found


def standardised(z: Float[np.ndarray, "n d"], at: Float[np.ndarray, "d"]) -> Float[np.ndarray, "d"]:
    """Coordinates in standard deviations from the mean; 0 where one does not vary."""
    z, at = np.asarray(z, np.float64), np.asarray(at, np.float64)
    spread = z.std(axis=0)
    return np.divide(at - z.mean(axis=0), spread, out=np.zeros_like(at), where=spread > 0)


def layer_stage(
    layer: Layer,
    x: Rows,
    r: Rotations,
    units: Mapping[str, Any],
    share: float,
    at: Float[np.ndarray, "d_in"] | None = None,
) -> Stage:
    """The edges of a layer that hold a share of the energy: over the examples `x`, or of the Jacobian at the input
    `at`."""
    if at is None:
        found = effects(layer, x, r, **units)
        return shared_stage(found.mean, found.size, found.energy, share)
    row = np.asarray(at)[None]
    rows = scaled_rows(layer, x, r.r_in, r.r_out, **units)
    scaled, plain = (next(jacobians(layer, row, *of))[0] for of in (rows, (r.r_in, r.r_out)))
    effect = plain * deviations_ratio(layer, x, r)
    square = np.square(scaled, dtype=np.float64)
    if not square.sum() > 0:
        raise ValueError("the layer's Jacobian is zero at this example: no direction does anything")
    return shared_stage(effect, np.abs(effect), square / square.sum(), share)


def needed(
    layer: Layer, ranked_on: Rows, x: Rows, r: Rotations, units: Mapping[str, Any], score: Score, tolerance: float
) -> Stage:
    """The edges that the score needs."""
    found = effects(layer, x, r, **units)
    ablation = EdgeAblation(layer, ranked_on, r)
    count = ablation.fewest(x, score, tolerance)
    kept: Bool[np.ndarray, "d_out d_in"] = ablation.mask(count)
    share = found.energy[kept].sum()
    said = f"{count:,} of {kept.size:,} edges keep the score within {tolerance:g} ({share:.1%} of the energy)"
    return Stage(found.mean, found.size, found.energy, kept, said)


def _links(layers, rotations, units) -> list[tuple[Layer, Rotations, Mapping[str, Any], str | None]]:
    """Layers, and between them the changes of basis, which have no name."""
    found = []
    for k, (layer, r, unit) in enumerate(zip(layers, rotations, units, strict=True)):
        if found and not np.array_equal(rotations[k - 1].r_out, r.r_in):
            same = Dense(np.eye(layer.d_in, dtype=np.float32), activation="identity")
            turned = Rotations(rotations[k - 1].r_out, r.r_in)
            scales = {name: unit[name] for name in ("scale_inputs", "scale_outputs") if name in unit}
            found.append((same, turned, scales, None))
        found.append((layer, r, unit, f"layer {k}" if len(layers) > 1 else ""))
    return found


def _score_behind(layers: Sequence[Layer], score: Score) -> Score:
    def of(y: Float[Array, "n d"]) -> float:
        for layer in layers:
            y = apply(layer, y)
        return score(y)

    return of if layers else score
