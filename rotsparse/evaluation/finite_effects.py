"""Locality without derivatives: which outputs move when one input moves by a standard deviation, and did the Jacobian
name them?"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from rotsparse._core.checks import activations
from rotsparse._core.precision import full_precision
from rotsparse._core.types import Rows
from rotsparse.data.moments import chunks
from rotsparse.layers.base import Layer
from rotsparse.layers.jacobians import chunk_size, jacobian_gram
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
    r_in, r_out, deviations, enough = _units(layer, x, rotations, threshold)
    moves = jnp.asarray((size * deviations)[:, None] * r_in, x.dtype)
    moved = np.zeros((layer.d_out, layer.d_in))
    for rows, count in chunks(x, _ROWS):
        counted = jnp.arange(len(rows)) < count
        moved += np.asarray(_moved(layer, rows, counted, moves, r_out, enough), np.float64)
    return moved / (2 * len(x))


class NamedEffects(NamedTuple):
    """Moves of single inputs by `size` standard deviations, over all examples, inputs and outputs: the share of pairs
    whose output `moved`; the share that the Jacobian `named` (the same for every size); of the outputs that move the
    share that it named; and of those that it named the share that move.

    A basis that names everything misses nothing: `named_of_moved` counts for as much as it is above `named`.
    """

    size: float
    moved: float
    named: float
    named_of_moved: float
    moved_of_named: float


def named_effects(
    layer: Layer,
    x: Rows,
    rotations: Rotations,
    *,
    sizes: Sequence[float] = (0.25, 0.5, 1.0, 2.0),
    threshold: float = 0.1,
    small: float = 0.1,
) -> list[NamedEffects]:
    """Does a finite move of one input direction move the outputs that the Jacobian names, and no others?

    An output moves if it changes by more than `threshold` of its own standard deviation, as in `finite_effects`. The
    Jacobian of an example names output o for input i if its entry is not practically zero: `|z_oi| ≥ small · rms`, with
    columns multiplied by the standard deviation of their input on `x`, and one rms of all entries and examples. Both
    signs of every move are taken. Shares of nothing are NaN. Cost: `2 n d_in` evaluations of the layer for each size.

    Raises `ValueError` where the shapes do not fit each other, `x` is unusable, or the Jacobian is zero everywhere.
    """
    x = activations("x", x, layer.d_in)
    r_in, r_out, deviations, enough = _units(layer, x, rotations, threshold)
    moves = deviations[:, None] * r_in
    energy = np.einsum("id,de,ie->", moves, jacobian_gram(layer, x), moves, optimize=True)
    if not energy > 0:
        raise ValueError("the layer's Jacobian is zero for every example: it names nothing")
    limit = small * math.sqrt(energy / moves.shape[0] / layer.d_out)
    moves, limit = jnp.asarray(moves, x.dtype), jnp.asarray(limit, x.dtype)
    counts = np.zeros((len(sizes), 3))
    for rows, count in chunks(x, min(_ROWS, chunk_size(layer))):
        counted = jnp.arange(len(rows)) < count
        for i, size in enumerate(sizes):
            size = jnp.asarray(size, x.dtype)
            counts[i] += np.asarray(_named(layer, rows, counted, size, moves, r_out, enough, limit), np.float64)
    pairs = 2 * len(x) * layer.d_in * layer.d_out
    return [
        NamedEffects(float(size), float(moved / pairs), float(named / pairs), _share(both, moved), _share(both, named))
        for size, (moved, named, both) in zip(sizes, counts, strict=True)
    ]


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan


def _units(layer: Layer, x: Rows, rotations: Rotations, threshold: float):
    """The two rotations, the standard deviations of rotated inputs, and from where on a change of each output
    counts."""
    if (rotations.r_in.shape[0], rotations.r_out.shape[0]) != (layer.d_in, layer.d_out):
        raise ValueError(
            f"the rotations have widths {rotations.r_in.shape[0]} and {rotations.r_out.shape[0]}, the layer "
            f"{layer.d_in} and {layer.d_out}"
        )
    r_in, r_out = np.asarray(rotations.r_in, x.dtype), jnp.asarray(rotations.r_out, x.dtype)
    y = np.concatenate([np.asarray(_rotated(layer, rows, r_out))[:n] for rows, n in chunks(x, _ROWS)])
    deviations = np.std(np.asarray(x, np.float64) @ r_in.astype(np.float64).T, axis=0)
    # Of a direction that never varies, rounding errors would be more than its standard deviation.
    spread = y.std(axis=0, dtype=np.float64)
    spread = np.maximum(spread, NULL_SPREAD * np.sqrt(np.mean(np.square(spread))))
    return r_in, r_out, deviations, jnp.asarray(threshold * spread, x.dtype)


@eqx.filter_jit
def _rotated(layer, x, r_out):
    with full_precision():
        return layer(x) @ r_out.T


@eqx.filter_jit
def _moved(layer, x, counted, moves, r_out, enough):
    """In how many examples each output moves enough, for each input, both signs added: `[d_out, d_in]`."""
    with full_precision():
        y = layer(x) @ r_out.T

        def count(move):
            far = sum((jnp.abs(layer(x + s * move) @ r_out.T - y) > enough).astype(x.dtype) for s in (1, -1))
            return counted.astype(x.dtype) @ far

        return jax.lax.map(count, moves).T


@eqx.filter_jit
def _named(layer, x, counted, size, moves, r_out, enough, limit):
    """How many pairs of an input and an output moved, were named, and both; both signs added."""
    with full_precision():
        y = layer(x) @ r_out.T
        named = (jnp.abs(layer.jacobian(x, moves, r_out)) >= limit) & counted[:, None, None]

        def count(of):
            move, names = of
            moved = [(jnp.abs(layer(x + s * size * move) @ r_out.T - y) > enough) & counted[:, None] for s in (1, -1)]
            return jnp.array([[m.sum(), names.sum(), (m & names).sum()] for m in moved]).sum(axis=0)

        return jax.lax.map(count, (moves, jnp.moveaxis(named, 2, 0))).sum(axis=0)
