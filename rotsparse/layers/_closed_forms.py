"""The arithmetic of closed-form Jacobians."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from rotsparse._core.checks import weight
from rotsparse.layers.activations import derivative

# Active neurons are gathered if they are at most this share of all. Measured on two CPU cores: at 0.4 this saves
# little, at 0.5 nothing.
GATHERED_SHARE = 0.4


def gated(gates, rights, norm, x):
    """What of the Jacobian depends on the example: the gates, and with a norm the two factors of its rank-one part."""
    if norm is None:
        return tuple(gates), None
    gates, _, direction, along = norm.derivative_factors(gates, rights, x)
    return tuple(gates), (along / norm.d, direction)


def jacobian(left, found, rights, norm, skip, r_in, r_out, active):
    """`Z = A · Σ_k diag(g_k) B_k` with `A = R_out L`, `B_k = M_k D R_inᵀ`, plus the rank-one part of the norm's
    derivative and the rotated skip connection; `found` are the results of `gated`.

    The norm's derivative is `(1/r)(D - (γ⊙n̂) n̂ᵀ/d)` with `D = diag(γ) P` (see `norms`): the scalar `1/r` goes into
    the gates, and the rank-one part stays factored, `-(A w)(R_in n̂)ᵀ/d` with `w = Σ_k g_k ⊙ M_k(γ⊙n̂)`.
    """
    a = left if r_out is None else (r_out if left is None else r_out @ left)
    gates, factors = found
    correction = None
    if factors is not None:
        rank_one, direction = factors
        rank_one = rank_one if a is None else rank_one @ a.T
        direction = direction if r_in is None else direction @ r_in.T
        correction = rank_one[:, :, None] * direction[:, None, :]
    rights = [absorbed(norm, m) for m in rights]
    b = rights if r_in is None else [m @ r_in.T for m in rights]
    if active is None:
        # [h, n, d_in] so that the product with A is one large matrix product over all examples of the chunk.
        gated = sum(g.T[:, :, None] * m[:, None, :] for g, m in zip(gates, b, strict=True))
        z = gated if a is None else jnp.einsum("oh,hni->oni", a, gated)
        z = jnp.swapaxes(z, 0, 1)
    else:
        assert a is not None
        index, gates = _gather(gates, active)
        gated = sum(g[:, :, None] * jnp.take(m, index, axis=0) for g, m in zip(gates, b, strict=True))
        z = jnp.einsum("nho,nhi->noi", jnp.take(a.T, index, axis=0), gated)
    z = z if correction is None else z - correction
    skip = rotated_skip(skip, r_in, r_out)
    return z if skip is None else z + skip


def active_to_gather(layer, x) -> int | None:
    """The largest number of active neurons on any example; `None` if gathering them would not be faster."""
    if derivative(layer.activation, jnp.asarray(-1.0, x.dtype)) != 0:
        return None  # gates are never exactly zero: skip the count
    rows = 4096  # bounds the memory for the gates
    most = max(int(_most_active(layer, x[begin : begin + rows])) for begin in range(0, len(x), rows))
    return max(1, most) if most <= GATHERED_SHARE * len(layer.rights[0]) else None


@eqx.filter_jit
def _most_active(layer, x):
    return jnp.max(jnp.sum(_active(layer.gates(x)), axis=1))


def _active(gates):
    """Which neurons have a nonzero gate, `[n, hidden]`."""
    return functools.reduce(jnp.logical_or, [g != 0 for g in gates])


def _gather(gates, active: int):
    """The indices of the active neurons of each example, `[n, active]`, and their gates. Unused places have gates of
    zero. An example with more active neurons than places gets NaN, because some neurons would be missing."""
    used = _active(gates)
    index = jax.vmap(lambda u: jnp.nonzero(u, size=active, fill_value=0)[0])(used)
    count = jnp.sum(used, axis=1, keepdims=True)
    place = jnp.where(jnp.arange(active) < count, 1.0, 0.0)
    place = jnp.where(count <= active, place, jnp.nan)
    return index, [jnp.take_along_axis(g, index, axis=1) * place.astype(g.dtype) for g in gates]


def affine(w, b, x):
    """`W x + b`."""
    y = x @ w.T
    return y if b is None else y + b


def absorbed(norm, w):
    """`W diag(γ) P`: the norm's scale and centring, multiplied into the weights that follow it."""
    return w if norm is None else norm.absorb(w)


def shifted_bias(norm, w, b):
    """The bias plus the contribution of the norm's bias β: `b + Wβ`."""
    if norm is None or norm.bias is None:
        return b
    return w @ norm.bias if b is None else b + w @ norm.bias


def with_skip(y, bias, skip, x):
    """`y + bias + skip x`."""
    y = y if bias is None else y + bias
    return y if skip is None else y + x @ skip.T


def rotated_skip(skip, r_in, r_out):
    """`R_out skip R_inᵀ`."""
    if skip is None:
        return None
    skip = skip if r_in is None else skip @ r_in.T
    return skip if r_out is None else r_out @ skip


def skip_matrix(skip, d_out, d_in, dtype):
    """The matrix of a skip connection: the identity for `True`, `None` for `False`."""
    if skip is False or skip is None:
        return None
    if skip is True and d_out != d_in:
        raise ValueError(
            f"a skip connection adds the input to the output: expected d_in = d_out, got {d_in} and {d_out}"
        )
    return weight("skip", np.eye(d_in, dtype=dtype) if skip is True else skip, (d_out, d_in))


def check_norm(norm, d_in):
    """Return the norm. Raises `ValueError` if its width is not that of the layer's input."""
    if norm is not None and norm.d != d_in:
        raise ValueError(f"the norm has width {norm.d}, but the layer's input has width {d_in}")
    return norm


def present(**weights):
    """The weights that are not `None`."""
    return {name: w for name, w in weights.items() if w is not None}
