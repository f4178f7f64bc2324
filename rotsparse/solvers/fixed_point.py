"""Fixed-point iteration for activation sparsity: `R <- polar(E[ψ(z) xᵀ])`, `z = R x / rms(x)`.

One template, told apart by the response ψ. Each step turns R to the rotation whose activations lie nearest to the
responses (the orthogonal Procrustes problem), so it makes large moves where a gradient method makes small ones:

- the objective's own measure, `ψ(z_i) = s_i z_i - S'(z_i)`, the default. With the shift `s_i = E[S''(z_i)]` it is the
  symmetric FastICA step (Hyvärinen 1999), which converges quadratically near a sparse basis. The shift is raised where
  it is too small for `E[ψ(z_i) z_i]` to be positive: that makes bases of *dense* activations, which are fixed points of
  FastICA too, repel. The best initialiser measured is `Log(eps=1)`.
- `cube`: matching, stretching and projection (Zhai et al. 2020), for L4.
- `soft_threshold(τ)`: the activations are matched to their soft-thresholded selves; minimises a Huber function of z.
- `top_k(k)`: ... to their k largest entries, as in dictionary learning with exactly k atoms an example. The energy of
  these entries is convex in R (a maximum over choices of entries), so it lies above its linearisation and no step
  lowers it: the generalised power method (Journée et al. 2010), and the descent for `measures.TopK`.

Matrix products only: the polar factor is taken by Newton-Schulz.
"""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from rotsparse._core.orthogonal import matmul, polar
from rotsparse.engine.steps import Stepwise, check_counts
from rotsparse.objectives.measures import outside_largest
from rotsparse.solvers._moments import Moments, check_objective, moments

# A response maps rotated activations [d, n] (directions first) to the activations that they should have been.
Response = Callable[[Float[Array, "d n"]], Float[Array, "d n"]]

# The least diagonal of E[ψ(z) zᵀ] relative to E[S'(z_i) z_i]. A larger one is slower, a smaller one lets steps explode
# where the two halves of the FastICA shift cancel.
MARGIN = 0.3


def cube(z: Float[Array, "d n"]) -> Float[Array, "d n"]:
    """`z³`: "stretching" of the L4 norm's matching-stretching-projection."""
    return z * jnp.square(z)


def soft_threshold(threshold: float) -> Response:
    """`sign(z) max(|z| - τ, 0)`; τ in units of the activations' rms."""
    if threshold < 0:
        raise ValueError(f"a threshold cannot be negative, got {threshold}")
    return lambda z: z - jnp.clip(z, -threshold, threshold)


def top_k(k: int) -> Response:
    """Each example's k entries of largest magnitude; the others zero."""
    if k < 1:
        raise ValueError(f"top_k keeps at least one entry of each example, got {k}")

    def respond(z):
        return jnp.where(outside_largest(jnp.square(z).T, k).T, 0, z)

    return respond


def shifted(m: Moments) -> Float[Array, "d d"]:
    """`E[ψ(z) zᵀ]` of the measure's own response, to first order in the covariance of different directions."""
    along = jnp.diagonal(m.pull)
    shift = jnp.maximum(m.curvature * m.power, along + MARGIN * jnp.abs(along))
    return jnp.diag(shift) - m.pull


class FixedPoint(Stepwise):
    """`R <- polar(E[ψ(R x) xᵀ])`; with `response=None` ψ comes from the objective's measure. No line search: the
    objective may rise for a step; the lowest look counts. Raises `ValueError` for other objectives than
    `ActivationSparsity`."""

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
        m = moments(objective, r, self.response)
        target = shifted(m) if self.response is None else m.pull
        return {objective.space: project(target, r)}, None, m.value


def project(target: Float[Array, "d d"], r: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """`polar(target · R)`, kept away from singular where no data reach (directions that never vary); R itself where the
    polar factor cannot be had."""
    d = len(r)
    ridge = 1e-3 * jnp.maximum(jnp.linalg.norm(target), jnp.finfo(r.dtype).tiny) / d
    new = polar(matmul(target + ridge * jnp.eye(d, dtype=r.dtype), r))
    # Newton-Schulz leaves no singular value above one, so the sum of their squares shows one that stayed behind.
    # Written so that NaN keeps R too.
    return jnp.where(jnp.sum(jnp.square(new)) > d - 0.01, new, r)
