"""Any differentiable function as a layer."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from rotsparse._core.modules import replace_fields
from rotsparse.layers.base import Layer, Matrix


class FunctionLayer(Layer):
    """Any differentiable function `[d_in] → [d_out]` of one example, such as several layers or an attention block.

    Its Jacobian uses forward- or reverse-mode autodiff, whichever needs fewer passes. This is slower than a closed
    form, and holds the Jacobians of one chunk of examples in memory.
    """

    function: Callable[[Array], Array]
    d_in: int = eqx.field(static=True)
    d_out: int = eqx.field(static=True)
    r_in: Matrix | None
    r_out: Matrix | None

    def __init__(self, function: Callable[[Array], Array], d_in: int, d_out: int):
        self.function, self.d_in, self.d_out = function, d_in, d_out
        self.r_in = self.r_out = None

    def _rotated(self, z):
        y = self.function(z if self.r_in is None else self.r_in.T @ z)
        return y if self.r_out is None else self.r_out @ y

    def __call__(self, x):
        flat = jax.vmap(self._rotated)(x.reshape(-1, self.d_in))
        return flat.reshape(*x.shape[:-1], self.d_out)

    def jacobian(self, x, r_in=None, r_out=None):
        mode = jax.jacfwd if self.d_in <= self.d_out else jax.jacrev
        j = jax.vmap(mode(self._rotated))(x)
        j = j if r_in is None else j @ r_in.T
        return j if r_out is None else jnp.einsum("po,noi->npi", r_out, j)

    def rotate(self, r_in, r_out):
        rotated = self
        if r_in is not None:
            composed = r_in if self.r_in is None else r_in @ self.r_in
            rotated = replace_fields(rotated, d_in=len(r_in), r_in=composed)
        if r_out is not None:
            rotated = replace_fields(
                rotated, d_out=len(r_out), r_out=r_out if self.r_out is None else r_out @ self.r_out
            )
        return rotated
