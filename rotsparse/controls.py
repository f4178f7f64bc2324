"""Controls: what would be seen if there were nothing to see?

Null models keep everything but the structure in question: `random_weights` keeps a layer's activations and redraws its
weights, `shuffled_inputs` keeps each coordinate's distribution and destroys their dependence. `random_perturbation` has
the size of a substitution's error and none of its direction. `finite_effects` asks for locality without derivatives.
"""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from rotsparse.checks import activations
from rotsparse.intervals import Interval
from rotsparse.layers import MLP, GatedMLP, Layer
from rotsparse.rotations import Rotations
from rotsparse.statistics import Rows, chunks

_ROWS = 1024

# Outputs that vary by less than this share of the outputs' root mean square deviation count as varying by as much.
NULL_SPREAD = 1e-4

GAIN = 1.1
"""A layer whose odds of a small entry beat those of its controls by less than this factor has no structure worth the
name, however sure. Odds, because shares of nearly one (of directions that hardly vary) leave no room for factors."""


def random_weights(layer: Layer, *, key: PRNGKeyArray) -> Layer:
    """The layer with every weight matrix redrawn: independent normal entries with the mean square of the trained ones.

    Biases, the norm and the skip connection stay: they set how often neurons are active and belong to the architecture.
    Rotations that make this layer's Jacobians as sparse as the trained one's have found nothing that was learned.

    Raises `ValueError` for a layer without weights (a `FunctionLayer`).
    """
    if not isinstance(layer, MLP | GatedMLP):
        raise ValueError(
            f"random_weights redraws the weights of MLP, Dense and GatedMLP layers, got {type(layer).__name__}: "
            "build the null layer from your own function with weights redrawn"
        )
    names = ("w_in", "w_out") if isinstance(layer, MLP) else ("w_gate", "w_up", "w_down")
    for name, k in zip(names, jax.random.split(key, len(names)), strict=True):
        w = getattr(layer, name)
        if w is not None:
            rms = float(np.sqrt(np.mean(np.square(w, dtype=np.float64))))
            redrawn = rms * np.asarray(jax.random.normal(k, w.shape), w.dtype)
            layer = eqx.tree_at(lambda tree, name=name: getattr(tree, name), layer, redrawn.astype(w.dtype))
    return layer


def another_redraw(controls: Sequence[Interval]) -> Interval:
    """The mean of some null models that differ in their draw, and where one more of them would lie: the 95% prediction
    interval `mean ± t s √(1 + 1/k)` (Student's t with k - 1 degrees of freedom), and no less than what the intervals of
    the k controls cover. A single control has its own interval only, which is too narrow: it knows examples, not draws.
    """
    values = np.array([control.value for control in controls])
    low, high = min(control.low for control in controls), max(control.high for control in controls)
    mean, k = float(values.mean()), len(values)
    if k > 1:
        from scipy.special import stdtrit  # here, because it takes a tenth of a second

        reach = float(stdtrit(k - 1, 0.975) * values.std(ddof=1) * np.sqrt(1 + 1 / k))
        low, high = min(low, mean - reach), max(high, mean + reach)
    return Interval(mean, low, high)


def beyond_control(learned: Interval, controls: Sequence[Interval]) -> tuple[bool, str]:
    """Whether the share of small entries says that a layer has learned structure, and the conclusion in words: its
    learned basis against those of its null models (the same fit with random weights; three of them or more, because
    two draws of random weights differ, too)."""
    null = another_redraw(controls)
    odds = null.value * (1 - learned.value), learned.value * (1 - null.value)
    structure = learned.low > null.high and odds[1] > GAIN * odds[0]
    compared = "above" if learned.low > null.high else "below" if learned.high < null.low else "within"
    range_of = f"the range of {len(controls)} redraws" if len(controls) > 1 else "the interval of the one redraw"
    return structure, (
        f"{learned.value:.3f} of the entries are small, {null.value:.3f} with random weights ({compared} {range_of}): "
        + ("sparse structure that was learned" if structure else "no sparse basis here beyond chance")
    )


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


def finite_effects(
    layer: Layer, x: Rows, rotations: Rotations, *, size: float = 1.0, threshold: float = 0.1
) -> Float[np.ndarray, "d_out d_in"]:
    """Which rotated outputs move when one rotated input does: entry (o, i) is the share of examples in which output o
    moves by more than `threshold` of its own standard deviation when input i moves by `size` of its own (outputs that
    hardly vary at all, by less than 1e-4 of the outputs' rms deviation, count as varying by that).

    Both signs of the move are taken, in equal parts. The sum over a column is the mean number of outputs that input i
    moves: locality as it is meant, for finite changes. Cost: `2 n d_in` evaluations of the layer.

    Raises `ValueError` where the shapes do not fit each other, or `x` is unusable.
    """
    x = activations("x", x, layer.d_in)
    if (rotations.r_in.shape[0], rotations.r_out.shape[0]) != (layer.d_in, layer.d_out):
        raise ValueError(
            f"the rotations have widths {rotations.r_in.shape[0]} and {rotations.r_out.shape[0]}, the layer "
            f"{layer.d_in} and {layer.d_out}"
        )
    r_in, r_out = jnp.asarray(rotations.r_in, x.dtype), jnp.asarray(rotations.r_out, x.dtype)
    y = np.concatenate([np.asarray(_rotated(layer, rows, r_out))[:n] for rows, n in chunks(x, _ROWS)])
    steps = size * np.std(np.asarray(x, np.float64) @ np.asarray(r_in, np.float64).T, axis=0)
    # Of a direction that never varies, rounding errors would be more than its standard deviation.
    spread = y.std(axis=0, dtype=np.float64)
    spread = np.maximum(spread, NULL_SPREAD * np.sqrt(np.mean(np.square(spread))))
    enough = jnp.asarray(threshold * spread, x.dtype)
    moves = jnp.asarray(steps[:, None] * np.asarray(r_in), x.dtype)
    moved = np.zeros((layer.d_out, layer.d_in))
    for rows, count in chunks(x, _ROWS):
        counted = jnp.arange(len(rows)) < count
        moved += np.asarray(_moved(layer, rows, counted, moves, r_out, enough), np.float64)
    return moved / (2 * len(x))


@eqx.filter_jit
def _rotated(layer, x, r_out):
    with jax.default_matmul_precision("highest"):
        return layer(x) @ r_out.T


@eqx.filter_jit
def _moved(layer, x, counted, moves, r_out, enough):
    """In how many examples each output moves enough, for each input, both signs added: `[d_out, d_in]`."""
    with jax.default_matmul_precision("highest"):
        y = layer(x) @ r_out.T

        def count(move):
            far = sum((jnp.abs(layer(x + s * move) @ r_out.T - y) > enough).astype(x.dtype) for s in (1, -1))
            return counted.astype(x.dtype) @ far

        return jax.lax.map(count, moves).T
