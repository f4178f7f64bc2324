"""Preconditioned quasi-Newton method for activation sparsity.

Turning the pair of directions (i, j) by ω changes the objective by `Γ_ij ω + ½ h_ij ω²/d` with

    h_ij = E[S''(z_i)] E[z_j²] + E[S''(z_j)] E[z_i²] - E[S'(z_i) z_i] - E[S'(z_j) z_j],

exact if `z_i` and `z_j` are independent. This approximation of the Hessian is diagonal in Ω and costs no more than the
gradient. (It is the Hessian of Picard-O: Ablin, Cardoso & Gramfort, "Faster ICA under orthogonal constraint", 2018.)
The step is `Ω_ij = -Γ_ij d / h_ij`, with h floored and no entry above tan 45°.

Each step evaluates the objective once, at the trial point. If the objective is not lower there, the next trial is half
a step from the last accepted point; after a few such failures, a step along the gradient. The objective of accepted
points never rises, up to rounding.
"""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rotsparse._core.orthogonal import matmul, polar
from rotsparse.engine.steps import Schedule, Stepwise, check_counts
from rotsparse.objectives.measures import Measure
from rotsparse.solvers._rotated_moments import RotatedMoments, check_objective, rotated_moments

# Floor of the curvature of a pair, as a share of the mean of |E[S'(z_i) z_i]|: it bounds the steps of flat pairs.
CURVATURE_FLOOR = 0.02
PATIENCE = 3  # halvings of a Newton step before the gradient is tried
MAX_FAILURES = 8  # consecutive failures after which the search is stuck


class Search(NamedTuple):
    """The state of the search between two evaluations of the objective."""

    anchor: Float[Array, "d d"]  # the last accepted point
    value: Float[Array, ""]  # the objective there
    gradient: Float[Array, "d d"]
    newton: Float[Array, "d d"]  # the Newton step from there
    failures: Int[Array, ""]  # trials refused since


def start(r: Float[Array, "d d"]) -> Search:
    """The state before the first evaluation; its value is infinite, so the first trial is accepted."""
    zero = jnp.zeros_like(r)
    return Search(r, jnp.full((), jnp.inf, r.dtype), zero, zero, jnp.zeros((), jnp.int32))


def gradient(m: RotatedMoments) -> Float[Array, "d d"]:
    """d × the relative gradient: `Γ_ij d = (E[S'(z_i) z_j] - E[S'(z_j) z_i])/2`."""
    return 0.5 * (m.pull - m.pull.T)


def pair_curvature(m: RotatedMoments) -> Float[Array, "d d"]:
    """`h_ij/2` of the module's formula, floored. (Half, because Ω contains every pair twice.)"""
    along = jnp.diagonal(m.pull)
    one_sided = m.curvature[:, None] * m.power - along[:, None]
    floor = CURVATURE_FLOOR * jnp.mean(jnp.abs(along))
    return jnp.maximum(0.5 * (one_sided + one_sided.T), jnp.maximum(floor, jnp.finfo(m.pull.dtype).tiny))


def pair_sums(x: Float[Array, "m d"], weights: Float[Array, "m"], r: Float[Array, "d d"], measure: Measure) -> Array:
    """Sums over examples of `S''(z_i) z_j²`, for `escape`."""
    z = r @ x.T
    return jnp.where(weights > 0, measure.example_curvature(z.T).T, 0) @ jnp.square(z).T


def escape(m: RotatedMoments, pairs: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """A step that turns disjoint pairs of directions with negative curvature by 45°; zero if there are none.

    `pairs` is `E[S''(z_i) z_j²]`, which makes h exact. Halfway between a basis and the same basis with two directions
    exchanged there is a saddle, where the gradient vanishes. `pair_curvature` does not show it, because it assumes that
    the two activations are independent, and there they are as *dependent* as possible.
    """
    along = jnp.diagonal(m.pull)
    h = (pairs + pairs.T) - (along[:, None] + along)  # symmetric to the last bit, which `mutual` needs
    h = jnp.where(jnp.eye(len(h), dtype=bool), jnp.inf, h)
    # Pair each direction with its partner of most negative curvature, if the choice is mutual.
    least = jnp.min(h, axis=1)
    mutual = (h < 0) & (h <= least[:, None]) & (h <= least)
    upper = jnp.triu(jnp.where(mutual, jnp.where(gradient(m) > 0, -1, 1), 0))
    return (upper - upper.T).astype(m.pull.dtype)


def advance(search: Search, trial: Float[Array, "d d"], m: RotatedMoments, fresh: Bool[Array, ""]) -> Search:
    """Update the search after its trial point was evaluated. `fresh`: the objective has changed, so earlier values are
    not comparable and the trial is accepted."""
    noise = 8 * jnp.finfo(m.value.dtype).eps * jnp.abs(m.value)
    accept = jnp.isfinite(m.value) & (fresh | (m.value <= search.value + noise))
    slope = gradient(m)
    # No sparse basis is more than 45° away, and polar() retracts a step of any length.
    newton = jnp.clip(-slope / pair_curvature(m), -1, 1)
    accepted = Search(trial, m.value, slope, newton, jnp.zeros((), jnp.int32))
    refused = search._replace(failures=search.failures + 1)
    return Search(*(jnp.where(accept, a, b) for a, b in zip(accepted, refused, strict=True)))


def tangent(search: Search) -> Float[Array, "d d"]:
    """The next step to try from the anchor."""
    failures = search.failures.astype(search.newton.dtype)
    newton = search.newton * 0.5**failures
    # The gradient, scaled to the length of the Newton step and divided by four at every failure.
    norm = jnp.maximum(jnp.linalg.norm(search.gradient), jnp.finfo(newton.dtype).tiny)
    length = jnp.linalg.norm(search.newton) / norm
    downhill = -search.gradient * length * 0.25 ** (failures - PATIENCE + 1)
    return jnp.where(search.failures < PATIENCE, newton, downhill)


def trial_point(search: Search) -> Float[Array, "d d"]:
    """`polar((I + Ω) R)` at the anchor."""
    return polar(search.anchor + matmul(tangent(search), search.anchor))


class QuasiNewton(Stepwise):
    """Pair-preconditioned descent with backtracking; a schedule `eps` replaces the measure's scale during the run.

    The rotations between steps are trial points; the best rotation at a check is returned. Every step sees all
    examples, because on minibatches the descent check would compare different functions. Raises `ValueError` for
    objectives other than `ActivationSparsity`.
    """

    eps: Schedule | None = eqx.field(static=True, default=None)
    steps: int = eqx.field(static=True, default=60)
    patience: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_counts(self)

    def init(self, bases):
        (r,) = bases.values()
        return start(r), jnp.zeros((), r.dtype)

    def step(self, objective, bases, state, step):
        search, last_eps = state
        if self.eps is not None:
            objective = objective.with_eps(self.eps(step / self.steps))
        objective = check_objective(objective)
        r = bases[objective.space]
        m = rotated_moments(objective, r)
        eps = jnp.asarray(objective.measure.eps, last_eps.dtype)
        search = advance(search, r, m, eps != last_eps)
        return {objective.space: trial_point(search)}, (search, eps), m.value
