"""The graph of a run, or of the runs of several layers: `rs.graph(run)`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from rotsparse.data.sources import in_memory
from rotsparse.evaluation.ablation import Score
from rotsparse.explain.between import jacobians_between, values_at
from rotsparse.explain.chain_graph import (
    Cut,
    Needed,
    Share,
    chain_graph,
    check_cut,
    layer_places,
    layer_stage,
    needed,
    standardised,
)
from rotsparse.explain.directions import IN, OUT
from rotsparse.explain.examples import word
from rotsparse.explain.graph import Graph, Place, Prompt, Stage, shared_stage
from rotsparse.layers.jacobians import apply
from rotsparse.models.inputs import check_tokens
from rotsparse.models.language import cross_entropy
from rotsparse.models.model import Model
from rotsparse.models.transformer import run_from, stream_before
from rotsparse.report.subject import title
from rotsparse.runs import loading
from rotsparse.runs.effects import held_out
from rotsparse.runs.opened import LayerRun

# Sequences of which one token each is taken for the Jacobians between layers, and tokens of the text that scores a cut.
_BETWEEN, _SCORED = 64, 1024

# Words that a prompt's graph ends in.
_WORDS = 5


def graph(
    runs: LayerRun | Sequence[LayerRun],
    *,
    cut: Cut = Share(),  # noqa: B008 (immutable)
    example: int | None = None,
    prompt: Sequence[int] | Int[np.ndarray, "tokens"] | None = None,
    position: int = -1,
    words: Sequence[str] | None = None,
) -> Graph:
    """The graph of one opened run, or of several whose layers follow each other.

    Layers of a model are joined by the network between them: the derivative of the inputs of a later layer with respect
    to the outputs of an earlier one at the same token, over one token each of 64 held-out sequences. (What goes around
    a layer, through the stream, is not in the graph.) Layers of no model are taken to follow each other directly, the
    outputs of one being the inputs of the next, on the held-out inputs of the first.

    - `cut`: which edges are kept: `Share(0.9)` or `Needed(tolerance)` (`explain.chain_graph`).
    - `example`: of layers of no model, and of a single layer, the graph of the Jacobian at this held-out example, with
      activations.
    - `prompt`: of layers of a model, token numbers: the graph of the Jacobian at the token at `position`, with
      activations and the words that the model predicts there. `words`: the text of every token, if the store has none.

    Raises `ValueError` if the runs do not follow each other, are of different models, or lack what is asked for.
    """
    chosen = [runs] if isinstance(runs, LayerRun) else list(runs)
    if not chosen:
        raise ValueError("a graph needs a run, got none")
    numbers = [run.layer_number for run in chosen]
    if prompt is not None:
        if None in numbers:
            raise ValueError("a prompt is for layers of a model: of other layers name an example")
        check_cut(cut, prompt)
        return _of_prompt(chosen, _prompt(chosen[0], prompt, position, words), words, cut.share)
    if None not in numbers and (len(chosen) > 1 or (isinstance(cut, Needed) and cut.score is None)):
        if example is not None:
            raise ValueError(
                "an example is for a single layer, or layers of no model: here give the tokens of a prompt"
            )
        if isinstance(cut, Needed) and cut.score is not None:
            raise ValueError("layers of a model are scored by the cross-entropy of its text: leave out the score")
        return _of_model(chosen, cut)
    return chain_graph(
        [run.layer for run in chosen],
        chosen[0].x_test,
        [run.rotations for run in chosen],
        units=[run.units for run in chosen],
        cut=cut,
        ranked_on=_ranked_on(chosen[0]) if isinstance(cut, Needed) else None,
        example=example,
        title=_title(chosen),
    )


def _of_model(runs: Sequence[LayerRun], cut: Cut) -> Graph:
    """Layers of a model, on average."""
    model, places, stages = _model(runs), [], []
    text = held_out(runs[0], _BETWEEN * runs[0].store.tokens().shape[1])
    positions = np.linspace(0, text.shape[1] - 1, len(text)).round().astype(int)
    for k, run in enumerate(runs):
        if k > 0:
            stages.append(_between(model, runs[k - 1], run, text, positions, cut.share))
        places += layer_places(run.layer, run.x_test, run.rotations, run.units, _name(run, runs))
        if isinstance(cut, Needed):
            x, score = _scored(run)
            stages.append(needed(run.layer, _ranked_on(run), x, run.rotations, run.units, score, cut.tolerance))
        else:
            stages.append(layer_stage(run.layer, run.x_test, run.rotations, run.units, cut.share))
    return Graph(_title(runs), tuple(places), tuple(stages))


def _of_prompt(runs: Sequence[LayerRun], prompt: Prompt, words: Sequence[str] | None, share: float) -> Graph:
    """Layers of a model at one token."""
    model, places, stages = _model(runs), [], []
    text, at = np.asarray([prompt.tokens]), np.asarray([prompt.position])
    points = tuple(_point(run, IN) for run in runs)
    logits, seen = values_at(model, points, text)
    for k, (run, point) in enumerate(zip(runs, points, strict=True)):
        x = seen[point][0, prompt.position]
        if k > 0:
            stages.append(_between(model, runs[k - 1], run, text, at, share))
        z = {
            IN: run.rotations.apply_in(x),
            OUT: run.rotations.apply_out(np.asarray(run.layer(jnp.asarray(x[None])))[0]),
        }
        for place, side in zip(
            layer_places(run.layer, run.x_test, run.rotations, run.units, _name(run, runs)), (IN, OUT), strict=True
        ):
            places.append(place._replace(activation=standardised(_coordinates(run, side), np.asarray(z[side]))))
        stages.append(layer_stage(run.layer, run.x_test, run.rotations, run.units, share, at=x))
    if model.config.head and model.config.causal:
        place, stage = _predicted(model, runs[-1], text, at, logits[0, prompt.position], words, share)
        places, stages = [*places, place], [*stages, stage]
    return Graph(_title(runs), tuple(places), tuple(stages), prompt)


def _between(model, before: LayerRun, run: LayerRun, text, positions, share: float) -> Stage:
    """What the outputs of a layer do to the inputs of a later one."""
    j = jacobians_between(model, _point(before, OUT), _point(run, IN), before.rotations.r_out, text, positions)
    z = np.einsum("jd,sdi->sji", np.asarray(run.rotations.r_in, np.float64), j)
    return _stage(z, _spread(before, OUT), _spread(run, IN), run.units, share)


def _predicted(model, run: LayerRun, text, position, logits, words, share: float) -> tuple[Place, Stage]:
    """The likeliest words, and what the outputs of the last layer do to their logits (less the mean logit)."""
    likely = np.argsort(-logits, kind="stable")[:_WORDS]
    j = jacobians_between(model, _point(run, OUT), None, run.rotations.r_out, text, position)[:, likely]
    stage = _stage(np.asarray(j, np.float64), _spread(run, OUT), np.ones(len(likely)), run.units, share)
    probability = np.asarray(jax.nn.softmax(jnp.asarray(logits)), np.float64)[likely]
    labels = tuple(word(words if words is not None else run.store.vocabulary(), int(token)) for token in likely)
    return Place("word", "likeliest words", probability, probability, labels), stage


def _stage(z: Float[np.ndarray, "s to from"], sd_from, sd_to, units: dict[str, Any], share: float) -> Stage:
    ratio = np.divide(sd_from, sd_to[:, None], out=np.zeros(z.shape[1:]), where=sd_to[:, None] > 0)
    square = np.square(z).mean(axis=0)
    energy = square * np.square(sd_from) if units["scale_inputs"] else square
    if units["scale_outputs"]:
        varies = sd_to[:, None] > 0
        energy = np.divide(energy, np.square(sd_to[:, None]), out=np.zeros(z.shape[1:]), where=varies)
    return shared_stage(z.mean(axis=0) * ratio, np.sqrt(square) * ratio, energy / energy.sum(), share)


class _Scored(NamedTuple):
    """Held-out inputs of a layer, and the score of its outputs on them."""

    x: Float[np.ndarray, "n d_in"]
    score: Score


def _scored(run: LayerRun) -> _Scored:
    """The mean log-probability of held-out text, given a layer's outputs on it."""
    model, point = run.model, _point(run, OUT)
    if not model.config.head or not model.config.causal:
        raise ValueError(f"a {model.config.architecture} model has no next-token head: cut by Share, or give a score")
    text = held_out(run, _SCORED)
    _, seen = values_at(model, (_point(run, IN),), text)
    x = seen[_point(run, IN)]
    stream = stream_before(model.params, model.config, text, point[0])

    @eqx.filter_jit
    def mean(params, y):
        change = {point: lambda _: y.reshape(*text.shape, -1)}
        logits, _ = run_from(params, model.config, stream, point[0], intervene=change)
        return -cross_entropy(logits, text).mean()

    return _Scored(x.reshape(-1, x.shape[-1]), lambda y: float(mean(model.params, y)))


