"""Normalisation in front of a layer: RMSNorm and LayerNorm, in a form that is closed under rotation.

Both are `N(x) = γ ⊙ n̂ + β` with `n̂ = P x / r`, where `r = √(mean((Px)²) + ε)`; LayerNorm has `P = I - m mᵀ` with the
unit vector `m = 1/√d`, RMSNorm has `P = I`. Their derivative is `(1/r)(diag(γ) P - (γ⊙n̂) n̂ᵀ/d)`: a diagonal (and
centring) part, which is multiplied into the weights that follow, and a rank-one part.

In rotated coordinates `z = R x` the same norm has `m' = R m`, so `mean_direction` is a vector and not a flag. The
rotated norm has no `γ`: it does not commute with R and must first be multiplied into the weights.
"""

import functools
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rotsparse._core.checks import weight
from rotsparse._core.orthogonal import matmul
from rotsparse._core.types import AnyArray


class Norm(eqx.Module):
    """`N(x) = γ ⊙ n̂(x) + β`. Make one with `rms_norm` or `layer_norm`."""

    scale: Float[AnyArray, "d"] | None
    bias: Float[AnyArray, "d"] | None
    mean_direction: Float[AnyArray, "d"] | None
    d: int = eqx.field(static=True)
    eps: float = eqx.field(static=True)

    def direction(self, x: Float[AnyArray, "*n d"]) -> tuple[Float[Array, "*n d"], Float[Array, "*n 1"]]:
        """`n̂(x)` and `1/r(x)`."""
        if self.mean_direction is not None:
            x = x - matmul(x, self.mean_direction)[..., None] * self.mean_direction
        # The mean square is over all d coordinates, also in a rotated basis.
        inverse = 1 / jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) / self.d + self.eps)
        return inverse * x, inverse

    def __call__(self, x: Float[AnyArray, "*n d"]) -> Float[Array, "*n d"]:
        y = self.direction(x)[0]
        y = y if self.scale is None else y * self.scale
        return y if self.bias is None else y + self.bias

    def absorb(self, w: Float[AnyArray, "h d"]) -> Float[AnyArray, "h d"]:
        """`W diag(γ) P`."""
        w = w if self.scale is None else w * self.scale
        if self.mean_direction is None:
            return w
        return w - (w @ self.mean_direction)[:, None] * self.mean_direction

    def derivative_factors(
        self,
        gates: Sequence[Float[AnyArray, "n h"]],
        rights: Sequence[Float[AnyArray, "h d"]],
        x: Float[AnyArray, "n d"],
    ) -> tuple[list[Any], list[Any], Float[Array, "n d"], Float[Array, "n h"]]:
        """The factors of `Σ_k diag(g_k) M_k N'(x)`, which is `Σ_k diag(g_k/r) M_k D - c n̂ᵀ/d` with `D = diag(γ) P`: the
        gates `g_k/r`, the weights `M_k D`, the direction n̂ and `c = Σ_k g_k/r ⊙ M_k D n̂`."""
        direction, inverse = self.direction(x)
        scaled, absorbed = [g * inverse for g in gates], [self.absorb(m) for m in rights]
        along = [jnp.asarray(g * (direction @ m.T)) for g, m in zip(scaled, absorbed, strict=True)]
        return scaled, absorbed, direction, functools.reduce(jnp.add, along)

    def rotate(self, r: Float[AnyArray, "k d"]) -> "Norm":
        """The norm of `z = R x`, after γ and β have moved into the weights that follow.

        Raises `ValueError` for a LayerNorm and a rotation with fewer rows than columns, which would lose the mean
        direction.
        """
        if self.mean_direction is not None and r.shape[0] != r.shape[1]:
            raise ValueError(
                f"a LayerNorm can only be rotated by a square matrix, got {list(r.shape)}: centre the inputs in the "
                "layers before it and use an RMSNorm instead"
            )
        mean = None if self.mean_direction is None else r @ self.mean_direction
        return Norm(None, None, mean, self.d, self.eps)


def rms_norm(scale, eps: float = 1e-5) -> Norm:
    """RMSNorm, `γ ⊙ x / √(mean(x²) + ε)`. (Zhang & Sennrich 2019.)"""
    scale = weight("scale", scale, (None,))
    return Norm(scale, None, None, len(scale), eps)


def layer_norm(scale, bias=None, eps: float = 1e-5) -> Norm:
    """LayerNorm, `γ ⊙ (x - mean) / √(var + ε) + β`. (Ba, Kiros & Hinton 2016.)"""
    scale = weight("scale", scale, (None,))
    d = len(scale)
    bias = None if bias is None else weight("bias", bias, (None,))
    if bias is not None and len(bias) != d:
        raise ValueError(f"the norm's scale has {d} entries and its bias {len(bias)}: they should agree")
    return Norm(scale, bias, np.full(d, d**-0.5, dtype=scale.dtype), d, eps)
