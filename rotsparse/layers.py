"""Layers: a view of one stage `y = f(x)` of a network, with its per-example Jacobian in closed form.

The Jacobian of every layer here is `J(x) = Σ_k L diag(g_k(x)) M_k`, with small corrections for a norm in front and a
skip connection around it. Rotated, `R_out J R_inᵀ = Σ_k (R_out L) diag(g_k) (M_k R_inᵀ)`: the rotations act on the
weights once, the examples only on the gates. No autodiff Jacobian is ever built.

Conventions: `x` is `[..., d_in]`, weights are `[out, in]`, `J` is `[d_out, d_in]`. A rotation argument of `None` means
the identity; it may have fewer rows than columns, and then selects a subspace.
"""

import abc
import functools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rotsparse.activations import Activation, as_activation, derivative, value_and_derivative
from rotsparse.checks import weight
from rotsparse.norms import Norm

Matrix = Float[Array, "out in"]


class Layer(eqx.Module):
    """One stage `y = f(x)` of a network."""

    d_in: eqx.AbstractVar[int]
    d_out: eqx.AbstractVar[int]

    @abc.abstractmethod
    def __call__(self, x: Float[Array, "*n d_in"]) -> Float[Array, "*n d_out"]:
        """The layer's output."""

    @abc.abstractmethod
    def jacobian(self, x: Float[Array, "n d_in"], r_in=None, r_out=None) -> Float[Array, "n d_out d_in"]:
        """`R_out J(x) R_inᵀ` of every example: entry `[n, o, i]` is how far rotated output o moves for a small change
        of rotated input i."""

    def gathered(self, x: Float[Array, "n d_in"]) -> "Layer":
        """The same layer with a faster `jacobian` for these examples, where most hidden neurons have a gate of exactly
        zero on each of them (ReLU): only the active ones enter the matrix products. Itself where that does not pay.

        For other examples, on which more neurons are active than on any of these, its Jacobian is NaN.
        """
        return self

    @abc.abstractmethod
    def rotate(self, r_in: Matrix | None, r_out: Matrix | None) -> "Layer":
        """The layer `z ↦ R_out f(R_inᵀ z)`, in the same arithmetic as its weights. `rotsparse.fold` does this in
        float64 and checks the result."""


class MLP(Layer):
    """`y = W_out φ(W_in N(x) + b_in) + b_out  (+ x)`, with `N` a norm or the identity.

    With `w_out=None` it is a single layer `φ(W_in N(x) + b_in)`; see `Dense`.

    `J = W_out diag(φ'(a)) W_in N'(x) (+ I)`, `a = W_in N(x) + b_in`. Forward cost of one rotated Jacobian:
    `2·d_out·d_hidden·d_in` flops.

    Raises `ValueError` where the shapes do not fit each other, or weights are not finite floating-point numbers.
    """

    w_in: Matrix
    b_in: Float[Array, "hidden"] | None
    w_out: Matrix | None
    b_out: Float[Array, "d_out"] | None
    skip: Matrix | None
    norm: Norm | None
    activation: Activation = eqx.field(static=True)
    active: int | None = eqx.field(static=True)  # gathers so many neurons of each example

    def __init__(self, w_in, b_in=None, w_out=None, b_out=None, *, activation="relu", norm=None, skip=False):
        self.w_in = weight("w_in", w_in, (None, None))
        hidden, d_in = self.w_in.shape
        self.b_in = None if b_in is None else weight("b_in", b_in, (hidden,))
        self.w_out = None if w_out is None else weight("w_out", w_out, (None, hidden))
        d_out = hidden if self.w_out is None else self.w_out.shape[0]
        self.b_out = None if b_out is None else weight("b_out", b_out, (d_out,))
        self.activation = as_activation(activation)
        self.norm = _check_norm(norm, d_in)
        self.skip = _skip_matrix(skip, d_out, d_in, self.w_in.dtype)
        self.active = None

    @property
    def d_in(self) -> int:
        return self.w_in.shape[1]

    @property
    def d_out(self) -> int:
        return self.w_in.shape[0] if self.w_out is None else self.w_out.shape[0]

    def __call__(self, x):
        h = self.activation(_affine(self.w_in, self.b_in, _normed(self.norm, x)))
        y = h if self.w_out is None else _affine(self.w_out, None, h)
        return _add(y, self.b_out, self.skip, x)

    def jacobian(self, x, r_in=None, r_out=None):
        return _jacobian(self.w_out, self._gates(x), [self.w_in], self.norm, self.skip, x, r_in, r_out, self.active)

    def gathered(self, x):
        return self if self.w_out is None else _replace(self, active=_worth_gathering(self, x))

    def _gates(self, x):
        # In full whatever the objective's precision is: which neurons are active must not depend on who asks.
        with jax.default_matmul_precision("highest"):
            return [derivative(self.activation, _affine(self.w_in, self.b_in, _normed(self.norm, x)))]

    def rotate(self, r_in, r_out):
        w_out = np.eye(self.d_out, dtype=self.w_in.dtype) if self.w_out is None else self.w_out
        rotated = self if r_in is None else _replace(self, w_in=_absorb(self.norm, self.w_in) @ r_in.T)
        if r_in is not None and self.norm is not None:
            rotated = _replace(rotated, norm=self.norm.rotate(r_in), b_in=_shifted(self.norm, self.w_in, self.b_in))
        if r_out is not None:
            rotated = _replace(rotated, w_out=r_out @ w_out, b_out=None if self.b_out is None else r_out @ self.b_out)
        return _replace(rotated, skip=_rotated_skip(self.skip, r_in, r_out))


