"""The error of what reads a space if only some coordinates of each example are kept."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from rotsparse._core import checks
from rotsparse._core.modules import replace_fields
from rotsparse._core.orthogonal import skew
from rotsparse._core.precision import products
from rotsparse._core.types import AnyArray, Data, Vectors
from rotsparse.data.examples import Examples
from rotsparse.data.moments import at_once_bytes
from rotsparse.data.sources import Source, in_memory
from rotsparse.objectives.base import Objective
from rotsparse.objectives.measures import TopK, outside_largest


class DroppedError(Objective):
    """`E (x - x̂)ᵀ M (x - x̂) / E xᵀ M x`, `x̂ = Rᵀ k(R x)`, where k keeps the share `keep` of the coordinates of each
    example.

    `metric`: M, symmetric and positive, says what an error costs. `WᵀW` is the squared error of the outputs of a matrix
    W that reads x (the sum over all that do); `E[g gᵀ]`, with g the gradient of a network's loss with respect to x, is
    its empirical Fisher information, so that an error costs what it adds to the loss to second order; the identity is
    the energy that `ActivationSparsity(x, TopK(keep))` measures.

    `weighted`: coordinates are chosen by `|z_i| √(r_iᵀ M r_i)` (WINA's choice) instead of by `|z_i|`.

    Which coordinates are kept changes only where two are equal, so the gradient with them held is exact almost
    everywhere. One value with its gradient costs `8·n·d² + 4·d³` flops. Raises `ValueError` for activations that are
    not finite floats `[n, d]`, a metric of another shape, and a share outside (0, 1).
    """

    data: Examples
    metric: Float[Array, "d d"]
    unit: Float[Array, ""]
    keep: float = eqx.field(static=True)
    weighted: bool = eqx.field(static=True)
    space: str = eqx.field(static=True)
    precision: str = eqx.field(static=True)
    chunk: int = eqx.field(static=True)

    def __init__(
        self,
        x: Float[Data, "n d"] | Source | Vectors,
        metric: Float[AnyArray, "_ _"],
        *,
        keep: float = 0.5,
        weighted: bool = True,
        space: str = "in",
        precision: str = "highest",
    ):
        TopK(keep)  # refuses what is no share
        kept, source = in_memory(x)
        self.data = Examples(checks.activations("x", kept, jnp.shape(kept)[-1] if jnp.ndim(kept) else 0), source)
        d = self.data.x.shape[1]
        if jnp.shape(metric) != (d, d):
            raise ValueError(f"x has {d} coordinates: expected a metric [{d}, {d}], got {list(jnp.shape(metric))}")
        self.metric = jnp.asarray(metric, self.data.x.dtype)
        self.keep, self.weighted, self.space, self.precision = keep, weighted, space, precision
        self.chunk = max(1, at_once_bytes() // (3 * self.data.x.dtype.itemsize * d))
        with products("highest"):
            self.unit = self.data.sum(lambda x, w: jnp.sum(w[:, None] * x * (x @ self.metric)), self.chunk)
        self.unit = self.unit / self.data.count

    @property
    def spaces(self):
        return {self.space: self.data.x.shape[1]}

    @property
    def examples(self):
        return (self.data,)

    def with_examples(self, examples):
        return replace_fields(self, data=examples[0])

    def in_full_precision(self):
        return replace_fields(self, precision="highest")

    def on(self, x: Float[Data, "n d"] | Source | Vectors) -> "DroppedError":
        """The same objective on other examples (of a source, on the sample that is kept in memory)."""
        options = {"keep": self.keep, "weighted": self.weighted, "space": self.space, "precision": self.precision}
        return DroppedError(in_memory(x)[0], self.metric, **options)

    def value(self, bases):
        r, metric = bases[self.space], self._turned(bases)

        def chunk_sum(x, weights):
            dropped = self._dropped(x @ r.T, metric)
            return jnp.sum(weights[:, None] * dropped * (dropped @ metric))

        return self._mean(chunk_sum)

    def value_and_grad(self, bases):
        r, metric = bases[self.space], self._turned(bases)

        def chunk_sums(x, weights):
            z = x @ r.T
            dropped = self._dropped(z, metric)
            weighed = weights[:, None] * dropped
            q = dropped @ metric
            back = jnp.where(dropped == 0, 0, weights[:, None] * q)
            return jnp.sum(weighed * q), weighed.T @ q + back.T @ z

        value, h = self._mean(chunk_sums)
        return value, {self.space: skew(2 * h)}

    def _turned(self, bases):
        """`R M Rᵀ`."""
        r = bases[self.space]
        with products(self.precision):
            return r @ self.metric @ r.T

    def _dropped(self, z, metric):
        """z where it is dropped, zero where it is kept."""
        square = jnp.square(z)
        if self.weighted:
            square = square * jnp.diagonal(metric)
        return jnp.where(outside_largest(square, TopK(self.keep).count(z.shape[1])), z, 0)

    def _mean(self, function) -> Any:
        with products(self.precision):
            total = self.data.sum(function, self.chunk)
        scale = self.data.count * self.unit
        return (total[0] / scale, total[1] / scale) if isinstance(total, tuple) else total / scale
