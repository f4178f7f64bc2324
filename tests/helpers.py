"""What several test files share: where data lie, and layers and activations with a planted basis."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
"""Data that is too large for the repository. Tests that need it are skipped where it is not."""


def random_orthogonal(rng: np.random.Generator, d: int) -> np.ndarray:
    """An orthogonal matrix."""
    return np.linalg.qr(rng.standard_normal((d, d)))[0]


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


def sparse_activations(rng: np.random.Generator, n: int, directions: np.ndarray, density: float) -> np.ndarray:
    """Sums of few directions, which are rows: each is there with probability `density`, times a normal number."""
    shape = n, len(directions)
    return (rng.standard_normal(shape) * (rng.random(shape) < density)) @ directions
