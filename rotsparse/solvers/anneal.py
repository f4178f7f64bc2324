"""Annealing on the orthogonal group: large steps of a given angle that shrinks to zero, along noisy gradients.

Sparse bases are separated by barriers, and the result of a descent depends on its start. Two things help across the
barriers. First, steps that turn their fastest plane by a fixed, large angle overshoot every narrow minimum: the angle
acts as a temperature, and the minima that survive its slow decay are wide and deep. Second, minibatches of very few
examples make a step so cheap that the same time buys ten times as many; their noise does no harm while the angle is
large, and averages out as it falls. Only the directions of gradients matter, so nothing has to be tuned to the scale of
an objective.
"""

import equinox as eqx
import jax
import jax.numpy as jnp

from rotsparse._core.orthogonal import skew, turn
from rotsparse.engine.steps import Stepwise, check_counts


class Anneal(Stepwise):
    """`R <- polar((I - U min(1, θ_t/‖U‖₂)) R)`, `θ_t = angle · (1 - t)`, with t from 0 to 1 over the run.

    U is the running mean of the relative gradient divided by the root of its running mean square, entry by entry (the
    direction of Adam: Kingma & Ba 2015). Its entries are of order one, so `‖U‖₂` almost always exceeds `θ_t`, and a
    step turns its fastest plane by nearly `θ_t` radians (never by more, because an upper bound is used for `‖U‖₂`).

    Meant for minibatches of about 16 Jacobians, or 256 rows of activations. The objective falls most while `θ_t` is
    between 0.3 and 0.1: take more `steps` for better optima; take a smaller `angle` to improve a good start without
    leaving its basin. `decay_mean` and `decay_square`: the share of a running mean that is kept at each step. There is
    no `patience`, because annealing improves most near its end.

    Raises `ValueError` for an angle outside (0, 0.5], within which the three Newton-Schulz steps of the retraction
    reach the accuracy of float32, for decays outside [0, 1), and for counts below one.
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

        def move(r, mean, square):
            # The floor is relative, because gradients of wide spaces are small; an entry that is always zero stays
            # zero.
            floor = 1e-12 * jnp.mean(square) + jnp.finfo(r.dtype).tiny
            direction = skew(mean * jax.lax.rsqrt(square + floor))
            return turn(r, direction, angle.astype(r.dtype))

        return jax.tree.map(move, bases, means, squares), (means, squares), value
