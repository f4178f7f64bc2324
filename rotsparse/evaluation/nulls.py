"""Controls: what would be seen if there were nothing to see?

Null models keep everything but the structure in question: `random_weights` keeps a layer's activations and redraws its
weights, `shuffled_inputs` keeps each coordinate's distribution and destroys their dependence. `random_perturbation` has
the size of a substitution's error and none of its direction. `finite_effects` asks for locality without derivatives.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from rotsparse._core.types import Rows
from rotsparse.layers.base import Layer


def random_weights(layer: Layer, *, key: PRNGKeyArray) -> Layer:
    """The layer with every weight matrix redrawn: independent normal entries with the mean square of the trained ones.

    Biases, the norm and the skip connection stay: they set how often neurons are active and belong to the architecture.
    Rotations that make this layer's Jacobians as sparse as the trained one's have found nothing that was learned.

    Raises `ValueError` for a layer without weights (a `FunctionLayer`).
    """
    matrices = {name: w for name, w in layer.weights().items() if w.ndim == 2}
    if not matrices:
        raise ValueError(
            f"random_weights redraws the weights of Dense, MLP and GatedMLP layers, got {type(layer).__name__}: "
            "build the null layer from your own function with weights redrawn"
        )
    redrawn = {}
    for (name, w), k in zip(matrices.items(), jax.random.split(key, len(matrices)), strict=True):
        rms = float(np.sqrt(np.mean(np.square(w, dtype=np.float64))))
        redrawn[name] = (rms * np.asarray(jax.random.normal(k, w.shape), w.dtype)).astype(w.dtype)
    return layer.with_weights(**redrawn)


def shuffled_inputs(x: Rows, *, key: PRNGKeyArray) -> Float[Array, "n d"]:
    """Each coordinate of `x` permuted over the examples on its own: the same distribution of every coordinate, and no
    dependence between them."""
    x = jnp.asarray(x)
    return jax.random.permutation(key, x, axis=0, independent=True)


def random_perturbation(x: Rows, replaced: Rows, *, key: PRNGKeyArray) -> Float[Array, "n d"]:
    """`x` moved as far as `replaced` is from it, example by example, but in uniformly random directions.

    If this costs the network as much as the substitution did, its loss is explained by the size of the error alone.
    Raises `ValueError` where the shapes differ.
    """
    x, replaced = jnp.asarray(x), jnp.asarray(replaced)
    if x.shape != replaced.shape:
        raise ValueError(f"x and its replacement should have one shape, got {list(x.shape)} and {list(replaced.shape)}")
    direction = jax.random.normal(key, x.shape, x.dtype)
    length = jnp.linalg.norm(replaced - x, axis=-1, keepdims=True)
    return x + direction * (length / jnp.linalg.norm(direction, axis=-1, keepdims=True))
