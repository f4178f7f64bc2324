"""Locality without derivatives: which outputs move when one input moves by a standard deviation."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from rotsparse._core.checks import activations
from rotsparse._core.types import Rows
from rotsparse.data.moments import chunks
from rotsparse.layers.base import Layer
from rotsparse.layers.rotations import Rotations

_ROWS = 1024


# Outputs that vary by less than this share of the outputs' root mean square deviation count as varying by as much.
NULL_SPREAD = 1e-4


def finite_effects(
    layer: Layer, x: Rows, rotations: Rotations, *, size: float = 1.0, threshold: float = 0.1
) -> Float[np.ndarray, "d_out d_in"]:
    """Which rotated outputs move when one rotated input does: entry (o, i) is the share of examples in which output o
    moves by more than `threshold` of its own standard deviation when input i moves by `size` of its own (outputs that
    hardly vary at all, by less than 1e-4 of the outputs' rms deviation, count as varying by that).

    Both signs of the move are taken, in equal parts. The sum over a column is the mean number of outputs that input i
    moves: locality as it is meant, for finite changes. Cost: `2 n d_in` evaluations of the layer.

    Raises `ValueError` where the shapes do not fit each other, or `x` is unusable.
    """
    x = activations("x", x, layer.d_in)
    if (rotations.r_in.shape[0], rotations.r_out.shape[0]) != (layer.d_in, layer.d_out):
        raise ValueError(
            f"the rotations have widths {rotations.r_in.shape[0]} and {rotations.r_out.shape[0]}, the layer "
            f"{layer.d_in} and {layer.d_out}"
        )
    r_in, r_out = jnp.asarray(rotations.r_in, x.dtype), jnp.asarray(rotations.r_out, x.dtype)
    y = np.concatenate([np.asarray(_rotated(layer, rows, r_out))[:n] for rows, n in chunks(x, _ROWS)])
    steps = size * np.std(np.asarray(x, np.float64) @ np.asarray(r_in, np.float64).T, axis=0)
    # Of a direction that never varies, rounding errors would be more than its standard deviation.
    spread = y.std(axis=0, dtype=np.float64)
    spread = np.maximum(spread, NULL_SPREAD * np.sqrt(np.mean(np.square(spread))))
    enough = jnp.asarray(threshold * spread, x.dtype)
    moves = jnp.asarray(steps[:, None] * np.asarray(r_in), x.dtype)
    moved = np.zeros((layer.d_out, layer.d_in))
    for rows, count in chunks(x, _ROWS):
        counted = jnp.arange(len(rows)) < count
        moved += np.asarray(_moved(layer, rows, counted, moves, r_out, enough), np.float64)
    return moved / (2 * len(x))


@eqx.filter_jit
def _rotated(layer, x, r_out):
    with jax.default_matmul_precision("highest"):
        return layer(x) @ r_out.T


@eqx.filter_jit
def _moved(layer, x, counted, moves, r_out, enough):
    """In how many examples each output moves enough, for each input, both signs added: `[d_out, d_in]`."""
    with jax.default_matmul_precision("highest"):
        y = layer(x) @ r_out.T

        def count(move):
            far = sum((jnp.abs(layer(x + s * move) @ r_out.T - y) > enough).astype(x.dtype) for s in (1, -1))
            return counted.astype(x.dtype) @ far

        return jax.lax.map(count, moves).T
