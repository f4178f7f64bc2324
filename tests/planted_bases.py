"""Layers and activations with a planted basis."""

from collections.abc import Callable

import numpy as np

from rotsparse.layers.mlp import MLP


def sparse_weights(
    rng: np.random.Generator, d: int, hidden: int, values: Callable[[], np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Weights `w_in` and `w_out` of an MLP block in which every neuron reads two of its d inputs, and writes to two of
    its d outputs. `values` draws two weights."""
    w_in, w_out = np.zeros((hidden, d)), np.zeros((d, hidden))
    values = values or (lambda: rng.standard_normal(2))
    for neuron in range(hidden):
        w_in[neuron, rng.choice(d, 2, replace=False)] = values()
        w_out[rng.choice(d, 2, replace=False), neuron] = values()
    return w_in, w_out


def hidden_block(
    rng: np.random.Generator,
    turn_in: np.ndarray,
    turn_out: np.ndarray,
    *,
    hidden: int,
    values: Callable[[], np.ndarray] | None = None,
    bias: Callable[[], np.ndarray] | None = None,
    activation: str = "relu",
) -> MLP:
    """A float32 MLP block whose weights are `sparse_weights` in two other bases, whose directions are the rows of
    `turn_in` and `turn_out`. `bias` draws its input bias."""
    w_in, w_out = sparse_weights(rng, len(turn_in), hidden, values)
    b_in = None if bias is None else bias().astype(np.float32)
    w_in, w_out = (w_in @ turn_in).astype(np.float32), (turn_out.T @ w_out).astype(np.float32)
    return MLP(w_in, b_in, w_out, activation=activation)


def sparse_activations(rng: np.random.Generator, n: int, directions: np.ndarray, density: float) -> np.ndarray:
    """Bernoulli-Gaussian activations `[n, d]`: sums of few directions (rows), each present with probability `density`
    and multiplied by a normal number."""
    shape = n, len(directions)
    return (rng.standard_normal(shape) * (rng.random(shape) < density)) @ directions
