"""What directions at one point of a model do to a later point, or to the logits, at the same token: through the stream,
attention and all layers between them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from rotsparse._core.precision import full_precision
from rotsparse._core.types import AnyArray
from rotsparse.models.model import Model
from rotsparse.models.transformer import run_from, stream_before

Point = tuple[int, str]

# Directions that are pushed at once.
_AT_ONCE = 8


def jacobians_between(
    model: Model,
    source: Point,
    target: Point | None,
    r_from: Float[AnyArray, "d_from d"],
    tokens: Int[np.ndarray, "sequences positions"],
    positions: Int[np.ndarray, "sequences"],
) -> Float[np.ndarray, "sequences d_target d_from"]:
    """Of every sequence the derivative of the value at `target` (`None`: the logits, less their mean) at one position
    with respect to moves along the rows of `r_from` at `source`, at the same position. Exact: one forward derivative
    for each direction."""
    arrays = jax.tree.map(lambda array: jax.device_put(array, may_alias=True), model.params)
    directions = jnp.asarray(r_from, jnp.float32)
    pushed = _pushes(arrays, model.config, source, target, directions, jnp.asarray(tokens), jnp.asarray(positions))
    return np.moveaxis(np.asarray(pushed), 0, 2)


def values_at(
    model: Model, points: tuple[Point, ...], tokens: Int[np.ndarray, "sequences positions"]
) -> tuple[np.ndarray, dict[Point, np.ndarray]]:
    """The logits `[sequences, positions, vocabulary]`, and the values at some points."""
    first = min(layer for layer, _ in points)
    stream = stream_before(model.params, model.config, tokens, first)
    logits, seen = run_from(model.params, model.config, stream, first, capture=points)
    return np.asarray(logits), {point: np.asarray(seen[point]) for point in points}


@eqx.filter_jit
def _pushes(params, config, source, target, directions, tokens, positions):
    layer = source[0]
    stream = stream_before(params, config, tokens, layer)
    here = jax.nn.one_hot(positions, tokens.shape[1], dtype=stream.dtype)[..., None]
    rows = jnp.arange(len(positions))

    def value(moved):
        change = {source: lambda x: x + here * moved}
        capture = () if target is None else (target,)
        logits, seen = run_from(params, config, stream, layer, capture=capture, intervene=change)
        if target is not None:
            return seen[target][rows, positions]
        of = logits[rows, positions]
        return of - of.mean(axis=-1, keepdims=True)

    with full_precision():
        _, push = jax.linearize(value, jnp.zeros(directions.shape[1], stream.dtype))
        return jax.lax.map(push, directions, batch_size=_AT_ONCE)
