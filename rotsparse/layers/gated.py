"""Gated MLP blocks."""

import equinox as eqx
from jaxtyping import Float

from rotsparse._core.checks import weight
from rotsparse._core.modules import replace_fields
from rotsparse._core.precision import full_precision
from rotsparse._core.types import AnyArray
from rotsparse.layers import _closed_forms as cf
from rotsparse.layers.activations import Activation, as_activation, value_and_derivative
from rotsparse.layers.base import ClosedForm, Matrix, normalized
from rotsparse.layers.norms import Norm


class GatedMLP(ClosedForm):
    """`y = W_down (φ(W_gate N(x)) ⊙ W_up N(x))  (+ x)`: SwiGLU and similar blocks (Shazeer, "GLU Variants Improve
    Transformer", 2020).

    `J = W_down [diag(φ'(a) ⊙ u) W_gate + diag(φ(a)) W_up] N'(x) (+ I)`. The two terms are added before the large
    matrix product, so a gated block costs the same `2·d_out·d_hidden·d_in` as a plain one.

    Raises `ValueError` if the shapes do not fit each other, or weights are not finite floating-point numbers.
    """

    w_gate: Matrix
    w_up: Matrix
    w_down: Matrix
    b_gate: Float[AnyArray, "hidden"] | None
    b_up: Float[AnyArray, "hidden"] | None
    b_down: Float[AnyArray, "d_out"] | None
    skip: Matrix | None
    norm: Norm | None
    activation: Activation = eqx.field(static=True)
    active: int | None = eqx.field(static=True)

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
        self.norm = cf.check_norm(norm, d_in)
        self.skip = cf.skip_matrix(skip, self.w_down.shape[0], d_in, self.w_gate.dtype)
        self.active = None

    @property
    def d_in(self) -> int:
        return self.w_gate.shape[1]

    @property
    def d_out(self) -> int:
        return self.w_down.shape[0]

    @property
    def left(self):
        return self.w_down

    @property
    def rights(self):
        return (self.w_gate, self.w_up)

    def weights(self):
        return cf.present(
            w_gate=self.w_gate, w_up=self.w_up, w_down=self.w_down,
            b_gate=self.b_gate, b_up=self.b_up, b_down=self.b_down,
        )  # fmt: skip

    def __call__(self, x):
        u = normalized(self.norm, x)
        h = self.activation(cf.affine(self.w_gate, self.b_gate, u)) * cf.affine(self.w_up, self.b_up, u)
        return cf.with_skip(cf.affine(self.w_down, None, h), self.b_down, self.skip, x)

    def gates(self, x):
        with full_precision():
            u = normalized(self.norm, x)
            value, slope = value_and_derivative(self.activation, cf.affine(self.w_gate, self.b_gate, u))
            return (slope * cf.affine(self.w_up, self.b_up, u), value)

    def rotate(self, r_in, r_out):
        rotated = self
        if r_in is not None:
            rotated = replace_fields(
                rotated,
                w_gate=cf.absorbed(self.norm, self.w_gate) @ r_in.T,
                w_up=cf.absorbed(self.norm, self.w_up) @ r_in.T,
            )
            if self.norm is not None:
                rotated = replace_fields(
                    rotated,
                    norm=self.norm.rotate(r_in),
                    b_gate=cf.shifted_bias(self.norm, self.w_gate, self.b_gate),
                    b_up=cf.shifted_bias(self.norm, self.w_up, self.b_up),
                )
        if r_out is not None:
            b_down = None if self.b_down is None else r_out @ self.b_down
            rotated = replace_fields(rotated, w_down=r_out @ self.w_down, b_down=b_down)
        return replace_fields(rotated, skip=cf.rotated_skip(self.skip, r_in, r_out))