def _ranked_on(run: LayerRun) -> np.ndarray:
    """Inputs that the run was fitted on: edges are ranked on these."""
    return np.asarray(loading.compared(run.layer, in_memory(run.inputs[1])[0]))


def _prompt(run: LayerRun, tokens, position: int, words: Sequence[str] | None) -> Prompt:
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not len(tokens):
        raise ValueError(f"a prompt should be token numbers [n], got shape {list(tokens.shape)}")
    check_tokens(tokens[None], run.model.config, "the prompt")
    if not -len(tokens) <= position < len(tokens):
        raise ValueError(f"the prompt has {len(tokens)} tokens, 0 to {len(tokens) - 1}: got position {position}")
    known = words if words is not None else run.store.vocabulary()
    spelled = tuple(word(known, int(token)) for token in tokens)
    return Prompt(spelled, tuple(map(int, tokens)), position % len(tokens))


def _model(runs: Sequence[LayerRun]) -> Model:
    """The model of which all runs are layers, in their order."""
    numbers, model = [-1 if run.layer_number is None else run.layer_number for run in runs], runs[0].model
    if numbers != sorted(set(numbers)):
        raise ValueError(f"the runs should be of layers of one model, the first layer first: got layers {numbers}")
    if len({run.config["inputs"]["model"] for run in runs}) > 1:
        raise ValueError("the runs are of different models")
    return model


def _point(run: LayerRun, side: str) -> tuple[int, str]:
    point = run.point(side)
    if point is None:
        raise ValueError(f"{run} ends in the stream (it was fitted with --skip): no point of the network to go on from")
    return point


def _coordinates(run: LayerRun, side: str) -> Float[np.ndarray, "n d"]:
    x = run.x_test
    return np.asarray(
        run.rotations.apply_in(x) if side == IN else run.rotations.apply_out(apply(run.layer, jnp.asarray(x)))
    )


def _spread(run: LayerRun, side: str) -> Float[np.ndarray, "d"]:
    return _coordinates(run, side).astype(np.float64).std(axis=0)


def _name(run: LayerRun, runs: Sequence[LayerRun]) -> str:
    return f"layer {run.layer_number}" if len(runs) > 1 else ""


def _title(runs: Sequence[LayerRun]) -> str:
    first = title(runs[0].config)
    if len(runs) == 1:
        return first
    last = runs[-1].layer_number
    return f"{first}, to layer {last}" if last is not None else f"{first}, and the {len(runs) - 1} layers behind it"
