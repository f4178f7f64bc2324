"""Fold rotations into a whole transformer, so that its residual stream is in the fitted coordinates.

*The stream* (`fold_stream`): see `stream` for how; it costs nothing when the model runs.
*One MLP* (`fold_mlp`): if the stream cannot be rotated, the inputs and outputs of an MLP still can, at the cost of two
matrix products whenever the model runs.

Everything is computed in float64, from rotations made orthogonal to float64, and rounded once. Every fold is checked on
the tokens it is given.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np
from jaxtyping import Float

from rotsparse._core import checks
from rotsparse._core.errors import CheckError
from rotsparse._core.precision import full_precision
from rotsparse._core.types import AnyArray
from rotsparse.layers.rotations import Rotations
from rotsparse.models.layers import mlp_layer, with_mlp_layer
from rotsparse.models.model import Inputs, Model
from rotsparse.models.stream import keep_mean, moved_mean, rotate_stream, stream_places
from rotsparse.models.transformer import run

# A fold that changes float64 logits by more than this share of the largest of them is no rounding error.
TOLERANCE = 1e-9


@dataclass(frozen=True)
class FoldedModel:
    """A folded model, and how far its outputs are at most from the original's on the tokens that were checked.

    `exact_error`: in float64 throughout, so that it is the fold's own. `rounded_error`: with the new weights rounded to
    the model's type, run in float64. `error`: as the two models run, where both also round every operation. `scale` is
    the largest output.
    """

    model: Model
    error: float
    rounded_error: float
    exact_error: float
    scale: float


def fold_stream(
    model: Model,
    rotations: Float[AnyArray, "d d"] | Sequence[Float[AnyArray, "d d"]],
    tokens: Inputs,
) -> FoldedModel:
    """The same model with its residual stream in coordinates `z = R x`.

    `rotations`: one matrix for the whole stream, which stays within the model's own file format, or one for each of
    `stream_places(model.config)`, which does not. `tokens`: a few real sequences on which the logits are compared.

    A LayerNorm model stays one (and in its format) if every rotation keeps the mean direction, see `keep_mean`;
    otherwise its norms become RMSNorms, which is the same function on a centred stream.

    Raises `ValueError` if the architecture does not allow it (it says what is possible instead), a matrix is not
    orthogonal, or the logits changed.
    """
    if (reason := obstacle(model)) is not None:
        raise ValueError(reason)
    places = stream_places(model.config)
    matrices = [rotations] * len(places) if getattr(rotations, "ndim", 0) == 2 else list(rotations)
    if len(matrices) != len(places):
        raise ValueError(
            f"{len(matrices)} rotations for a stream of {len(places)} places ({places[0]}, …, {places[-1]}): "
            "give one for each, or a single matrix for all"
        )
    matrices = [_exact(r, model.config.d_model) for r in matrices]
    centred = model.config.norm == "layer"
    keeps = centred and all(moved_mean(r) < 1e-4 for r in matrices)
    if keeps:
        matrices = [keep_mean(r) for r in matrices]
    config = replace(model.config, norm="layer" if keeps else "rms")
    exact = model.astype(np.float64)
    folded = replace(exact, config=config, params=rotate_stream(exact.params, exact.config, matrices))
    return _checked(model, exact, folded, tokens)


def fold_mlp(model: Model, layer: int, rotations: Rotations, tokens: Inputs) -> FoldedModel:
    """The same model with one MLP in rotated coordinates: its sites `input` and `output` are `R_in u` and `R_out y`.

    The model multiplies by `R_in` behind the norm and by `R_outᵀ` in front of the sum whenever it runs. This works for
    every architecture, and no original file format can hold it.

    Raises `ValueError` if the rotations do not fit, or the outputs changed.
    """
    config = model.config
    for side, r in (("input", rotations.r_in), ("output", rotations.r_out)):
        if len(r) == config.d_hidden != config.d_model:
            raise ValueError(
                f"the MLP's {side} has width {config.d_model}, the rotation {len(r)}, like the hidden layer: there "
                "stands an elementwise φ, and φ(Qz) ≠ Qφ(z), so only an MLP's inputs and outputs can rotate"
            )
    r = Rotations(_exact(rotations.r_in, config.d_model), _exact(rotations.r_out, config.d_model))
    exact = model.astype(np.float64)
    folded = with_mlp_layer(exact, layer, mlp_layer(exact, layer).rotate(r.r_in, r.r_out))
    mlp = folded.params["layers"][layer]["mlp"]
    mlp["r_in"] = r.r_in @ mlp["r_in"] if "r_in" in mlp else r.r_in
    mlp["r_out"] = r.r_out @ mlp["r_out"] if "r_out" in mlp else r.r_out
    return _checked(model, exact, folded, tokens)


def obstacle(model: Model) -> str | None:
    """Why the stream of a model cannot be rotated, and what can be done instead; `None` where it can."""
    name = model.config.architecture
    instead = "What can be done: analyse its MLPs (mlp_layer), or fold them one at a time with fold_mlp"
    if model.config.placement == "post":
        return (
            f"the stream of a {name} model cannot be rotated: its norms stand in the stream (post-LN), and their "
            f"scales do not commute with a rotation. {instead}"
        )
    if model.config.placement in ("sandwich", "output"):
        return (
            f"the stream of a {name} model cannot be rotated: between each block and it stands a norm whose scale no "
            f"matrix behind it could take up. {instead}"
        )
    if not model.config.head:
        return (
            f"this {name} model has no head that could take up the last norm and undo the rotation: load the language "
            "model, not its bare body"
        )
    if any("r_in" in layer["mlp"] or "r_out" in layer["mlp"] for layer in model.params["layers"]):
        return "an MLP of this model was folded before: fold the stream first, then its MLPs"
    return None


def _exact(r, d: int) -> np.ndarray:
    """The nearest orthogonal matrix in float64."""
    r = np.asarray(r, np.float64)
    if r.shape != (d, d):
        raise ValueError(f"the stream has width {d}: expected a rotation [{d}, {d}], got {list(r.shape)}")
    u, _, vt = np.linalg.svd(checks.orthogonal("the rotation", r))
    return u @ vt


def _checked(original: Model, exact: Model, folded: Model, tokens) -> FoldedModel:
    tokens = np.asarray(tokens)
    images = original.config.patches is not None
    if tokens.ndim != (4 if images else 2) or tokens.size == 0:
        wanted = "images [batch, channels, height, width]" if images else "tokens should be [batch, tokens]"
        raise ValueError(f"{wanted} to check the fold on, got shape {list(tokens.shape)}")
    rounded = folded.astype(original.dtype)
    with jax.enable_x64(True):
        before = outputs(exact, tokens)
        exact_error = np.abs(outputs(folded, tokens) - before).max()
        rounded_error = np.abs(outputs(rounded.astype(np.float64), tokens) - before).max()
    scale = float(np.abs(before).max())
    if not exact_error <= TOLERANCE * scale:
        raise CheckError(
            f"folding changed the function: outputs of up to {scale:.2g} differ by up to {exact_error:.2g}. "
            "Are all weights finite, and of similar size?"
        )
    with jax.enable_x64(original.dtype == np.float64):
        error = np.abs(outputs(rounded, tokens) - outputs(original, tokens)).max()
    return FoldedModel(rounded, float(error), float(rounded_error), float(exact_error), scale)


def outputs(model: Model, tokens: Inputs) -> Float[np.ndarray, "batch tokens out"]:
    """What `run` returns, to compare two models by: with matrix products in the full precision of their type, which
    accelerators round to less unless told. Compiles nothing: compiling a network takes longer than one look at it."""
    with full_precision():
        return np.asarray(run(model.params, model.config, tokens)[0])