def Dense(w, b=None, *, activation="relu", norm=None, skip=False) -> MLP:
    """A single layer `y = φ(W N(x) + b) (+ x)`: `L = I`, `g = φ'(Wx + b)`, `M = W`.

    Its outputs are neurons: an elementwise φ pins their basis, so only a block that ends in a linear map has outputs
    that can be rotated for free. Rotating them here is still meaningful for analysis, and the inverse is absorbed by
    the next layer.
    """
    return MLP(w, b, activation=activation, norm=norm, skip=skip)


class GatedMLP(Layer):
    """`y = W_down (φ(W_gate N(x)) ⊙ W_up N(x))  (+ x)`: SwiGLU and its relatives (Shazeer, "GLU Variants Improve
    Transformer", 2020).

    `J = W_down [diag(φ'(a) ⊙ u) W_gate + diag(φ(a)) W_up] N'(x) (+ I)`. The two terms are added before the large
    matrix product, so a gated block costs the same `2·d_out·d_hidden·d_in` as a plain one.

    Raises `ValueError` where the shapes do not fit each other, or weights are not finite floating-point numbers.
    """

    w_gate: Matrix
    w_up: Matrix
    w_down: Matrix
    b_gate: Float[Array, "hidden"] | None
    b_up: Float[Array, "hidden"] | None
    b_down: Float[Array, "d_out"] | None
    skip: Matrix | None
    norm: Norm | None
    activation: Activation = eqx.field(static=True)
    active: int | None = eqx.field(static=True)  # gathers so many neurons of each example

    def __init__(
        self, w_gate, w_up, w_down, *, b_gate=None, b_up=None, b_down=None, activation="silu", norm=None, skip=False
    ):
        self.w_gate = weight("w_gate", w_gate, (None, None))
        hidden, d_in = self.w_gate.shape
        self.w_up = weight("w_up", w_up, (hidden, d_in))
        self.w_down = weight("w_down", w_down, (None, hidden))
        self.b_gate = None if b_gate is None else weight("b_gate", b_gate, (hidden,))
        self.b_up = None if b_up is None else weight("b_up", b_up, (hidden,))
        self.b_down = None if b_down is None else weight("b_down", b_down, (self.w_down.shape[0],))
        self.activation = as_activation(activation)
        self.norm = _check_norm(norm, d_in)
        self.skip = _skip_matrix(skip, self.w_down.shape[0], d_in, self.w_gate.dtype)
        self.active = None

    @property
    def d_in(self) -> int:
        return self.w_gate.shape[1]

    @property
    def d_out(self) -> int:
        return self.w_down.shape[0]

    def __call__(self, x):
        u = _normed(self.norm, x)
        h = self.activation(_affine(self.w_gate, self.b_gate, u)) * _affine(self.w_up, self.b_up, u)
        return _add(_affine(self.w_down, None, h), self.b_down, self.skip, x)

    def jacobian(self, x, r_in=None, r_out=None):
        rights = [self.w_gate, self.w_up]
        return _jacobian(self.w_down, self._gates(x), rights, self.norm, self.skip, x, r_in, r_out, self.active)

    def gathered(self, x):
        return _replace(self, active=_worth_gathering(self, x))

    def _gates(self, x):
        with jax.default_matmul_precision("highest"):  # as in MLP
            u = _normed(self.norm, x)
            value, slope = value_and_derivative(self.activation, _affine(self.w_gate, self.b_gate, u))
            return [slope * _affine(self.w_up, self.b_up, u), value]

    def rotate(self, r_in, r_out):
        rotated = self
        if r_in is not None:
            rotated = _replace(
                rotated,
                w_gate=_absorb(self.norm, self.w_gate) @ r_in.T,
                w_up=_absorb(self.norm, self.w_up) @ r_in.T,
            )
            if self.norm is not None:
                rotated = _replace(
                    rotated,
                    norm=self.norm.rotate(r_in),
                    b_gate=_shifted(self.norm, self.w_gate, self.b_gate),
                    b_up=_shifted(self.norm, self.w_up, self.b_up),
                )
        if r_out is not None:
            b_down = None if self.b_down is None else r_out @ self.b_down
            rotated = _replace(rotated, w_down=r_out @ self.w_down, b_down=b_down)
        return _replace(rotated, skip=_rotated_skip(self.skip, r_in, r_out))


