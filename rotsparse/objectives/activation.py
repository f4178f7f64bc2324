"""Sparsity of rotated activations."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rotsparse._core import checks
from rotsparse._core.orthogonal import skew
from rotsparse._core.types import Data, Vectors
from rotsparse.data.examples import Examples
from rotsparse.data.moments import Moments, at_once_bytes
from rotsparse.data.sources import Source, in_memory
from rotsparse.objectives.base import MeasuredObjective
from rotsparse.objectives.measures import Measure, checked, with_eps


class ActivationSparsity(MeasuredObjective):
    """`E_x mean_i S(z_i)`, `z = R x / rms(x)`: a basis in which the activations themselves are sparse.

    `x` is `[n, d]`: a layer's inputs, or `layer(x)` for its outputs; or a source, as for `JacobianSparsity`. The rms is
    taken over all entries and does not depend on the rotation. One value with its gradient costs `4·n·d²` flops.

    Raises `ValueError` for activations that are not finite floats `[n, d]`.
    """

    data: Examples
    rms: Float[Array, ""]
    measure: Measure
    space: str = eqx.field(static=True)
    precision: str = eqx.field(static=True)
    chunk: int = eqx.field(static=True)

    def __init__(
        self,
        x: Float[Data, "n d"] | Source | Vectors,
        measure: Measure,
        *,
        space: str = "in",
        precision: str = "highest",
        moments: Moments | None = None,
    ):
        kept, source = in_memory(x)
        self.data = Examples(checks.activations("x", kept, jnp.shape(kept)[-1] if jnp.ndim(kept) else 0), source)
        self.rms = _rms(self.x)
        if source is not None:
            moments = self.data.moments() if moments is None else moments
            self.rms = jnp.asarray(moments.rms, self.x.dtype)
        checks.squares("x", jnp.square(self.rms), self.x.dtype)
        self.measure = with_eps(checked(measure), measure.eps, self.x.dtype)
        self.space = space
        self.precision = precision
        self.chunk = max(1, at_once_bytes() // (3 * self.x.dtype.itemsize * self.x.shape[1]))

    @property
    def spaces(self):
        return {self.space: self.x.shape[1]}

    def on(self, x: Float[Data, "n d"] | Source | Vectors) -> "ActivationSparsity":
        """The same objective on other examples (of a source, on the sample that is kept in memory)."""
        return ActivationSparsity(in_memory(x)[0], self.measure, space=self.space, precision=self.precision)

    def value(self, bases):
        r = bases[self.space] / self.rms

        def chunk_sum(x, weights):
            return jnp.sum(weights * self.measure.example_value(x @ r.T))

        return self.sum(chunk_sum) / self.count

    def value_and_grad(self, bases):
        r = bases[self.space] / self.rms

        def chunk_sums(x, weights):
            z = x @ r.T
            g = self.measure.example_slope(z) * weights[:, None]
            return jnp.sum(weights * self.measure.example_value(z)), g.T @ z

        value, h = self.sum(chunk_sums)
        return value / self.count, {self.space: skew(h / (self.count * self.x.shape[1]))}


@jax.jit
def _rms(x: Float[Array, "n d"]) -> Float[Array, ""]:
    """Compiled, so that the squares of all rows are never in memory."""
    return jnp.sqrt(jnp.mean(jnp.square(x)))
