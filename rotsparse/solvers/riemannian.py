"""Gradient descent on the orthogonal group with any optax optimiser.

The relative gradient Γ (skew-symmetric) goes through the optimiser as if it were an ordinary gradient; the update Ω,
made skew-symmetric again, is the tangent step `R <- retract(R, Ω)`. Because Ω always refers to the current point,
moment estimates need no parallel transport. The step's spectral norm (the largest angle that it turns) is bounded, so
no learning rate can leave the region where the retraction is accurate, and none can produce a NaN.

Large bounded steps that decay are not a safety net but the method: the early, hot phase is what gets out of the local
minima of sharp measures on trained layers.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from rotsparse._core.orthogonal import Retraction, bound_step, retract_polar, skew
from rotsparse.engine.steps import Schedule, Stepwise, check_counts


def cosine(share: jax.Array) -> jax.Array:
    """`(1 + cos(π t))/2`: from one to zero."""
    return 0.5 * (1 + jnp.cos(jnp.pi * share))


def constant(share: jax.Array) -> jax.Array:
    """One throughout: for optimisers that carry their own schedule."""
    return jnp.ones_like(share)


def geometric(start: float, end: float) -> Schedule:
    """From `start` to `end` by a constant factor: graduated non-convexity for ε."""
    return lambda share: start * (end / start) ** share


class Riemannian(Stepwise):
    """`R <- retract(R, bounded(optimizer(Γ)))`.

    `optimizer` is any optax transformation; its updates are multiplied by `decay` of the share of the run that is done.
    `max_step` bounds the spectral norm of a step, in radians. `eps`, when given, replaces the measure's scale over the
    run (see `geometric`). By default a step sees all examples. `patience` stops the run after so many steps without
    improvement.

    Raises `ValueError` for a `max_step` outside (0, 0.5]: beyond, the retraction loses accuracy.
    """

    optimizer: optax.GradientTransformation = eqx.field(static=True, default=optax.adam(0.2))
    steps: int = eqx.field(static=True, default=400)
    batch_size: int | None = eqx.field(static=True, default=None)
    submatrix: tuple[int, int] | None = eqx.field(static=True, default=None)
    patience: int | None = eqx.field(static=True, default=None)
    decay: Schedule = eqx.field(static=True, default=cosine)
    max_step: float = 0.5
    retraction: Retraction = eqx.field(static=True, default=retract_polar)
    eps: Schedule | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_counts(self)
        if not 0 < self.max_step <= 0.5:
            raise ValueError(f"max_step is an angle in radians: expected a number in (0, 0.5], got {self.max_step}")

    def init(self, bases):
        return self.optimizer.init(jax.tree.map(jnp.zeros_like, bases))

    def step(self, objective, bases, state, step):
        share = step / self.steps
        if self.eps is not None:
            objective = objective.with_eps(self.eps(share))
        value, grads = objective.value_and_grad(bases)
        updates, state = self.optimizer.update(grads, state, bases)

        def move(r, update):
            # An absurd learning rate may overflow: a very long step in the same direction, which the bound shortens.
            omega = skew(jnp.clip(update * self.decay(share).astype(r.dtype), -1e15, 1e15))
            return self.retraction(r, bound_step(omega, self.max_step))

        return jax.tree.map(move, bases, updates), state, value
