"""Elementwise nonlinearities φ and their derivatives.

An activation is any elementwise JAX function. The functions below carry the names that model configurations use.
`derivative(φ)` uses forward-mode autodiff, which costs one extra evaluation for an elementwise function.
"""

from collections.abc import Callable
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
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
    """The function itself, or the one with that name.

    Raises `ValueError` for an unknown name, with a list of the known ones, and for a function that is not elementwise,
    which is tested on a few numbers.
    """
    if callable(activation):
        if activation not in ACTIVATIONS.values():
            _check_elementwise(activation)
        return activation
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"unknown activation {activation!r}: expected one of {', '.join(ACTIVATIONS)}, "
            "or any elementwise JAX function"
        )
    return ACTIVATIONS[activation]


def _check_elementwise(activation: Activation) -> None:
    name = getattr(activation, "__name__", type(activation).__name__)
    shapes = [list(leaf.shape) for leaf in jax.tree.leaves(activation) if isinstance(leaf, jax.Array | np.ndarray)]
    if shapes:
        reason = f"carries parameters of its own, of shape {' and '.join(map(str, shapes))}"
    else:
        reason = _why_not_elementwise(activation)
    if reason is not None:
        raise ValueError(
            f"the activation {name} {reason}. Expected a function that acts on every entry by itself, and alike. "
            "Instead, describe the whole layer as a FunctionLayer, which may be any function"
        )


@lru_cache(256)
def _why_not_elementwise(activation: Activation) -> str | None:
    """Apply it to a matrix, and to the same numbers in other arrays: say what differs; `None` if nothing does."""
    numbers = np.linspace(-3.1, 2.9, 77, dtype=np.float32)
    numbers = np.random.default_rng(0).permutation(numbers).reshape(7, 11)
    others = {"in a smaller array": np.s_[:3, :5], "in another order": np.s_[::-1, ::-1]}
    try:
        with jax.ensure_compile_time_eval():
            whole = np.asarray(activation(jnp.asarray(numbers)))
            if whole.shape != numbers.shape:
                return f"makes {list(whole.shape)} of shape [7, 11]"
            for where, part in others.items():
                values = np.asarray(activation(jnp.asarray(numbers[part])))
                if values.shape != numbers[part].shape or not np.allclose(
                    values, whole[part], rtol=1e-3, atol=1e-4, equal_nan=True
                ):
                    return f"gives the same numbers other values {where} (does it normalise, or have parameters?)"
    except jax.errors.JAXTypeError:  # it depends on traced values and cannot be tested
        return None
    except Exception as error:
        return f"fails on an array of shape [7, 11] with {type(error).__name__}: {str(error)[:200]}"
    return None


def value_and_derivative(activation: Activation, a: AnyArray) -> tuple[Array, Array]:
    """`φ(a)` and `φ'(a)` of every entry."""
    return jax.jvp(activation, (a,), (jnp.ones_like(a),))


def derivative(activation: Activation, a: AnyArray) -> Array:
    """`φ'(a)` of every entry."""
    return value_and_derivative(activation, a)[1]