class FunctionLayer(Layer):
    """Any differentiable `f: [d_in] → [d_out]` of one example, e.g. several layers at once or an attention block.

    Its Jacobian is by forward- or reverse-mode autodiff, whichever has fewer columns to push through: general, but
    slower than the closed forms, and held in memory for one chunk of examples at a time.
    """

    function: Callable[[Array], Array]
    d_in: int = eqx.field(static=True)
    d_out: int = eqx.field(static=True)
    r_in: Matrix | None = None
    r_out: Matrix | None = None

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
            rotated = _replace(rotated, d_in=len(r_in), r_in=r_in if self.r_in is None else r_in @ self.r_in)
        if r_out is not None:
            rotated = _replace(rotated, d_out=len(r_out), r_out=r_out if self.r_out is None else r_out @ self.r_out)
        return rotated


class Subspace(Layer):
    """`J ↦ P_out J P_inᵀ` for frames P with orthonormal rows: a layer seen through some of its directions. The
    examples stay whole, so gates and norms are those of the original layer."""

    layer: Layer
    frame_in: Float[Array, "k_in d_in"]
    frame_out: Float[Array, "k_out d_out"]

    def __init__(self, layer: Layer, frame_in: Matrix, frame_out: Matrix):
        self.layer, self.frame_in, self.frame_out = layer, frame_in, frame_out

    @property
    def d_in(self) -> int:
        return self.frame_in.shape[0]

    @property
    def d_out(self) -> int:
        return self.frame_out.shape[0]

    def __call__(self, x):
        return self.layer(x) @ self.frame_out.T

    def jacobian(self, x, r_in=None, r_out=None):
        frame_in = self.frame_in if r_in is None else r_in @ self.frame_in
        frame_out = self.frame_out if r_out is None else r_out @ self.frame_out
        return self.layer.jacobian(x, frame_in, frame_out)

    def gathered(self, x):
        return Subspace(self.layer.gathered(x), self.frame_in, self.frame_out)

    def rotate(self, r_in, r_out):
        frame_in = self.frame_in if r_in is None else r_in @ self.frame_in
        frame_out = self.frame_out if r_out is None else r_out @ self.frame_out
        return Subspace(self.layer, frame_in, frame_out)


# --- shared by the closed forms ---------------------------------------------------------------------------------


