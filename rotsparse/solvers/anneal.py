"""Annealing on the orthogonal group: large steps of a prescribed angle that shrinks to zero, along noisy gradients.

Sparse bases are separated by barriers, and what a descent reaches depends on where it started. Two things get across
them. Steps that turn their fastest plane by a fixed, large angle overshoot every narrow minimum: the angle acts as a
temperature, and the minima that survive its slow decay are wide and deep. And minibatches of very few examples make a
step so cheap that the same time buys ten times as many: the noise they add does no harm while the angle is large, and
averages out as it falls. Only directions of gradients count, so nothing has to be tuned to the scale of an objective.
"""

import equinox as eqx
import jax
import jax.numpy as jnp

from rotsparse._core.orthogonal import bound_step, matmul, newton_schulz, skew
from rotsparse.engine.steps import Stepwise, check_counts


class Anneal(Stepwise):
    """`R <- polar((I - U min(1, θ_t/‖U‖₂)) R)`, `θ_t = angle · (1 - t)`, with t from 0 to 1 over the run.

    U is the relative gradient's running mean divided by the root of its running mean square, entry by entry (the
    direction of Adam: Kingma & Ba 2015). Its entries are of size one, so `‖U‖₂` is all but always above `θ_t` and a
    step turns its fastest plane by nearly `θ_t` radians (an upper bound stands for `‖U‖₂`, so by no more).

    Meant for minibatches of about 16 Jacobians (256 rows of activations). Most of the objective falls while `θ_t` is
    between 0.3 and 0.1: for better optima take more `steps`, and to improve on a good start without leaving it take an
    `angle` below that. `decay_mean` and `decay_square` are what the running means keep from one step to the next.
    There is no `patience`: annealing improves most near its end.

    Raises `ValueError` for an angle outside (0, 0.5]: up to there the retraction's three Newton-Schulz steps end at
    float32's accuracy.
    """

    steps: int = eqx.field(static=True, default=4000)
    angle: float = eqx.field(static=True, default=0.4)
    batch_size: int | None = eqx.field(static=True, default=16)
    submatrix: tuple[int, int] | None = eqx.field(static=True, default=None)
    decay_mean: float = eqx.field(static=True, default=0.9)
    decay_square: float = eqx.field(static=True, default=0.9)

    def __check_init__(self):
        check_counts(self)
        if not 0 < self.angle <= 0.5:
            raise ValueError(f"angle is the first step's, in radians: expected a number in (0, 0.5], got {self.angle}")
        for name in ("decay_mean", "decay_square"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"expected {name} in [0, 1), got {getattr(self, name)}")

    def init(self, bases):
        zeros = jax.tree.map(jnp.zeros_like, bases)
        return zeros, zeros

    def step(self, objective, bases, state, step):
        value, grads = objective.value_and_grad(bases)
        keep_m, keep_s = self.decay_mean, self.decay_square
        means = jax.tree.map(lambda m, g: keep_m * m + (1 - keep_m) * g, state[0], grads)
        squares = jax.tree.map(lambda s, g: keep_s * s + (1 - keep_s) * jnp.square(g), state[1], grads)
        angle = self.angle * (1 - step / self.steps)

        def turn(r, mean, square):
            # The floor is relative: gradients of wide spaces are small, and an entry that is always zero stays zero.
            floor = 1e-12 * jnp.mean(square) + jnp.finfo(r.dtype).tiny
            direction = skew(mean * jax.lax.rsqrt(square + floor))
            return newton_schulz(r - matmul(bound_step(direction, angle.astype(r.dtype)), r), 3)

        return jax.tree.map(turn, bases, means, squares), (means, squares), value
