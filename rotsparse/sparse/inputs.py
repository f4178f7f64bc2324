"""`SparseInput`: what a linear map reads if most coordinates are dropped in some basis.

    x̂ = R⁻¹ (k(R x - c) + c)

where k sets all but the important coordinates to zero. So `W x̂ = W R⁻¹ k(R x - c) + W R⁻¹ c`: the columns of `W R⁻¹`
whose coordinate is zero need not be read, and the last term is a bias. R is a rotation, `R⁻¹ = Rᵀ`, or a rotation of
what a metric M measures, `R = Q M^½`, in which an error of x costs what its coordinates do: `eᵀ M e = ‖R e‖²`. A
coordinate is as important as `s |z|`: with the scores s = 1 the largest stay (LaRoSA in PCA's basis, TEAL in the
neurons'), with `s_i = ‖W r_i‖` those that move the output most (Chen et al., "WINA: Weight Informed Neuron
Activation", 2025).
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rotsparse._core.precision import full_precision
from rotsparse._core.types import AnyArray
from rotsparse.objectives.measures import outside_largest


def undoing(rotation: AnyArray | None, inverse: AnyArray | None) -> AnyArray | None:
    """R⁻¹ (`None`: the identity): what is given for it, or Rᵀ."""
    return inverse if rotation is None or inverse is not None else rotation.T


class SparseInput(eqx.Module):
    """Drops coordinates of the values at a site, `[..., d]`, and comes back to the original coordinates: an
    intervention for `models.run`.

    `rotation`: R, rows are directions. `shift`: c, what stands in for a dropped coordinate. `scores`: s, what a
    coordinate's magnitude counts. (`None`: the identity, 0, 1.) `inverse`: R⁻¹, of an R that is not orthogonal.
    Either `threshold`: coordinates stay where `s |z|` is above it; or `count`: the number that stays of every example
    (fewer where several are equal). Raises `ValueError` unless one of the two is given.
    """

    rotation: Float[AnyArray, "d d"] | None = None
    shift: Float[AnyArray, "d"] | None = None
    scores: Float[AnyArray, "d"] | None = None
    threshold: Float[AnyArray, ""] | float | None = None
    count: Int[AnyArray, ""] | int | None = None
    inverse: Float[AnyArray, "d d"] | None = None

    def __check_init__(self):
        if (self.threshold is None) == (self.count is None):
            raise ValueError("give either a threshold or a count of coordinates that stay")
        if self.inverse is not None and self.rotation is None:
            raise ValueError("an inverse needs the rotation that it undoes")

    @property
    def back(self) -> Float[AnyArray, "d d"] | None:
        """R⁻¹ (`None`: the identity)."""
        return undoing(self.rotation, self.inverse)

    def coordinates(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """`k(R x - c)`: what is multiplied with the columns of `W R⁻¹`."""
        z = x
        with full_precision():
            z = z if self.rotation is None else z @ jnp.asarray(self.rotation, x.dtype).T
        z = z if self.shift is None else z - jnp.asarray(self.shift, x.dtype)
        weight = jnp.abs(z) if self.scores is None else jnp.abs(z) * jnp.asarray(self.scores, x.dtype)
        if self.count is None:
            return jnp.where(weight > jnp.asarray(self.threshold, x.dtype), z, 0)
        if isinstance(self.count, int) and not 0 <= self.count <= z.shape[-1]:
            raise ValueError(f"of {z.shape[-1]} coordinates {self.count} cannot stay")
        square = jnp.square(weight).reshape(-1, z.shape[-1])
        return jnp.where(outside_largest(square, jnp.asarray(self.count)).reshape(z.shape), 0, z)

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        z = self.coordinates(x)
        z = z if self.shift is None else z + jnp.asarray(self.shift, x.dtype)
        if self.back is None:
            return z
        with full_precision():
            return z @ jnp.asarray(self.back, x.dtype).T