def _jacobian(left, gates, rights, norm, skip, x, r_in, r_out, active):
    """`Z = A · Σ_k diag(g_k) B_k` with `A = R_out L`, `B_k = M_k D R_inᵀ`, plus the rank-one part of the norm's
    derivative and the rotated skip connection.

    The norm's derivative is `(1/r)(D - (γ⊙n̂) n̂ᵀ/d)` with `D = diag(γ) P` (see `norms`): the scalar `1/r` goes into the
    gates, and the rank-one part stays factored, `-(A w)(R_in n̂)ᵀ/d` with `w = Σ_k g_k ⊙ M_k(γ⊙n̂)`.
    """
    a = left if r_out is None else (r_out if left is None else r_out @ left)
    correction = None
    if norm is not None:
        direction, inverse_scale = norm.direction(x)
        gates = [g * inverse_scale for g in gates]
        pushed = [_affine(_absorb(norm, m), None, direction) for m in rights]
        rank_one = sum(g * p for g, p in zip(gates, pushed, strict=True)) / norm.d
        rank_one = rank_one if a is None else rank_one @ a.T
        direction = direction if r_in is None else direction @ r_in.T
        correction = rank_one[:, :, None] * direction[:, None, :]
        rights = [_absorb(norm, m) for m in rights]
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
    skip = _rotated_skip(skip, r_in, r_out)
    return z if skip is None else z + skip


# Measured on two CPU cores: with two fifths of the neurons active gathering them saves little, with a half nothing.
GATHERED_SHARE = 0.4


def _worth_gathering(layer, x) -> int | None:
    """The most neurons that are active on any example, if they are few enough to be gathered."""
    if derivative(layer.activation, jnp.asarray(-1.0, x.dtype)) != 0:
        return None  # no ReLU of any kind: skip the count
    rows = 4096  # bounds the memory for the gates
    most = max(int(_most_active(layer, x[begin : begin + rows])) for begin in range(0, len(x), rows))
    hidden = (layer.w_in if isinstance(layer, MLP) else layer.w_gate).shape[0]
    return max(1, most) if most <= GATHERED_SHARE * hidden else None


@eqx.filter_jit
def _most_active(layer, x):
    return jnp.max(jnp.sum(_active(layer._gates(x)), axis=1))


def _active(gates):
    """Which neurons have a gate that is not zero, `[n, hidden]`."""
    return functools.reduce(jnp.logical_or, [g != 0 for g in gates])


def _gather(gates, active: int):
    """The indices of the active neurons of each example, `[n, active]`, and their gates; places left over have gates of
    zero. An example with more of them than there are places gets NaN: it would lose some."""
    used = _active(gates)
    index = jax.vmap(lambda u: jnp.nonzero(u, size=active, fill_value=0)[0])(used)
    count = jnp.sum(used, axis=1, keepdims=True)
    place = jnp.where(jnp.arange(active) < count, 1.0, 0.0)
    place = jnp.where(count <= active, place, jnp.nan)
    return index, [jnp.take_along_axis(g, index, axis=1) * place.astype(g.dtype) for g in gates]


def _affine(w, b, x):
    y = x @ w.T
    return y if b is None else y + b


def _normed(norm, x):
    return x if norm is None else norm(x)


def _absorb(norm, w):
    """`W diag(γ) P`: the norm's scale and centring moved into the weights behind it."""
    return w if norm is None else norm.absorb(w)


def _shifted(norm, w, b):
    """The bias after the norm's own bias β moved into it: `b + Wβ`."""
    if norm is None or norm.bias is None:
        return b
    return w @ norm.bias if b is None else b + w @ norm.bias


def _add(y, bias, skip, x):
    y = y if bias is None else y + bias
    return y if skip is None else y + x @ skip.T


def _rotated_skip(skip, r_in, r_out):
    if skip is None:
        return None
    skip = skip if r_in is None else skip @ r_in.T
    return skip if r_out is None else r_out @ skip


def _skip_matrix(skip, d_out, d_in, dtype):
    if skip is False or skip is None:
        return None
    if skip is True and d_out != d_in:
        raise ValueError(
            f"a skip connection adds the input to the output: expected d_in = d_out, got {d_in} and {d_out}"
        )
    return weight("skip", np.eye(d_in, dtype=dtype) if skip is True else skip, (d_out, d_in))


def _check_norm(norm, d_in):
    if norm is not None and norm.d != d_in:
        raise ValueError(f"the norm has width {norm.d}, but the layer's input has width {d_in}")
    return norm


def _replace(layer, **fields):
    """A copy of a frozen module with other values in some fields (`eqx.tree_at` cannot put an array where None was)."""
    new = object.__new__(type(layer))
    for name in layer.__dataclass_fields__:
        object.__setattr__(new, name, fields.get(name, getattr(layer, name)))
    return new
