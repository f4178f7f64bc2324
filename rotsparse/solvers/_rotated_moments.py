"""Moments of rotated activations: everything that the solvers of activation sparsity need from the data.

For `z = R x / rms(x)` and a measure S: the objective, the pull `E[S'(z_i) z_j]` (whose skew-symmetric part is the
gradient), the curvature `E[S''(z_i)]` and the power `E[z_j²]`. The last three together give the second derivative along
every rotation of a pair of directions, at the cost of the gradient alone: `4·n·d²` flops.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rotsparse.objectives.activation import ActivationSparsity
from rotsparse.objectives.base import Objective
from rotsparse.objectives.measures import Measure


class RotatedMoments(NamedTuple):
    value: Float[Array, ""]  # E mean_i S(z_i): the objective
    pull: Float[Array, "d d"]  # E[S'(z_i) z_j]
    curvature: Float[Array, "d"]  # E[S''(z_i)]
    power: Float[Array, "d"]  # E[z_j²]


def block_sums(
    x: Float[Array, "m d"], weights: Float[Array, "m"], r: Float[Array, "d d"], measure: Measure, respond=None
) -> RotatedMoments:
    """The sums of the moments over some examples, without those of weight zero. `respond`, if given, replaces S' in the
    pull."""
    # Directions first, examples last: sums over examples run along contiguous memory.
    z = r @ x.T
    slope = measure.example_slope(z.T).T if respond is None else respond(z)
    counted = weights > 0
    return RotatedMoments(
        jnp.sum(jnp.where(counted, measure.example_value(z.T), 0)),
        jnp.where(counted, slope, 0) @ z.T,
        jnp.sum(jnp.where(counted, measure.example_curvature(z.T).T, 0), axis=1),
        jnp.sum(jnp.where(counted, jnp.square(z), 0), axis=1),
    )


def rotated_moments(objective: ActivationSparsity, r: Float[Array, "d d"], respond=None) -> RotatedMoments:
    """The moments over all examples of an objective, with its normalisation, chunks and precision."""

    def sums(x, weights):
        return block_sums(x, weights, r / objective.rms, objective.measure, respond)

    return jax.tree.map(lambda total: total / objective.count, objective.sum(sums))


def check_objective(objective: Objective) -> ActivationSparsity:
    """Return the objective. Raises `ValueError` unless it is an `ActivationSparsity`, which alone has these moments."""
    if not isinstance(objective, ActivationSparsity):
        raise ValueError(
            "this method needs the second derivatives of an ActivationSparsity objective, got "
            f"{type(objective).__name__}: use Riemannian for other objectives"
        )
    return objective
