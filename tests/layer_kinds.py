"""One small layer of every kind: what every layer, and every baseline on every layer, must do is tested with them."""

import jax.numpy as jnp
import numpy as np

from rotsparse.layers.base import Layer
from rotsparse.layers.function import FunctionLayer
from rotsparse.layers.gated import GatedMLP
from rotsparse.layers.mlp import MLP, Dense
from rotsparse.layers.norms import layer_norm

D_IN = 6


def random_weights(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Weights in float32 that keep the scale of what they multiply."""
    return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def correlated_inputs(rng: np.random.Generator, n: int = 500) -> np.ndarray:
    """Non-Gaussian inputs with a mean, correlated."""
    mixed = rng.laplace(size=(n, D_IN)) @ rng.standard_normal((D_IN, D_IN))
    return (mixed + rng.standard_normal(D_IN)).astype(np.float32)


def _function(rng: np.random.Generator) -> Layer:
    w = random_weights(rng, 5, D_IN)
    return FunctionLayer(lambda x: jnp.tanh(w @ x), d_in=D_IN, d_out=5)


def _residual(rng: np.random.Generator) -> Layer:
    w_in, w_out = random_weights(rng, 9, D_IN), random_weights(rng, D_IN, 9)
    return MLP(w_in, None, w_out, norm=layer_norm(1 + random_weights(rng, D_IN)), skip=True)


LAYERS = {
    "mlp": lambda rng: MLP(
        random_weights(rng, 9, D_IN), random_weights(rng, 9), random_weights(rng, 4, 9), activation="gelu"
    ),
    "dense": lambda rng: Dense(random_weights(rng, 7, D_IN), random_weights(rng, 7)),
    "gated": lambda rng: GatedMLP(
        random_weights(rng, 9, D_IN), random_weights(rng, 9, D_IN), random_weights(rng, 8, 9)
    ),
    "residual": _residual,
    "function": _function,
}
