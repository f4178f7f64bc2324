"""Gradient descent on the orthogonal group with any optax optimiser.

The relative gradient Γ (skew-symmetric) is passed to the optimiser like an ordinary gradient; the update Ω, made
skew-symmetric again, is the tangent step `R <- retract(R, Ω)`. Because Ω always refers to the current point, moment
estimates need no parallel transport. The spectral norm of the step (its largest angle) is bounded, so that no learning
rate leaves the region in which the retraction is accurate or produces NaN.

The bound is part of the method: large bounded steps that decay escape the local minima that sharp measures have on
trained layers.
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
    """Always one: for optimisers with their own schedule."""
    return jnp.ones_like(share)


def geometric(start: float, end: float) -> Schedule:
    """From `start` to `end` by a constant factor: graduated non-convexity for ε."""
    return lambda share: start * (end / start) ** share


class Riemannian(Stepwise):
    """`R <- retract(R, bounded(optimizer(Γ)))`.

    `optimizer` is any optax transformation; its updates are multiplied by `decay(t)`, where t is the share of the steps
    that are done. `max_step` bounds the spectral norm of a step, in radians. A schedule `eps` replaces the measure's
    scale during the run (see `geometric`). By default a step sees all examples. `patience` stops the run after so many
    steps without improvement.

    Raises `ValueError` for a `max_step` outside (0, 0.5], beyond which the retraction loses accuracy, and for counts
    below one.
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
            # Clip updates that a huge learning rate makes overflow; the bound then shortens the step.
            omega = skew(jnp.clip(update * self.decay(share).astype(r.dtype), -1e15, 1e15))
            return self.retraction(r, bound_step(omega, self.max_step))

        return jax.tree.map(move, bases, updates), state, value
