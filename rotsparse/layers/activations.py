"""Elementwise nonlinearities φ and their derivatives.

An activation is any elementwise JAX function. The functions below carry the names that model configurations use.
`derivative(φ)` uses forward-mode autodiff, which costs one extra evaluation for an elementwise function.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rotsparse._core.types import AnyArray

Activation = Callable[[AnyArray], AnyArray]


def identity(a: AnyArray) -> AnyArray:
    """`φ(a) = a`: a linear layer."""
    return a


def relu(a: AnyArray) -> Array:
    """`φ(a) = max(a, 0)`, with `φ'(0) = 0`."""
    return jax.nn.relu(a)


def gelu(a: AnyArray) -> Array:
    """`φ(a) = a Φ(a)`, exact. (Hendrycks & Gimpel 2016.)"""
    return jax.nn.gelu(a, approximate=False)


def gelu_tanh(a: AnyArray) -> Array:
    """The tanh approximation of gelu that GPT-2 and Gemma use."""
    return jax.nn.gelu(a, approximate=True)


def silu(a: AnyArray) -> Array:
    """`φ(a) = a σ(a)`, also called swish."""
    return jax.nn.silu(a)


def tanh(a: AnyArray) -> Array:
    """`φ(a) = tanh(a)`."""
    return jnp.tanh(a)


def sigmoid(a: AnyArray) -> Array:
    """`φ(a) = 1/(1 + exp(-a))`."""
    return jax.nn.sigmoid(a)


def quick_gelu(a: AnyArray) -> Array:
    """`φ(a) = a σ(1.702 a)`, as in CLIP."""
    return jax.nn.sigmoid(1.702 * a) * a


def squared_relu(a: AnyArray) -> Array:
    """`φ(a) = max(a, 0)²`. (So et al., "Primer", 2021.)"""
    return jnp.square(jax.nn.relu(a))


ACTIVATIONS: dict[str, Activation] = {
    "identity": identity,
    "relu": relu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "silu": silu,
    "tanh": tanh,
    "sigmoid": sigmoid,
    "quick_gelu": quick_gelu,
    "squared_relu": squared_relu,
}


def as_activation(activation: str | Activation) -> Activation:
    """The function itself, or the one with that name. Raises `ValueError`, with a list of known names, for others."""
    if callable(activation):
        return activation
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"unknown activation {activation!r}: expected one of {', '.join(ACTIVATIONS)}, "
            "or any elementwise JAX function"
        )
    return ACTIVATIONS[activation]


def value_and_derivative(activation: Activation, a: AnyArray) -> tuple[Array, Array]:
    """`φ(a)` and `φ'(a)` of every entry."""
    return jax.jvp(activation, (a,), (jnp.ones_like(a),))


def derivative(activation: Activation, a: AnyArray) -> Array:
    """`φ'(a)` of every entry."""
    return value_and_derivative(activation, a)[1]
