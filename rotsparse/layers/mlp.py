"""A single layer, `Dense`, and an MLP block, `MLP`."""

import equinox as eqx
import numpy as np
from jaxtyping import Float

from rotsparse._core.checks import weight
from rotsparse._core.modules import replace_fields
from rotsparse._core.precision import full_precision
from rotsparse._core.types import AnyArray
from rotsparse.layers import _closed_forms as cf
from rotsparse.layers.activations import Activation, as_activation, derivative
from rotsparse.layers.base import ClosedForm, Matrix, normalized
from rotsparse.layers.norms import Norm


class MLP(ClosedForm):
    """`y = W_out φ(W_in N(x) + b_in) + b_out  (+ x)`, with `N` a norm or the identity.

    `J = W_out diag(φ'(a)) W_in N'(x) (+ I)`, `a = W_in N(x) + b_in`. Forward cost of one rotated Jacobian:
    `2·d_out·d_hidden·d_in` flops.

    Raises `ValueError` if the shapes do not fit each other, or weights are not finite floating-point numbers.
    """

    w_in: Matrix
    b_in: Float[AnyArray, "hidden"] | None
    w_out: Matrix
    b_out: Float[AnyArray, "d_out"] | None
    skip: Matrix | None
    norm: Norm | None
    activation: Activation = eqx.field(static=True)
    active: int | None = eqx.field(static=True)

    def __init__(self, w_in, b_in=None, w_out=None, b_out=None, *, activation="relu", norm=None, skip=False):
        if w_out is None:
            raise ValueError("an MLP block ends in w_out, and there is none: a single layer is Dense(w, b)")
        self.w_in = weight("w_in", w_in, (None, None))
        hidden, d_in = self.w_in.shape
        self.b_in = None if b_in is None else weight("b_in", b_in, (hidden,))
        self.w_out = weight("w_out", w_out, (None, hidden))
        d_out = self.w_out.shape[0]
        self.b_out = None if b_out is None else weight("b_out", b_out, (d_out,))
        self.activation = as_activation(activation)
        self.norm = cf.check_norm(norm, d_in)
        self.skip = cf.skip_matrix(skip, d_out, d_in, self.w_in.dtype)
        self.active = None

    @property
    def d_in(self) -> int:
        return self.w_in.shape[1]

    @property
    def d_out(self) -> int:
        return self.w_out.shape[0]

    @property
    def left(self):
        return self.w_out

    @property
    def rights(self):
        return (self.w_in,)

    def weights(self):
        return cf.present(w_in=self.w_in, b_in=self.b_in, w_out=self.w_out, b_out=self.b_out)

    def __call__(self, x):
        h = self.activation(cf.affine(self.w_in, self.b_in, normalized(self.norm, x)))
        return cf.with_skip(cf.affine(self.w_out, None, h), self.b_out, self.skip, x)

    def gates(self, x):
        with full_precision():
            return (derivative(self.activation, cf.affine(self.w_in, self.b_in, normalized(self.norm, x))),)

    def rotate(self, r_in, r_out):
        rotated = self if r_in is None else replace_fields(self, w_in=cf.absorbed(self.norm, self.w_in) @ r_in.T)
        if r_in is not None and self.norm is not None:
            b_in = cf.shifted_bias(self.norm, self.w_in, self.b_in)
            rotated = replace_fields(rotated, norm=self.norm.rotate(r_in), b_in=b_in)
        if r_out is not None:
            b_out = None if self.b_out is None else r_out @ self.b_out
            rotated = replace_fields(rotated, w_out=r_out @ self.w_out, b_out=b_out)
        return replace_fields(rotated, skip=cf.rotated_skip(self.skip, r_in, r_out))


class Dense(ClosedForm):
    """A single layer `y = φ(W N(x) + b) (+ x)`: `L = I`, `g = φ'(Wx + b)`, `M = W`.

    Its outputs are neurons, whose basis is fixed by the elementwise φ. To rotate them, `rotate` returns an `MLP` that
    ends in the matrix `R_out`, and the next layer must multiply by `R_outᵀ`. (A block that ends in a linear map needs
    no additional matrix.)

    Raises `ValueError` if the shapes do not fit each other, or weights are not finite floating-point numbers.
    """

    w: Matrix
    b: Float[AnyArray, "d_out"] | None
    skip: Matrix | None
    norm: Norm | None
    activation: Activation = eqx.field(static=True)
    active: int | None = eqx.field(static=True)

    def __init__(self, w, b=None, *, activation="relu", norm=None, skip=False):
        self.w = weight("w", w, (None, None))
        d_out, d_in = self.w.shape
        self.b = None if b is None else weight("b", b, (d_out,))
        self.activation = as_activation(activation)
        self.norm = cf.check_norm(norm, d_in)
        self.skip = cf.skip_matrix(skip, d_out, d_in, self.w.dtype)
        self.active = None

    @property
    def d_in(self) -> int:
        return self.w.shape[1]

    @property
    def d_out(self) -> int:
        return self.w.shape[0]

    @property
    def left(self):
        return None

    @property
    def rights(self):
        return (self.w,)

    def weights(self):
        return cf.present(w=self.w, b=self.b)

    def __call__(self, x):
        h = self.activation(cf.affine(self.w, self.b, normalized(self.norm, x)))
        return cf.with_skip(h, None, self.skip, x)

    def gates(self, x):
        with full_precision():
            return (derivative(self.activation, cf.affine(self.w, self.b, normalized(self.norm, x))),)

    def rotate(self, r_in, r_out):
        if r_out is not None:
            outputs = np.eye(self.d_out, dtype=self.w.dtype)
            block = MLP(self.w, self.b, outputs, norm=self.norm)
            return replace_fields(block, activation=self.activation, skip=self.skip).rotate(r_in, r_out)
        rotated = self if r_in is None else replace_fields(self, w=cf.absorbed(self.norm, self.w) @ r_in.T)
        if r_in is not None and self.norm is not None:
            b = cf.shifted_bias(self.norm, self.w, self.b)
            rotated = replace_fields(rotated, norm=self.norm.rotate(r_in), b=b)
        return replace_fields(rotated, skip=cf.rotated_skip(self.skip, r_in, r_out))
