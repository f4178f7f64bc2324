"""Preconditioned quasi-Newton method for activation sparsity.

Turning the pair of directions (i, j) by ω changes the objective by `Γ_ij ω + ½ h_ij ω²/d` with

    h_ij = E[S''(z_i)] E[z_j²] + E[S''(z_j)] E[z_i²] - E[S'(z_i) z_i] - E[S'(z_j) z_j],

exact when `z_i` and `z_j` are independent, and nothing else couples pairs: the Hessian's approximation is diagonal in Ω
and costs no more than the gradient. (The Hessian of Picard-O: Ablin, Cardoso & Gramfort, "Faster ICA under orthogonal
constraint", 2018.) The step is `Ω_ij = -Γ_ij d / h_ij`, with h floored and no entry above tan 45°.

Every step evaluates the objective once: the trial point. If the objective is no lower there, the next trial goes back
to the last good point and half as far; after a few such failures, along the gradient instead. So the good points only
ever descend.
"""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rotsparse._core.orthogonal import matmul, polar
from rotsparse.engine.steps import Schedule, Stepwise, check_counts
from rotsparse.objectives.measures import Measure
from rotsparse.solvers._moments import Moments, check_objective, moments

# The curvature of a pair is at least this share of the mean of |E[S'(z_i) z_i]|: flat pairs take long steps, not
# endless ones.
CURVATURE_FLOOR = 0.02
PATIENCE = 3  # halvings of a Newton step before the gradient is tried
MAX_FAILURES = 8  # in a row: nothing better is left along the gradient


class Search(NamedTuple):
    """Where the search stands between two evaluations of the objective."""

    anchor: Float[Array, "d d"]  # the best point so far
    value: Float[Array, ""]  # and the objective there
    gradient: Float[Array, "d d"]
    newton: Float[Array, "d d"]  # the step from there
    failures: Int[Array, ""]  # trials refused since


def start(r: Float[Array, "d d"]) -> Search:
    """Before the first evaluation: any value is better than infinity."""
    zero = jnp.zeros_like(r)
    return Search(r, jnp.full((), jnp.inf, r.dtype), zero, zero, jnp.zeros((), jnp.int32))


def gradient(m: Moments) -> Float[Array, "d d"]:
    """d × the relative gradient: `Γ_ij d = (E[S'(z_i) z_j] - E[S'(z_j) z_i])/2`."""
    return 0.5 * (m.pull - m.pull.T)


def pair_curvature(m: Moments) -> Float[Array, "d d"]:
    """`h_ij/2` of the module's formula, floored. (Half, because Ω holds every pair twice.)"""
    along = jnp.diagonal(m.pull)
    one_sided = m.curvature[:, None] * m.power - along[:, None]
    floor = CURVATURE_FLOOR * jnp.mean(jnp.abs(along))
    return jnp.maximum(0.5 * (one_sided + one_sided.T), jnp.maximum(floor, jnp.finfo(m.pull.dtype).tiny))


def pair_sums(x: Float[Array, "m d"], weights: Float[Array, "m"], r: Float[Array, "d d"], measure: Measure) -> Array:
    """Sums over examples of `S''(z_i) z_j²`, for `escape`."""
    z = r @ x.T
    return jnp.where(weights > 0, measure.example_curvature(z.T).T, 0) @ jnp.square(z).T


def escape(m: Moments, pairs: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """A step that turns disjoint pairs of directions of negative curvature by 45°; zero where there are none.

    `pairs` is `E[S''(z_i) z_j²]`, which makes h exact. Halfway between a basis and the same basis with two directions
    exchanged the gradient vanishes on a saddle, and `pair_curvature` cannot tell: the two activations are as
    *dependent* there as they can be, and it takes them for independent.
    """
    along = jnp.diagonal(m.pull)
    h = (pairs + pairs.T) - (along[:, None] + along)  # symmetric to the last bit, which `mutual` needs
    h = jnp.where(jnp.eye(len(h), dtype=bool), jnp.inf, h)
    # Each direction with its most curved partner, where that is mutual.
    least = jnp.min(h, axis=1)
    mutual = (h < 0) & (h <= least[:, None]) & (h <= least)
    upper = jnp.triu(jnp.where(mutual, jnp.where(gradient(m) > 0, -1, 1), 0))
    return (upper - upper.T).astype(m.pull.dtype)


def advance(search: Search, trial: Float[Array, "d d"], m: Moments, fresh: Bool[Array, ""]) -> Search:
    """The search after its trial point was evaluated. `fresh`: earlier values do not compare with this one (the
    objective changed), so take the trial as it is."""
    noise = 8 * jnp.finfo(m.value.dtype).eps * jnp.abs(m.value)
    accept = jnp.isfinite(m.value) & (fresh | (m.value <= search.value + noise))
    slope = gradient(m)
    # A sparse basis is never more than 45° away, and polar() retracts a step of any length.
    newton = jnp.clip(-slope / pair_curvature(m), -1, 1)
    accepted = Search(trial, m.value, slope, newton, jnp.zeros((), jnp.int32))
    refused = search._replace(failures=search.failures + 1)
    return Search(*(jnp.where(accept, a, b) for a, b in zip(accepted, refused, strict=True)))


def tangent(search: Search) -> Float[Array, "d d"]:
    """The step from the anchor to try next."""
    failures = search.failures.astype(search.newton.dtype)
    newton = search.newton * 0.5**failures
    # The gradient, as long as the Newton step and shrinking four times as fast.
    norm = jnp.maximum(jnp.linalg.norm(search.gradient), jnp.finfo(newton.dtype).tiny)
    length = jnp.linalg.norm(search.newton) / norm
    downhill = -search.gradient * length * 0.25 ** (failures - PATIENCE + 1)
    return jnp.where(search.failures < PATIENCE, newton, downhill)


def trial_point(search: Search) -> Float[Array, "d d"]:
    """`polar((I + Ω) R)` at the anchor."""
    return polar(search.anchor + matmul(tangent(search), search.anchor))


class QuasiNewton(Stepwise):
    """Pair-preconditioned descent with backtracking; `eps`, when given, replaces the measure's scale over the run.

    The rotations between steps are trial points; the lowest look counts. Every step sees all examples: on minibatches
    the descent check would compare different functions. Raises `ValueError` for other objectives than
    `ActivationSparsity`.
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
        m = moments(objective, r)
        eps = jnp.asarray(objective.measure.eps, last_eps.dtype)
        search = advance(search, r, m, eps != last_eps)
        return {objective.space: trial_point(search)}, (search, eps), m.value
