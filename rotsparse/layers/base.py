"""`Layer`: one stage `y = f(x)` of a network, with its per-example Jacobian.

The Jacobian of a layer made of weights is `J(x) = Σ_k L diag(g_k(x)) M_k`, with small corrections for a norm in front
and a skip connection around it (`ClosedForm`). Rotated, `R_out J R_inᵀ = Σ_k (R_out L) diag(g_k) (M_k R_inᵀ)`: the
rotations multiply the weights once, and only the gates depend on the example. No autodiff Jacobian is built.

Conventions: `x` is `[..., d_in]`, weights are `[out, in]`, `J` is `[d_out, d_in]`. A rotation argument of `None` means
the identity; it may have fewer rows than columns, and then selects a subspace.
"""

import abc
from typing import Any, TypeVar

import equinox as eqx
from jaxtyping import Array, Float

from rotsparse._core.modules import replace_fields
from rotsparse._core.types import AnyArray
from rotsparse.layers import _closed_forms
from rotsparse.layers.activations import Activation
from rotsparse.layers.norms import Norm

Matrix = Float[AnyArray, "_ _"]

AnyLayer = TypeVar("AnyLayer", bound="Layer")


class Layer(eqx.Module):
    """One stage `y = f(x)` of a network. Subclass it for a layer with a closed-form Jacobian of your own."""

    d_in: eqx.AbstractVar[int]
    d_out: eqx.AbstractVar[int]

    @abc.abstractmethod
    def __call__(self, x: Float[AnyArray, "*n d_in"]) -> Float[AnyArray, "*n d_out"]:
        """The layer's output."""

    @abc.abstractmethod
    def jacobian(self, x: Float[AnyArray, "n d_in"], r_in=None, r_out=None) -> Float[Array, "n d_out d_in"]:
        """`R_out J(x) R_inᵀ` of every example: entry `[n, o, i]` is the derivative of rotated output o with respect to
        rotated input i."""

    def prepared(self, x: Float[AnyArray, "n d_in"]) -> Any:
        """What of the Jacobians depends on the example and not on rotations, and is faster to compute for many examples
        at once than for one at a time (gates): a tree of arrays with a row for each example."""
        return ()

    def prepared_jacobian(
        self, x: Float[AnyArray, "n d_in"], prepared: Any, r_in=None, r_out=None
    ) -> Float[Array, "n _ _"]:
        """`jacobian(x, r_in, r_out)`, given `prepared(x)`."""
        return self.jacobian(x, r_in, r_out)

    @abc.abstractmethod
    def rotate(self, r_in: Matrix | None, r_out: Matrix | None) -> "Layer":
        """The layer `z ↦ R_out f(R_inᵀ z)`, computed in the dtype of its weights. `rotsparse.fold` does this in float64
        and checks the result."""

    def gathered(self, x: Float[AnyArray, "n d_in"]) -> "Layer":
        """The same layer with a faster `jacobian` for these examples, if most hidden neurons have a gate of exactly
        zero on each of them (ReLU): only active neurons enter the matrix products. Returns `self` if that is not
        faster.

        The Jacobian of an example with more active neurons than any of these examples is NaN.
        """
        return self

    def weights(self) -> dict[str, AnyArray]:
        """The layer's weight matrices and biases by name; empty for a layer without weights."""
        return {}

    def with_weights(self: AnyLayer, **weights: AnyArray) -> AnyLayer:
        """The same layer with some of its `weights()` replaced. Raises `ValueError` for an unknown name or another
        shape."""
        own = self.weights()
        for name, value in weights.items():
            if name not in own or value.shape != own[name].shape:
                had = {k: list(w.shape) for k, w in own.items()} or "no weights"
                raise ValueError(f"cannot replace {name} {list(value.shape)}: {type(self).__name__} has {had}")
        return replace_fields(self, **weights)


class ClosedForm(Layer):
    """A layer with the Jacobian `Σ_k L diag(g_k(x)) M_k`, plus terms for a norm in front and a skip connection."""

    skip: eqx.AbstractVar[Matrix | None]
    norm: eqx.AbstractVar[Norm | None]
    activation: eqx.AbstractVar[Activation]
    active: eqx.AbstractVar[int | None]  # how many neurons of each example `jacobian` gathers; None: all

    @property
    @abc.abstractmethod
    def left(self) -> Matrix | None:
        """L `[d_out, hidden]`; `None` for the identity, where the outputs are the neurons."""

    @property
    @abc.abstractmethod
    def rights(self) -> tuple[Matrix, ...]:
        """Every `M_k` `[hidden, d_in]`, without the norm."""

    @abc.abstractmethod
    def gates(self, x: Float[AnyArray, "n d_in"]) -> tuple[Float[Array, "n hidden"], ...]:
        """Every `g_k(x)`, always in full precision: which neurons are active must not depend on the precision of the
        objective."""

    def prepared(self, x):
        return _closed_forms.gated(self.gates(x), self.rights, self.norm, x)

    def prepared_jacobian(self, x, prepared, r_in=None, r_out=None):
        return _closed_forms.jacobian(self.left, prepared, self.rights, self.norm, self.skip, r_in, r_out, self.active)

    def jacobian(self, x, r_in=None, r_out=None):
        return self.prepared_jacobian(x, self.prepared(x), r_in, r_out)

    def gathered(self, x):
        return self if self.left is None else replace_fields(self, active=_closed_forms.active_to_gather(self, x))


def normalized(norm: Norm | None, x: Float[AnyArray, "*n d"]) -> Float[AnyArray, "*n d"]:
    """`N(x)`."""
    return x if norm is None else norm(x)
