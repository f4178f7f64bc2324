"""`E[J]`, `E[JᵀJ]` and `E[JJᵀ]` of a closed-form layer without forming a Jacobian.

Of `J = C + S`, `C = L Σ_k diag(g_k) M_k`, only second moments of the gates are needed:

    E[CᵀC] = Σ_kl M_kᵀ (E[g_k g_lᵀ] ∘ LᵀL) M_l        E[CCᵀ] = L (Σ_kl E[g_k g_lᵀ] ∘ M_k M_lᵀ) Lᵀ

which costs `2·h²` flops an example instead of `2·d_out·d_in·(h + d_in + d_out)`. A norm in front multiplies the gates
by `1/r` and subtracts the rank-one matrix `u n̂ᵀ` (see `norms`), whose cross terms need one vector an example.
"""

import functools
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rotsparse._core.precision import full_precision
from rotsparse._core.types import AnyArray, Rows
from rotsparse.data.moments import block_rows, chunks
from rotsparse.layers._closed_forms import absorbed
from rotsparse.layers.base import ClosedForm


class JacobianMoments(NamedTuple):
    """`E[J]`, `E[JᵀJ]` and `E[JJᵀ]` in float64."""

    mean: Float[np.ndarray, "d_out d_in"]
    gram_in: Float[np.ndarray, "d_in d_in"]
    gram_out: Float[np.ndarray, "d_out d_out"]


class _Sums(NamedTuple):
    """Sums over examples, or their means, with `g` of all ways in one after another and the rank-one part `u vᵀ`."""

    gates: Float[AnyArray, "k"]  # g
    pairs: Float[AnyArray, "k k"]  # g gᵀ
    rank_one: Float[AnyArray, "d_out d_in"]  # u vᵀ
    inward: Float[AnyArray, "d_in d_in"]  # |u|² v vᵀ - Cᵀu vᵀ - v uᵀC
    outward: Float[AnyArray, "d_out d_out"]  # |v|² u uᵀ - C v uᵀ - u vᵀCᵀ


def closed_moments(layer: ClosedForm, x: Rows) -> JacobianMoments:
    """The moments over the examples."""
    of, means = _Matrices.of(layer), _means(layer, x)
    return JacobianMoments(of.mean(means), of.gram_in(means), of.gram_out(means))


def closed_gram(layer: ClosedForm, x: Rows) -> Float[np.ndarray, "d_in d_in"]:
    """`E[JᵀJ]` alone, in half of the time."""
    return _Matrices.of(layer).gram_in(_means(layer, x))


def _means(layer: ClosedForm, x: Rows) -> _Sums:
    """The sums divided by the number of examples, in float64."""
    total: list[np.ndarray] | None = None
    for rows, count in chunks(x, block_rows(len(layer.rights) * len(layer.rights[0]) + layer.d_in + layer.d_out)):
        counted = jnp.asarray(np.arange(len(rows)) < count, x.dtype)
        sums = [np.asarray(s, np.float64) for s in _sums(layer, jnp.asarray(rows), counted)]
        total = sums if total is None else [t + s for t, s in zip(total, sums, strict=True)]
    assert total is not None
    return _Sums(*(t / len(x) for t in total))


class _Matrices(NamedTuple):
    """L, every M_k one below the other, and S, in float64."""

    left: Float[np.ndarray, "d_out h"]
    rights: Float[np.ndarray, "k d_in"]
    skip: Float[np.ndarray, "d_out d_in"] | None

    @classmethod
    def of(cls, layer: ClosedForm) -> "_Matrices":
        left = np.eye(layer.d_out) if layer.left is None else np.asarray(layer.left, np.float64)
        rights = np.concatenate([np.asarray(absorbed(layer.norm, m), np.float64) for m in layer.rights])
        return cls(left, rights, None if layer.skip is None else np.asarray(layer.skip, np.float64))

    def mean(self, means: _Sums) -> Float[np.ndarray, "d_out d_in"]:
        closed = self._closed_mean(means)
        return closed if self.skip is None else closed + self.skip

    def gram_in(self, means: _Sums) -> Float[np.ndarray, "d_in d_in"]:
        reach = means.pairs * np.tile(self.left.T @ self.left, (self._ways, self._ways))
        gram = self.rights.T @ (reach @ self.rights) + means.inward
        if self.skip is None:
            return gram
        cross = self._closed_mean(means).T @ self.skip
        return gram + cross + cross.T + self.skip.T @ self.skip

    def gram_out(self, means: _Sums) -> Float[np.ndarray, "d_out d_out"]:
        met = self._of_ways(self._of_ways(means.pairs * (self.rights @ self.rights.T)).T).T
        gram = self.left @ met @ self.left.T + means.outward
        if self.skip is None:
            return gram
        cross = self._closed_mean(means) @ self.skip.T
        return gram + cross + cross.T + self.skip @ self.skip.T

    def _closed_mean(self, means: _Sums) -> Float[np.ndarray, "d_out d_in"]:
        """`E[C]`."""
        return self.left @ self._of_ways(means.gates[:, None] * self.rights) - means.rank_one

    @property
    def _ways(self) -> int:
        return len(self.rights) // self.left.shape[1]

    def _of_ways(self, rows: Float[AnyArray, "k c"]) -> Float[AnyArray, "h c"]:
        """The sum over the ways in, of which each has h of these rows."""
        return rows.reshape(self._ways, -1, rows.shape[1]).sum(axis=0)


@eqx.filter_jit
def _sums(layer: ClosedForm, x: Float[Array, "n d_in"], counted: Float[Array, "n"]) -> _Sums:
    with full_precision():
        gates = list(layer.gates(x))
        rank_one = jnp.zeros((layer.d_out, layer.d_in), x.dtype)
        inward, outward = jnp.zeros((layer.d_in,) * 2, x.dtype), jnp.zeros((layer.d_out,) * 2, x.dtype)
        if layer.norm is not None:
            gates, rights, v, along = layer.norm.derivative_factors(gates, layer.rights, x)
            left = jnp.eye(layer.d_out, dtype=x.dtype) if layer.left is None else jnp.asarray(layer.left)
            pushed = along @ left.T  # C v
            u = pushed / layer.norm.d
            pulled = functools.reduce(
                jnp.add, [(g * (u @ left)) @ m for g, m in zip(gates, rights, strict=True)]
            )  # Cᵀu
            v, u = v * counted[:, None], u * counted[:, None]
            rank_one = u.T @ v
            cross = pulled.T @ v
            inward = (v * jnp.sum(u * u, axis=1, keepdims=True)).T @ v - cross - cross.T
            cross = pushed.T @ u
            outward = (u * jnp.sum(v * v, axis=1, keepdims=True)).T @ u - cross - cross.T
        g = jnp.concatenate(gates, axis=1) * counted[:, None]
        return _Sums(jnp.sum(g, axis=0), g.T @ g, rank_one, inward, outward)
