"""The demo's network: 64-64-64-10, ReLU, trained on scikit-learn's handwritten digits (which come with it: no
download).

It is trained anew, in a few seconds, by every demo: nothing pretrained is shipped.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from rotsparse.layers.mlp import Dense

WIDTHS = (64, 64, 64, 10)
EPOCHS, BATCH = 60, 64


class Digits(NamedTuple):
    """A trained network as a tuple of layers, its images `[n, 64]` in [0, 1], and its held-out accuracy."""

    layers: tuple[Dense, ...]
    train: Float[np.ndarray, "n 64"]
    test: Float[np.ndarray, "m 64"]
    accuracy: float


def train(seed: int = 0) -> Digits:
    """Train the network with AdamW on 80% of the 1,797 images; measure its accuracy on the others."""
    from sklearn.datasets import load_digits  # here, because it takes half a second to import
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    split = train_test_split(images, labels, test_size=0.2, random_state=seed, stratify=labels)
    x, x_test, y, y_test = (np.asarray(part) for part in split)
    steps = EPOCHS * len(x) // BATCH
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, steps), weight_decay=1e-2)

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(_logits(params, x), y).mean()

    @jax.jit
    def fit(params, x, y, key):
        def step(i, carry):
            params, state = carry
            rows = jax.random.randint(jax.random.fold_in(key, i), (BATCH,), 0, len(x))
            updates, state = optimizer.update(jax.grad(loss)(params, x[rows], y[rows]), state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, steps, step, (params, optimizer.init(params)))[0]

    key_init, key_data = jax.random.split(jax.random.key(seed))
    params = fit(_initial(key_init), jnp.asarray(x), jnp.asarray(y), key_data)
    accuracy = float(np.mean(np.argmax(_logits(params, x_test), axis=1) == y_test))
    kinds = ("relu", "relu", "identity")
    layers = tuple(Dense(w, b, activation=kind) for (w, b), kind in zip(params, kinds, strict=True))
    return Digits(layers, x, x_test, accuracy)


def _initial(key) -> list[tuple[Array, Array]]:
    """He initialisation."""
    keys = jax.random.split(key, len(WIDTHS) - 1)
    shapes = zip(WIDTHS[1:], WIDTHS[:-1], strict=True)
    return [(jax.random.normal(k, s) * jnp.sqrt(2 / s[1]), jnp.zeros(s[0])) for k, s in zip(keys, shapes, strict=True)]


def _logits(params, x):
    for w, b in params[:-1]:
        x = jax.nn.relu(x @ w.T + b)
    w, b = params[-1]
    return x @ w.T + b
