"""Sparsity of rotated per-example Jacobians."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rotsparse._core import checks
from rotsparse._core.modules import replace_fields
from rotsparse._core.orthogonal import matmul, skew
from rotsparse._core.precision import products
from rotsparse._core.types import Data, Vectors
from rotsparse.data.examples import Examples
from rotsparse.data.moments import Moments, at_once_bytes, far_rows
from rotsparse.data.scales import Scale, covariance_of
from rotsparse.data.sources import Source, in_memory
from rotsparse.layers.base import Layer
from rotsparse.layers.jacobians import apply, chunk_size, jacobian_flops, jacobian_gram, one_at_a_time
from rotsparse.layers.subspace import Subspace
from rotsparse.objectives._submatrix import Submatrix
from rotsparse.objectives.base import MeasuredObjective, add_grads
from rotsparse.objectives.measures import Measure, checked, with_eps

# This fraction of the mean variance is added to every variance, because the square root of zero has no gradient.
VARIANCE_FLOOR = 1e-6


# The objective is looked at on as many examples of a wide layer as take about so many floating-point operations, and
# at least as many as these: its standard error is then well below what tells rotations apart.
LOOK_FLOPS, FEWEST_LOOKED_AT = 2**39, 256


def looked_at(layer: Layer) -> int:
    """On how many examples the objective of this layer is computed where there are more."""
    return max(FEWEST_LOOKED_AT, int(LOOK_FLOPS / jacobian_flops(layer)))


class JacobianSparsity(MeasuredObjective):
    """`E_x mean_{o,i} S(z_oi(x))`, `z = Z sd / rms(Z sd)`, `Z(x) = R_out J(x) R_inᵀ`.

    Column i of Z is multiplied by `sd_i = √(r_i Σ r_iᵀ)`, the standard deviation of rotated input i, unless
    `scale_inputs=False`: a unit change along a direction that never varies is not a local change. The root mean
    square is over all entries and all examples of `x`, at the current rotations (computed exactly from Σ and `E[JᵀJ]`,
    also on minibatches), so that the objective does not reward small Z.

    With `scale_outputs` row o is divided by `sd_o = √(r_o Σ_y r_oᵀ)`, the standard deviation of rotated output o: an
    entry then has no unit, it is how many standard deviations output o moves when input i moves by one of its own. The
    root mean square is then that of the examples that are summed over (a minibatch has its own), because it no longer
    follows from second moments.

    Σ and Σ_y are the covariances without far rows (`scale_covariance`). A scale may also be a function of rows that
    returns the covariance to use, such as `rs.winsorised`.

    `x` is `[n, d_in]`, or a source, of which a sample is kept in memory: the objective and `E[JᵀJ]` are computed on
    the sample, and Σ on the whole source (or taken from `moments`). Where there are more than `looks` examples
    (default: `looked_at(layer)`, 256 for 768 → 3072 → 768), the objective is that of so many of them; minibatches are
    drawn from all. `precision` is that of the products with the data: "highest" is full float32; "tensorfloat32" limits
    ε to about 1% of the rms, "bfloat16" to about 5%.

    One value with its gradient costs `2·n·(s·h·t + s²·t + s·t²)` flops, where s = d_out and t = d_in, or the size of a
    drawn submatrix, and h = d_hidden.

    Raises `ValueError` for inputs that do not fit the layer or are not finite, for a Jacobian that is zero on all
    examples or overflows, for a tied fit of a layer with d_in ≠ d_out, and for scaled outputs that do not vary.
    """

    layer: Layer
    data: Examples
    measure: Measure
    gram: Float[Array, "d_in d_in"]
    covariance: Float[Array, "d_in d_in"] | None
    covariance_out: Float[Array, "d_out d_out"] | None
    scale_inputs: Scale = eqx.field(static=True)
    scale_outputs: Scale = eqx.field(static=True)
    space_in: str = eqx.field(static=True)
    space_out: str = eqx.field(static=True)
    drawn: Submatrix | None
    precision: str = eqx.field(static=True)
    chunk: int = eqx.field(static=True)

    def __init__(
        self,
        layer: Layer,
        x: Float[Data, "n d_in"] | Source | Vectors,
        measure: Measure,
        *,
        scale_inputs: Scale = True,
        scale_outputs: Scale = False,
        space_in: str = "in",
        space_out: str = "out",
        precision: str = "highest",
        moments: Moments | None = None,
        looks: int | None = None,
    ):
        kept, source = in_memory(x, looks or looked_at(layer))
        self.data = Examples(checks.activations("x", kept, layer.d_in), source)
        every = self.data.known
        every = self.x if every is self.x else checks.activations("x", every, layer.d_in)
        complete = source is None or len(every) == len(source)
        # Examples that are not in memory may activate more neurons than any of these.
        self.layer = layer = layer.gathered(every) if complete else layer
        self.measure = with_eps(checked(measure), measure.eps, self.x.dtype)
        self.gram = _checked_gram(layer, every)
        self.covariance = None
        if scale_inputs:
            if scale_inputs is not True or complete or far_rows(every):
                found = covariance_of(scale_inputs, every)
            else:
                found = (self.data.moments() if moments is None else moments).covariance
            checks.squares("x", float(np.trace(found)), self.x.dtype)
            self.covariance = jnp.asarray(found, self.x.dtype)
        self.covariance_out = None
        if scale_outputs:
            self.covariance_out = jnp.asarray(output_covariance(layer, self.x, scale_outputs), self.x.dtype)
        self.scale_inputs, self.scale_outputs = scale_inputs, scale_outputs
        self.space_in, self.space_out = space_in, space_out
        if space_in == space_out and layer.d_in != layer.d_out:
            raise ValueError(f"a tied fit needs d_in = d_out, got {layer.d_in} and {layer.d_out}")
        self.drawn = None
        self.precision = precision
        self.chunk = chunk_size(layer, at_once_bytes())

    @property
    def spaces(self):
        return {self.space_in: self.layer.d_in, self.space_out: self.layer.d_out}

    def within(self, subspace: Subspace) -> "JacobianSparsity":
        """The same objective restricted to some directions of the layer's inputs and outputs."""
        subspace = subspace.gathered(self.x) if self.data.source is None else subspace
        frame, out = subspace.frame_in, subspace.frame_out
        return replace_fields(
            self,
            layer=subspace,
            gram=_checked_gram(subspace, self.x),
            covariance=None if self.covariance is None else matmul(matmul(frame, self.covariance), frame.T),
            covariance_out=None if self.covariance_out is None else matmul(matmul(out, self.covariance_out), out.T),
            chunk=chunk_size(subspace, at_once_bytes()),
        )

    def on(self, x: Float[Data, "n d_in"] | Source | Vectors, looks: int | None = None) -> "JacobianSparsity":
        """The same objective on other examples, such as held-out ones (on at most `looks` of them, and of a source on
        the sample that is kept in memory). Its normalisation is computed from them."""
        return JacobianSparsity(
            self.layer,
            in_memory(x, looks or looked_at(self.layer))[0],
            self.measure,
            scale_inputs=self.scale_inputs,
            scale_outputs=self.scale_outputs,
            space_in=self.space_in,
            space_out=self.space_out,
            precision=self.precision,
        )

    def subsampled(self, key, submatrix):
        if self.covariance_out is not None:
            raise ValueError("the root mean square of scaled outputs needs all entries: leave submatrix out")
        shape = (self.layer.d_out, self.layer.d_in)
        return replace_fields(self, drawn=Submatrix.draw(key, submatrix, shape, self.measure))

    def value(self, bases):
        r_in, r_out = bases[self.space_in], bases[self.space_out]
        if self.covariance_out is not None:
            r_in, r_out = self._dimensionless(r_in, r_out)[:2]
            column_scale = 1.0
        else:
            column_scale = self._scale(r_in)[0]
            if self.drawn is not None:
                r_in, r_out, column_scale = self.drawn.select(r_in, r_out, column_scale)

        def values(j, weights):
            return jnp.sum(weights * self.measure.example_value(j * column_scale))

        return self.summed(values, r_in, r_out) / self.count

    def summed(self, function: Callable, r_in, r_out) -> Any:
        """The sum of `function(J, weights)` over the rotated Jacobians of all examples."""

        def chunk_sum(x, weights, prepared):
            return function(self.layer.prepared_jacobian(x, prepared, r_in, r_out), weights)

        chunk = 1 if one_at_a_time(self.layer) else self.chunk
        with products(self.precision):
            return self.data.sum(chunk_sum, chunk, self.layer.prepared)

    def value_and_grad(self, bases):
        r_in, r_out = bases[self.space_in], bases[self.space_out]
        if self.covariance_out is not None:
            return self._dimensionless_value_and_grad(r_in, r_out)
        column_scale, variance, gain, sigma, gram = self._scale(r_in)
        if self.drawn is not None:
            r_in, r_out, column_scale = self.drawn.select(r_in, r_out, column_scale)
        entries = r_in.shape[0] * r_out.shape[0]

        def sums(j, weights):
            z = j * column_scale
            g = self.measure.example_slope(z) * weights[:, None, None]
            value = jnp.sum(weights * self.measure.example_value(z))
            return value, jnp.einsum("noi,npi->op", g, z), jnp.einsum("noi,noj->ij", g, z)

        value, h_out, h_in = self.summed(sums, r_in, r_out)
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
        variance = _floored(jnp.diagonal(sigma), self.covariance)
        return jnp.sqrt(variance * entries / jnp.sum(variance * gain)), variance, gain, sigma, gram

    def _dimensionless(self, r_in, r_out):
        """Rows of `R_in` times their deviations, rows of `R_out` divided by theirs and by the root mean square of all
        entries of the examples; and, for each side, the deviations and what their derivative needs: `R Σ Rᵀ` divided by
        the variance of each row."""
        sd_in, turned_in = _deviations(r_in, self.covariance)
        sd_out, turned_out = _deviations(r_out, self.covariance_out)
        rows_in, rows_out = r_in * sd_in[:, None], r_out / sd_out[:, None]

        def energy(j, weights):
            return jnp.sum(weights[:, None, None] * jnp.square(j))

        entries = self.layer.d_in * self.layer.d_out
        unit = jax.lax.rsqrt(self.summed(energy, rows_in, rows_out) / (self.count * entries))
        return rows_in, rows_out * unit, (sd_in, turned_in), (sd_out, turned_out)

    def _dimensionless_value_and_grad(self, r_in, r_out):
        r_in, r_out, (sd_in, turned_in), (sd_out, turned_out) = self._dimensionless(r_in, r_out)

        def sums(z, weights):
            g = self.measure.example_slope(z) * weights[:, None, None]
            weighted = z * weights[:, None, None]
            value = jnp.sum(weights * self.measure.example_value(z))
            pairs = [(jnp.einsum("noi,npi->op", e, z), jnp.einsum("noi,noj->ij", e, z)) for e in (g, weighted)]
            return value, *pairs

        value, from_slopes, from_entries = self.summed(sums, r_in, r_out)
        # With ρ² = mean u², z = u/ρ: δz = δu/ρ - z mean(z δu/ρ), so G has to lose its part along z.
        total = self.count * self.layer.d_in * self.layer.d_out
        along = jnp.trace(from_slopes[0]) / total
        h_out, h_in = ((g - along * z) / total for g, z in zip(from_slopes, from_entries, strict=True))
        # u_oi = sd_i Z_oi / sd_o, with δsd_i / sd_i = δr_i Σ r_iᵀ / sd_i².
        grad_in = sd_in[:, None] * h_in / sd_in + jnp.diagonal(h_in)[:, None] * turned_in
        grad_out = sd_out * h_out / sd_out[:, None] - jnp.diagonal(h_out)[:, None] * turned_out
        return value / self.count, add_grads({self.space_in: skew(grad_in)}, {self.space_out: skew(grad_out)})


def output_covariance(layer: Layer, x: Float[Data, "n d_in"], scale: Scale = True) -> Float[np.ndarray, "d_out d_out"]:
    """The covariance of `y = f(x)` that a scale asks for. Raises `ValueError` where no output varies."""
    found = covariance_of(scale, np.asarray(apply(layer, jnp.asarray(x))))
    if not np.trace(found) > 0:
        raise ValueError("the layer's outputs do not vary, so they have no standard deviation to be measured in")
    return found


def _deviations(r, sigma):
    """The standard deviation of every row's coordinate, and `R Σ Rᵀ` divided by each row's variance."""
    if sigma is None:
        return jnp.ones_like(r[:, 0]), jnp.zeros_like(r)
    turned = matmul(matmul(r, sigma), r.T)
    variance = _floored(jnp.diagonal(turned), sigma)
    return jnp.sqrt(variance), turned / variance[:, None]


def _floored(variance, sigma):
    return jnp.maximum(variance, 0) + VARIANCE_FLOOR * jnp.trace(sigma) / len(sigma)


def _checked_gram(layer: Layer, x: Float[Array, "n width"]) -> Float[Array, "d_in d_in"]:
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
