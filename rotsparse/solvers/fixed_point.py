"""Fixed-point iteration for activation sparsity: `R <- polar(E[ψ(z) xᵀ])`, `z = R x / rms(x)`.

Each step sets R to the rotation whose activations are nearest to the responses ψ(z) (the orthogonal Procrustes
problem), and so takes larger steps than a gradient method. The response ψ is one of:

- `ψ(z_i) = s_i z_i - S'(z_i)` with the objective's measure S (the default). With the shift `s_i = E[S''(z_i)]` this is
  the symmetric FastICA step (Hyvärinen 1999), which converges quadratically near a sparse basis. The shift is raised
  where it is too small for `E[ψ(z_i) z_i]` to be positive; this makes bases of *dense* activations, which are also
  fixed points of FastICA, repelling. The best initialiser measured is `Log(eps=1)`.
- `cube`: matching, stretching and projection (Zhai et al. 2020), for L4.
- `soft_threshold(τ)`: match the activations to their soft-thresholded values; minimises a Huber function of z.
- `top_k(k)`: match them to their k largest entries, as in dictionary learning with exactly k atoms per example. The
  energy of these entries is convex in R (a maximum over choices of entries), so it lies above its linearisation and no
  step lowers it: the generalised power method (Journée et al. 2010), a descent method for `measures.TopK`.

Only matrix products are used: Newton-Schulz steps give the polar factor.
"""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from rotsparse._core.orthogonal import matmul, polar
from rotsparse.engine.steps import Stepwise, check_counts
from rotsparse.objectives.measures import outside_largest
from rotsparse.solvers._rotated_moments import RotatedMoments, check_objective, rotated_moments

# A response maps rotated activations [d, n] (directions first) to the activations that R should produce instead.
Response = Callable[[Float[Array, "d n"]], Float[Array, "d n"]]

# The least diagonal entry of E[ψ(z) zᵀ], relative to E[S'(z_i) z_i]. Larger values converge more slowly; with smaller
# ones steps diverge where the two terms of the FastICA shift cancel.
MARGIN = 0.3


def cube(z: Float[Array, "d n"]) -> Float[Array, "d n"]:
    """`z³`: the stretching of matching, stretching and projection."""
    return z * jnp.square(z)


def soft_threshold(threshold: float) -> Response:
    """`sign(z) max(|z| - τ, 0)`, with τ in units of the activations' rms. Raises `ValueError` for τ < 0."""
    if threshold < 0:
        raise ValueError(f"a threshold cannot be negative, got {threshold}")
    return lambda z: z - jnp.clip(z, -threshold, threshold)


def top_k(k: int) -> Response:
    """Keep the k entries of largest magnitude of each example and set the others to zero. Raises `ValueError` for k <
    1."""
    if k < 1:
        raise ValueError(f"top_k keeps at least one entry of each example, got {k}")

    def respond(z):
        return jnp.where(outside_largest(jnp.square(z).T, k).T, 0, z)

    return respond


def shifted(m: RotatedMoments) -> Float[Array, "d d"]:
    """`E[ψ(z) zᵀ]` for the response of the measure, to first order in the covariance of different directions."""
    along = jnp.diagonal(m.pull)
    shift = jnp.maximum(m.curvature * m.power, along + MARGIN * jnp.abs(along))
    return jnp.diag(shift) - m.pull


class FixedPoint(Stepwise):
    """`R <- polar(E[ψ(R x) xᵀ])`, with ψ from the objective's measure if `response=None`. There is no line search: the
    objective may rise for a step, and the best rotation at a check is returned. Raises `ValueError` for objectives
    other than `ActivationSparsity`."""

    response: Response | None = eqx.field(static=True, default=None)
    steps: int = eqx.field(static=True, default=60)
    batch_size: int | None = eqx.field(static=True, default=None)
    patience: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_counts(self)

    def init(self, bases):
        return None

    def step(self, objective, bases, state, step):
        objective = check_objective(objective)
        r = bases[objective.space]
        m = rotated_moments(objective, r, self.response)
        target = shifted(m) if self.response is None else m.pull
        return {objective.space: project(target, r)}, None, m.value


def project(target: Float[Array, "d d"], r: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """`polar(target · R)`, with a small ridge for directions in which the data do not vary; R itself if the polar
    factor cannot be computed."""
    d = len(r)
    ridge = 1e-3 * jnp.maximum(jnp.linalg.norm(target), jnp.finfo(r.dtype).tiny) / d
    new = polar(matmul(target + ridge * jnp.eye(d, dtype=r.dtype), r))
    # Newton-Schulz leaves no singular value above one, so the sum of their squares shows whether one has not converged.
    # The comparison is written so that NaN keeps R too.
    return jnp.where(jnp.sum(jnp.square(new)) > d - 0.01, new, r)
