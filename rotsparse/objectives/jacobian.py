"""Sparsity of rotated per-example Jacobians."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rotsparse._core import checks
from rotsparse._core.modules import replace_fields
from rotsparse._core.orthogonal import matmul, skew
from rotsparse._core.types import Data
from rotsparse.data.examples import Examples
from rotsparse.data.moments import Moments
from rotsparse.data.sources import Source, in_memory
from rotsparse.layers.base import Layer
from rotsparse.layers.jacobians import chunk_size, jacobian_gram
from rotsparse.layers.subspace import Subspace
from rotsparse.objectives._submatrix import Submatrix
from rotsparse.objectives.base import CHUNK_BYTES, MeasuredObjective, add_grads
from rotsparse.objectives.measures import Measure, checked, with_eps

# This fraction of the mean variance is added to every variance, because the square root of zero has no gradient.
VARIANCE_FLOOR = 1e-6


class JacobianSparsity(MeasuredObjective):
    """`E_x mean_{o,i} S(z_oi(x))`, `z = Z sd / rms(Z sd)`, `Z(x) = R_out J(x) R_inᵀ`.

    Column i of Z is multiplied by `sd_i = √(r_i Σ r_iᵀ)`, the standard deviation of rotated input i, unless
    `scale_inputs=False`: a unit change along a direction that never varies is not a local change. The root mean
    square is over all entries and all examples of `x`, at the current rotations (computed exactly from Σ and `E[JᵀJ]`,
    also on minibatches), so that the objective does not reward small Z.

    `x` is `[n, d_in]`, or a source, of which a sample is kept in memory: the objective and `E[JᵀJ]` are computed on
    the sample, and Σ on the whole source (or taken from `moments`). `precision` is that of the large matrix products:
    "highest" is full float32; "tensorfloat32" limits ε to about 1% of the rms, "bfloat16" to about 5%.

    One value with its gradient costs `2·n·(s·h·t + s²·t + s·t²)` flops, where s = d_out and t = d_in, or the size of a
    drawn submatrix, and h = d_hidden.

    Raises `ValueError` for inputs that do not fit the layer or are not finite, for a Jacobian that is zero or overflows
    on all examples, and for a tied fit of a layer with d_in ≠ d_out.
    """

    layer: Layer
    data: Examples
    measure: Measure
    gram: Float[Array, "d_in d_in"]
    covariance: Float[Array, "d_in d_in"] | None
    space_in: str = eqx.field(static=True)
    space_out: str = eqx.field(static=True)
    drawn: Submatrix | None
    precision: str = eqx.field(static=True)
    chunk: int = eqx.field(static=True)

    def __init__(
        self,
        layer: Layer,
        x: Float[Data, "n d_in"] | Source,
        measure: Measure,
        *,
        scale_inputs: bool = True,
        space_in: str = "in",
        space_out: str = "out",
        precision: str = "highest",
        moments: Moments | None = None,
    ):
        kept, source = in_memory(x)
        self.data = Examples(checks.activations("x", kept, layer.d_in), source)
        # Examples that are not in memory may activate more neurons than any of these.
        self.layer = layer = layer.gathered(self.x) if source is None else layer
        self.measure = with_eps(checked(measure), measure.eps, self.x.dtype)
        self.gram = _checked_gram(layer, self.x)
        self.covariance = None
        if scale_inputs:
            moments = self.data.moments() if moments is None else moments
            self.covariance = jnp.asarray(moments.covariance, self.x.dtype)
        self.space_in, self.space_out = space_in, space_out
        if space_in == space_out and layer.d_in != layer.d_out:
            raise ValueError(f"a tied fit needs d_in = d_out, got {layer.d_in} and {layer.d_out}")
        self.drawn = None
        self.precision = precision
        self.chunk = chunk_size(layer, CHUNK_BYTES)

    @property
    def spaces(self):
        return {self.space_in: self.layer.d_in, self.space_out: self.layer.d_out}

    def within(self, subspace: Subspace) -> "JacobianSparsity":
        """The same objective restricted to some directions of the layer's inputs and outputs."""
        subspace = subspace.gathered(self.x) if self.data.source is None else subspace
        frame = subspace.frame_in
        return replace_fields(
            self,
            layer=subspace,
            gram=_checked_gram(subspace, self.x),
            covariance=None if self.covariance is None else matmul(matmul(frame, self.covariance), frame.T),
            chunk=chunk_size(subspace, CHUNK_BYTES),
        )

    def on(self, x: Float[Data, "n d_in"] | Source) -> "JacobianSparsity":
        """The same objective on other examples, such as held-out ones (of a source, on the sample that is kept in
        memory). Its normalisation is computed from them."""
        return JacobianSparsity(
            self.layer,
            in_memory(x)[0],
            self.measure,
            scale_inputs=self.covariance is not None,
            space_in=self.space_in,
            space_out=self.space_out,
            precision=self.precision,
        )

    def subsampled(self, key, submatrix):
        shape = (self.layer.d_out, self.layer.d_in)
        return replace_fields(self, drawn=Submatrix.draw(key, submatrix, shape, self.measure))

    def value(self, bases):
        r_in, r_out = bases[self.space_in], bases[self.space_out]
        column_scale = self._scale(r_in)[0]
        if self.drawn is not None:
            r_in, r_out, column_scale = self.drawn.select(r_in, r_out, column_scale)

        def chunk_sum(x, weights):
            z = self.layer.jacobian(x, r_in, r_out) * column_scale
            return jnp.sum(weights * self.measure.example_value(z))

        return self.sum(chunk_sum) / self.count

    def value_and_grad(self, bases):
        r_in, r_out = bases[self.space_in], bases[self.space_out]
        column_scale, variance, gain, sigma, gram = self._scale(r_in)
        if self.drawn is not None:
            r_in, r_out, column_scale = self.drawn.select(r_in, r_out, column_scale)
        entries = r_in.shape[0] * r_out.shape[0]

        def chunk_sums(x, weights):
            z = self.layer.jacobian(x, r_in, r_out) * column_scale
            g = self.measure.example_slope(z) * weights[:, None, None]
            value = jnp.sum(weights * self.measure.example_value(z))
            return value, jnp.einsum("noi,npi->op", g, z), jnp.einsum("noi,noj->ij", g, z)

        value, h_out, h_in = self.sum(chunk_sums)
        value, h_out, h_in = value / self.count, h_out / (self.count * entries), h_in / (self.count * entries)
        if self.drawn is not None:
            h_out, h_in = self.drawn.spread(h_out, h_in, (self.layer.d_out, self.layer.d_in))

        # h_in is E[Gᵀ Z'] with Z' = Z sd/ρ; the derivative through Z alone is sd_i (Gᵀ Z')_ij / sd_j.
        grad_in = h_in
        if sigma is not None:
            sd = jnp.sqrt(variance)
            grad_in = sd[:, None] * h_in / sd
            # The derivative through sd_i, which is (δr_i Σ r_iᵀ)/sd_i along δr_i ...
            pull = jnp.diagonal(h_in)
            grad_in += (pull / variance)[:, None] * sigma
            # ... and that through ρ² = mean_i(sd_i² ‖J r_i‖²), which all entries share.
            share = jnp.sum(pull) / jnp.sum(variance * gain)
            grad_in -= share * (gain[:, None] * sigma + variance[:, None] * gram)
        return value, add_grads({self.space_in: skew(grad_in)}, {self.space_out: skew(h_out)})

    def _scale(self, r_in):
        """`sd_i / ρ` of every column, and for the gradient `sd²`, `E‖J r_i‖²`, `R Σ Rᵀ` and `R E[JᵀJ] Rᵀ`."""
        gram = matmul(matmul(r_in, self.gram), r_in.T)
        gain = jnp.diagonal(gram)
        entries = r_in.shape[0] * self.layer.d_out
        if self.covariance is None:
            return jax.lax.rsqrt(jnp.sum(gain) / entries), jnp.ones_like(gain), gain, None, gram
        sigma = matmul(matmul(r_in, self.covariance), r_in.T)
        variance = jnp.maximum(jnp.diagonal(sigma), 0)
        variance += VARIANCE_FLOOR * jnp.trace(self.covariance) / self.layer.d_in
        return jnp.sqrt(variance * entries / jnp.sum(variance * gain)), variance, gain, sigma, gram


def _checked_gram(layer: Layer, x: Float[Array, "n d_in"]) -> Float[Array, "d_in d_in"]:
    """`E[JᵀJ]`. Raises `ValueError` if the root mean square of the Jacobian is zero or overflows."""
    gram = jacobian_gram(layer, x)
    mean = np.trace(gram)
    if mean == 0:
        raise ValueError("the layer's Jacobian is zero for every example: nothing moves, so nothing can be sparse")
    if not mean < np.finfo(x.dtype).max:
        raise ValueError(
            f"the layer's Jacobian overflows {x.dtype} on these activations: look for entries of x or weights that are "
            "far too large, or for a function of your own that returns NaN"
        )
    return jnp.asarray(gram, x.dtype)
