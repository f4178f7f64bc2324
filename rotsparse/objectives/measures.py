"""Sparsity measures: differentiable functions that are lowest for sparse arrays, and are minimised.

A measure is applied to `z = Z / rms(Z)`, numbers of order one. Its scale `eps` says what counts as zero: entries well
below `eps` cost almost nothing, and entries well above it cost about the same. The smaller `eps`, the closer the
measure is to the number of non-zeros, and the more local minima it has.

All measures here are concave in `z²` (Hoyer's at a fixed norm of the example). Therefore `rotsparse.floor` is a bound:
no rotation gives a lower value than the singular values of each example.

Each elementwise measure has `__call__` (the value of each entry), `slope` (its derivative, in closed form: the gradient
of every objective needs nothing else) and `curvature` (its second derivative, for the quasi-Newton solver). Which of
the Hurley-Rickard criteria of a sparsity measure each one meets, and why: `docs/measures.md`.
"""

import abc
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int


class Measure(eqx.Module):
    """A sparsity measure `S`. Smaller is sparser, and `S(0) = 0`.

    Raises `ValueError` if the scale is not a positive number.
    """

    eps: eqx.AbstractVar[float | Array]

    def __check_init__(self):
        if isinstance(self.eps, int | float) and not 0 < self.eps < math.inf:
            raise ValueError(f"the scale eps of a measure should be a positive number, got {self.eps}")

    @abc.abstractmethod
    def __call__(self, z: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """`S(z)` of every entry."""

    @abc.abstractmethod
    def slope(self, z: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """`dS/dz` of every entry."""

    @abc.abstractmethod
    def curvature(self, z: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """`d²S/dz²` of every entry, where it exists."""

    @property
    def elementwise(self) -> bool:
        """Whether the value of an example is the mean of `S` over its entries, and so a sum over any of its parts.
        Measures of an example as a whole override `example_value`."""
        return type(self).example_value is Measure.example_value

    def example_value(self, z: Float[Array, "n *s"]) -> Float[Array, "n"]:
        """Mean of `S` over the entries of each example."""
        return jnp.mean(self(z), axis=tuple(range(1, z.ndim)))

    def example_slope(self, z: Float[Array, "n *s"]) -> Float[Array, "n *s"]:
        """Derivative of (number of entries × `example_value`) with respect to every entry."""
        return self.slope(z)

    def example_curvature(self, z: Float[Array, "n *s"]) -> Float[Array, "n *s"]:
        """Second derivative of (number of entries × `example_value`) with respect to every entry, at a fixed norm of
        the example, because rotations do not change it."""
        return self.curvature(z)


class Log(Measure):
    """`log(1 + z²/ε²)`: the default. Its pull on an entry, `2z/(z²+ε²)`, is strongest at `|z| = ε` and falls off
    like 1/z, so large entries are left alone. (Cauchy or Lorentzian penalty; the negative log-likelihood of a
    Student-t with one degree of freedom up to scale.)"""

    eps: float | Array = 0.1

    def __call__(self, z):
        return jnp.log1p(jnp.square(z / self.eps))

    def slope(self, z):
        return 2 * z / (jnp.square(z) + self.eps**2)

    def curvature(self, z):
        weight = 2 / (jnp.square(z) + self.eps**2)
        return weight - jnp.square(weight * z)


class SmoothedPower(Measure):
    """`(z² + ε²)^(p/2) - ε^p`, a smoothed `|z|^p`; with p ≪ 1 nearly the number of non-zeros. Raises `ValueError` for
    p ≥ 2, which would reward equal entries."""

    eps: float | Array = 0.1
    p: float = 0.5

    def __check_init__(self):
        if not 0 < self.p < 2:
            raise ValueError(f"the power p should lie between 0 and 2 (exclusive), got {self.p}")

    def __call__(self, z):
        return (jnp.square(z) + self.eps**2) ** (self.p / 2) - self.eps**self.p

    def slope(self, z):
        return self.p * z * (jnp.square(z) + self.eps**2) ** (self.p / 2 - 1)

    def curvature(self, z):
        square = jnp.square(z) + self.eps**2
        return self.p * square ** (self.p / 2 - 1) * (1 + (self.p - 2) * jnp.square(z) / square)


class SmoothedL1(Measure):
    """`√(z² + ε²) - ε`, the smoothed absolute value (pseudo-Huber)."""

    eps: float | Array = 0.1

    def __call__(self, z):
        return jnp.sqrt(jnp.square(z) + self.eps**2) - self.eps

    def slope(self, z):
        return z / jnp.sqrt(jnp.square(z) + self.eps**2)

    def curvature(self, z):
        return self.eps**2 * (jnp.square(z) + self.eps**2) ** -1.5


class GemanMcClure(Measure):
    """`z² / (z² + ε²)`: bounded by one, so an entry far above ε costs exactly one. (Geman & McClure 1987.)"""

    eps: float | Array = 0.1

    def __call__(self, z):
        square = jnp.square(z)
        return square / (square + self.eps**2)

    def slope(self, z):
        return 2 * z * self.eps**2 / jnp.square(jnp.square(z) + self.eps**2)

    def curvature(self, z):
        square = jnp.square(z)
        return 2 * self.eps**2 * (self.eps**2 - 3 * square) / (square + self.eps**2) ** 3


class Welsch(Measure):
    """`1 - exp(-z²/2ε²)`: bounded, and flatter than Geman-McClure far from zero. (Welsch; Leclerc; smoothed L0.)"""

    eps: float | Array = 0.1

    def __call__(self, z):
        return -jnp.expm1(-jnp.square(z / self.eps) / 2)

    def slope(self, z):
        return z / self.eps**2 * jnp.exp(-jnp.square(z / self.eps) / 2)

    def curvature(self, z):
        square = jnp.square(z / self.eps)
        return (1 - square) / self.eps**2 * jnp.exp(-square / 2)


class Tanh(Measure):
    """`tanh(|z|/ε)`: bounded, with a kink at zero, so that its slope does not vanish for small entries."""

    eps: float | Array = 0.1

    def __call__(self, z):
        return jnp.tanh(jnp.abs(z) / self.eps)

    def slope(self, z):
        return jnp.sign(z) / self.eps * (1 - jnp.square(jnp.tanh(jnp.abs(z) / self.eps)))

    def curvature(self, z):
        t = jnp.tanh(jnp.abs(z) / self.eps)
        return -2 * t * (1 - jnp.square(t)) / self.eps**2


class L4(Measure):
    """`-z⁴`: rewards large entries instead of punishing small ones. It has no scale (`eps` is ignored) and a smooth
    landscape. (Zhai et al., "Complete Dictionary Learning via ℓ4-Norm Maximization", 2020.)"""

    eps: float | Array = 1.0

    def __call__(self, z):
        return -jnp.square(jnp.square(z))

    def slope(self, z):
        return -4 * z * jnp.square(z)

    def curvature(self, z):
        return -12 * jnp.square(z)


class Hoyer(Measure):
    """`‖z‖₁ / (√N ‖z‖₂)` of each example, with a smoothed absolute value: between `1/√N` (one entry) and 1 (all
    equal). Unlike the others it normalises every example by its own norm.
    (Hoyer, "Non-negative Matrix Factorization with Sparseness Constraints", 2004: his measure is
    `(√N - ‖z‖₁/‖z‖₂)/(√N - 1)`.)"""

    eps: float | Array = 0.01

    def __call__(self, z):
        return jnp.sqrt(jnp.square(z) + self.eps**2) - self.eps

    def slope(self, z):
        return z / jnp.sqrt(jnp.square(z) + self.eps**2)

    def curvature(self, z):
        return self.eps**2 * (jnp.square(z) + self.eps**2) ** -1.5

    def _rms(self, z):
        """Root mean square of each example, and its floor: an example that much smaller than the average one (whose
        rms is 1) counts as zero, and cannot blow up the gradient."""
        axes = tuple(range(1, z.ndim))
        return jnp.sqrt(jnp.mean(jnp.square(z), axis=axes, keepdims=True)), jnp.finfo(z.dtype).eps

    def example_value(self, z):
        rms, floor = self._rms(z)
        return super().example_value(z / jnp.maximum(rms, floor))

    def example_slope(self, z):
        rms, floor = self._rms(z)
        unit = z / jnp.maximum(rms, floor)
        slope = self.slope(unit)
        # The derivative through the norm removes the part of the slope along z.
        along = jnp.mean(slope * unit, axis=tuple(range(1, z.ndim)), keepdims=True)
        return (slope - jnp.where(rms > floor, along, 0) * unit) / jnp.maximum(rms, floor)

    def example_curvature(self, z):
        rms, floor = self._rms(z)
        unit = z / jnp.maximum(rms, floor)
        along = jnp.mean(self.slope(unit) * unit, axis=tuple(range(1, z.ndim)), keepdims=True)
        return (self.curvature(unit) - jnp.where(rms > floor, along, 0)) / jnp.square(jnp.maximum(rms, floor))


class TopK(Measure):
    """The mean of the squared entries outside the largest `keep · N` of each example: for activations of unit rms, the
    share of the energy that is lost if only the largest coordinates are kept. It is the loss of inference with sparse
    activations, not a general measure of sparsity.

    It is concave in the squares, as a minimum of linear functions of them, and has no scale (`eps` is ignored). The
    threshold is found by bisection to `2⁻³⁰` of the largest square of the example; entries that close to it count as
    outside. Raises `ValueError` unless `keep` is between 0 and 1.
    """

    keep: float = eqx.field(static=True, default=0.5)
    eps: float | Array = 1.0

    def __check_init__(self):
        if not 0 < self.keep < 1:
            raise ValueError(f"keep is a share of the entries: expected a number between 0 and 1, got {self.keep}")

    def __call__(self, z):
        return jnp.square(z)

    def slope(self, z):
        return 2 * z

    def curvature(self, z):
        return jnp.full_like(z, 2)

    def count(self, entries: int) -> int:
        """The number of entries that are kept, at least one."""
        return max(1, round(self.keep * entries))

    def _outside(self, z):
        square = jnp.square(z).reshape(len(z), -1)
        return outside_largest(square, self.count(square.shape[1])).reshape(z.shape)

    def example_value(self, z):
        square = jnp.square(z).reshape(len(z), -1)
        count = self.count(square.shape[1])
        threshold = _threshold(square, count)
        outside = square <= threshold
        # If several entries equal the threshold, some of them are kept.
        kept = threshold[:, 0] * (count - jnp.sum(~outside, axis=1)).astype(z.dtype)
        return (jnp.sum(jnp.where(outside, square, 0), axis=1) - kept) / square.shape[1]

    def example_slope(self, z):
        return jnp.where(self._outside(z), 2 * z, 0)

    def example_curvature(self, z):
        return jnp.where(self._outside(z), jnp.asarray(2, z.dtype), 0)


def outside_largest(square: Float[Array, "n k"], count: Int[Array, ""] | int) -> Bool[Array, "n k"]:
    """Which entries are not among the `count` largest of their row (of non-negative numbers). If several entries tie
    for the last place and not all of them fit, all of them count as outside."""
    return square <= _threshold(square, count)


def _threshold(square: Float[Array, "n k"], count: Int[Array, ""] | int) -> Float[Array, "n 1"]:
    """The smallest threshold that at most `count` entries of each row exceed, to `2⁻³⁰` of the row's maximum. Bisection
    takes a tenth of the time of sorting."""

    def halve(_, bounds):
        low, high = bounds
        middle = 0.5 * (low + high)
        too_many = jnp.sum(square > middle, axis=1, keepdims=True) > count
        return jnp.where(too_many, middle, low), jnp.where(too_many, high, middle)

    bounds = jnp.zeros((len(square), 1), square.dtype), jnp.max(square, axis=1, keepdims=True)
    return jax.lax.fori_loop(0, 30, halve, bounds)[1]


def by_name(name: str, eps: float | None = None) -> Measure:
    """The measure called `name` on the command line, with the scale `eps` if it is given.

    Raises `ValueError`, with the known names, for an unknown name.
    """
    if name not in MEASURES:
        raise ValueError(f"unknown measure {name!r}: expected one of {', '.join(sorted(MEASURES))}")
    return MEASURES[name]() if eps is None else MEASURES[name](eps=eps)


MEASURES: dict[str, Callable[..., Measure]] = {
    "log": Log,
    "power": SmoothedPower,
    "l1": SmoothedL1,
    "geman-mcclure": GemanMcClure,
    "welsch": Welsch,
    "tanh": Tanh,
    "l4": L4,
    "hoyer": Hoyer,
    "top-k": TopK,
}


def checked(measure: Any) -> Measure:
    """Return the measure. Raises `ValueError` for anything else."""
    if isinstance(measure, Measure):
        return measure
    raise ValueError(f"measure should be one such as rs.Log(0.1) or rs.TopK(0.5), got {measure!r}")


def with_eps(measure: Measure, eps: float | Array, dtype: DTypeLike | None = None) -> Measure:
    """The same measure with another scale, as an array of this dtype (default: JAX's default float), so that a new
    scale does not cause a retrace."""
    return eqx.tree_at(lambda m: m.eps, measure, jnp.asarray(eps, dtype or jax.dtypes.canonicalize_dtype(float)))
