"""The demo's network: it adds modulo 59, and learns to do so with waves.

The sum of the embeddings of a and b goes through one MLP block with a skip connection (ReLU, 64-128-64) to 59 logits.
Networks like this represent a number a by `cos(2πka/59)` and `sin(2πka/59)` for a few frequencies k (Nanda et al.,
"Progress measures for grokking via mechanistic interpretability", 2023; Zhong et al., "The Clock and the Pizza",
2023). The waves lie in no neuron's direction, but each is a plane of the embedding: so there is a known truth that a
basis of this block should find, and that one sees.

It is trained anew, in a few seconds, by every demo: nothing pretrained is shipped.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from rotsparse._core.types import AnyArray
from rotsparse.layers.mlp import MLP

MODULUS, WIDTH, HIDDEN = 59, 64, 128
STEPS, RATE, WEIGHT_DECAY = 3000, 3e-3, 2.0
TRAINED_ON = 0.6  # of all pairs


class Addition(NamedTuple):
    """A trained network: its MLP block without the skip connection, the embedding of every number, the block's inputs
    for the pairs that it was trained on and for the others, its accuracy on these, and these pairs."""

    layer: MLP
    embedding: Float[np.ndarray, "modulus width"]
    train: Float[np.ndarray, "n width"]
    test: Float[np.ndarray, "m width"]
    accuracy: float
    unseen: Int[np.ndarray, "m 2"]


class Waves(NamedTuple):
    """What directions of the embedding mean. `coordinates`: of every number along each direction, centred. `frequency`:
    the strongest one of each. `purity`: its share of the squared coordinates, 0 to 1 (Parseval)."""

    coordinates: Float[np.ndarray, "modulus directions"]
    frequency: Int[np.ndarray, "directions"]
    purity: Float[np.ndarray, "directions"]


def train(seed: int = 0, *, steps: int = STEPS) -> Addition:
    """Train on 60% of all pairs with AdamW, all of them in every step; measure the accuracy on the others. After 500
    steps the network is right on these; the waves become pure in the rest."""
    pairs = np.stack(np.divmod(np.random.default_rng(seed).permutation(MODULUS**2), MODULUS), axis=1)
    count = round(TRAINED_ON * len(pairs))
    seen, unseen = pairs[:count], pairs[count:]
    optimizer = optax.adamw(
        optax.warmup_cosine_decay_schedule(0.0, RATE, 50, steps), b2=0.98, weight_decay=WEIGHT_DECAY
    )

    def loss(params):
        labels = jnp.asarray(seen.sum(axis=1) % MODULUS)
        return optax.softmax_cross_entropy_with_integer_labels(_logits(params, seen), labels).mean()

    @jax.jit
    def fit(params):
        def step(_, carry):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, steps, step, (params, optimizer.init(params)))[0]

    params = fit(_initial(jax.random.key(seed)))
    right = np.argmax(_logits(params, unseen), axis=1) == unseen.sum(axis=1) % MODULUS
    layer = MLP(params["w_in"], params["b_in"], params["w_out"], activation="relu")
    inputs, unseen_inputs = (np.asarray(_inputs(params, of)) for of in (seen, unseen))
    return Addition(layer, np.asarray(params["embedding"]), inputs, unseen_inputs, float(np.mean(right)), unseen)


def waves(embedding: Float[AnyArray, "modulus width"], directions: Float[AnyArray, "k width"]) -> Waves:
    """The coordinates of all numbers along some directions, as waves over the numbers."""
    centred = np.asarray(embedding, np.float64)
    coordinates = (centred - centred.mean(axis=0)) @ np.asarray(directions, np.float64).T
    power = np.square(np.abs(np.fft.rfft(coordinates, axis=0)))[1:]
    total = power.sum(axis=0)
    return Waves(coordinates, power.argmax(axis=0) + 1, power.max(axis=0) / np.where(total > 0, total, 1))


def _inputs(params: dict[str, Array], pairs: Int[np.ndarray, "n 2"]) -> Float[Array, "n width"]:
    return params["embedding"][pairs[:, 0]] + params["embedding"][pairs[:, 1]]


def _logits(params: dict[str, Array], pairs: Int[np.ndarray, "n 2"]) -> Float[Array, "n modulus"]:
    x = _inputs(params, pairs)
    hidden = jax.nn.relu(x @ params["w_in"].T + params["b_in"])
    return (x + hidden @ params["w_out"].T) @ params["unembedding"].T


def _initial(key) -> dict[str, Array]:
    shapes = {"embedding": (MODULUS, WIDTH), "w_in": (HIDDEN, WIDTH), "w_out": (WIDTH, HIDDEN)}
    shapes["unembedding"] = (MODULUS, WIDTH)
    keys = jax.random.split(key, len(shapes))
    drawn = {n: jax.random.normal(k, s) / np.sqrt(s[1]) for k, (n, s) in zip(keys, shapes.items(), strict=True)}
    return drawn | {"b_in": jnp.zeros(HIDDEN)}
