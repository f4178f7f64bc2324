"""Null models: what would be seen if there were nothing to see?

Each keeps everything but the structure in question, and answers one question:

| null | keeps | a layer that beats it has |
|---|---|---|
| `random_weights` | the mean square of each weight matrix, biases | weights that are not Gaussian noise |
| `rate_matched` | also how often each neuron is active | sparsity that its activity rates do not explain |
| `same_spectrum` | the singular values of each matrix | sparsity that low rank does not explain |
| `shuffled_weights` | each neuron's activity and weights, in another order | more than uneven weights explain |
| `re_paired` | every matrix as it is, but for the order of neurons | inputs wired to outputs through specific neurons |
| `unpaired` | the same, gates and what they gate re-ordered, too | gates that go with what they gate |
| `shuffled_inputs` | the distribution of each input | sparsity that follows from dependence of the inputs |

`random_perturbation` has the size of a substitution's error and none of its direction.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from rotsparse._core.intervals import numpy_generator
from rotsparse._core.modules import replace_fields
from rotsparse._core.types import AnyArray, Rows
from rotsparse.layers.base import AnyLayer, ClosedForm, Layer, normalized
from rotsparse.layers.gated import GatedMLP


def random_weights(layer: Layer, *, key: PRNGKeyArray) -> Layer:
    """The layer with every weight matrix redrawn: independent normal entries with the mean square of the trained ones.

    Biases, the norm and the skip connection stay: they set how often neurons are active and belong to the architecture.
    Rotations that make this layer's Jacobians as sparse as the trained one's have found nothing that was learned.

    Raises `ValueError` for a layer without weights (a `FunctionLayer`).
    """
    matrices = _matrices(layer)
    redrawn = {}
    for (name, w), k in zip(matrices.items(), jax.random.split(key, len(matrices)), strict=True):
        rms = float(np.sqrt(np.mean(np.square(w, dtype=np.float64))))
        redrawn[name] = (rms * np.asarray(jax.random.normal(k, w.shape), w.dtype)).astype(w.dtype)
    return layer.with_weights(**redrawn)


def rate_matched(layer: Layer, x: Rows, *, key: PRNGKeyArray) -> Layer:
    """`random_weights`, with the biases of the hidden neurons shifted so that each one's pre-activation is positive on
    as many of the examples `x` as in the trained layer. (Redrawn weights alone change these rates, and a ReLU that is
    off makes exact zeros.) The shift is exact up to ties.

    Raises `ValueError` for a layer that is not made of weights.
    """
    if not isinstance(layer, ClosedForm):
        raise ValueError(_no_weights(layer))
    return _with_rates_of(layer, random_weights(layer, key=key), x)


def shuffled_weights(layer: Layer, x: Rows, *, key: PRNGKeyArray) -> Layer:
    """The weights into every neuron in random order among its inputs, those out of it among its outputs, and the biases
    shifted as in `rate_matched`: neurons keep their norms, the values of their weights and their activity, however
    uneven these are.

    Raises `ValueError` for a layer that is not made of weights.
    """
    if not isinstance(layer, ClosedForm):
        raise ValueError(_no_weights(layer))
    rng = numpy_generator(key)
    axes = {name: 0 if name in _FROM_NEURONS else 1 for name in _matrices(layer)}
    new = {name: rng.permuted(np.asarray(w), axis=axes[name]) for name, w in _matrices(layer).items()}
    return _with_rates_of(layer, layer.with_weights(**new), x)


def same_spectrum(layer: Layer, *, key: PRNGKeyArray) -> Layer:
    """Every weight matrix with its own singular values and Haar-random singular vectors; biases stay.

    Raises `ValueError` for a layer without weights (a `FunctionLayer`).
    """
    matrices, new = _matrices(layer), {}
    for (name, w), k in zip(matrices.items(), jax.random.split(key, len(matrices)), strict=True):
        rng = numpy_generator(k)
        left, right = (np.linalg.qr(rng.standard_normal((d, min(w.shape))))[0] for d in w.shape)
        new[name] = ((left * np.linalg.svd(np.asarray(w, np.float64), compute_uv=False)) @ right.T).astype(w.dtype)
    return layer.with_weights(**new)


def re_paired(layer: AnyLayer, *, key: PRNGKeyArray) -> AnyLayer:
    """The hidden neurons of a block in another order behind their gates: each feeds the outputs that another one fed.
    Every matrix keeps its entries, and every neuron its activity.

    Raises `ValueError` for a layer whose outputs are its neurons: there is nothing to re-pair.
    """
    names = [name for name in _FROM_NEURONS if name in layer.weights()]
    if not names:
        raise ValueError(
            f"re_paired shuffles which hidden neuron feeds which output of an MLP or GatedMLP block; a "
            f"{type(layer).__name__} has no output matrix"
        )
    w = layer.weights()[names[0]]
    return layer.with_weights(**{names[0]: w[:, numpy_generator(key).permutation(w.shape[1])]})


def unpaired(layer: GatedMLP, *, key: PRNGKeyArray) -> GatedMLP:
    """The hidden neurons of a gated block in one order in `w_gate` and in two others in `w_up` and `w_down`."""
    key_up, key_down = jax.random.split(key)
    order = numpy_generator(key_up).permutation(len(layer.w_up))
    return re_paired(layer.with_weights(w_up=layer.w_up[order]), key=key_down)


def null_kinds(layer: Layer) -> dict[str, Callable[[Any, Rows, PRNGKeyArray], Layer]]:
    """How each null that the layer has is drawn, by its name in words; none for a layer without weights."""
    if not isinstance(layer, ClosedForm):
        return {}
    kinds: dict[str, Callable[[Any, Rows, PRNGKeyArray], Layer]] = {
        "random weights": lambda layer, x, k: random_weights(layer, key=k),
        "rates matched": lambda layer, x, k: rate_matched(layer, x, key=k),
        "same spectrum": lambda layer, x, k: same_spectrum(layer, key=k),
        "weights shuffled": lambda layer, x, k: shuffled_weights(layer, x, key=k),
    }
    if layer.left is not None:
        kinds["neurons re-paired"] = lambda layer, x, k: re_paired(layer, key=k)
    if isinstance(layer, GatedMLP):
        kinds["gates unpaired"] = lambda layer, x, k: unpaired(layer, key=k)
    return kinds


def draw_nulls(layer: Layer, x: Rows, *, key: PRNGKeyArray, draws: int) -> dict[str, list[Layer]]:
    """So many draws of every null that the layer has, by its name in words; none for a layer without weights. `x` are
    the examples on which rates are matched."""
    kinds = null_kinds(layer)
    if not kinds:
        return {}
    keys = jax.random.split(key, len(kinds))
    return {
        name: [draw(layer, x, k) for k in jax.random.split(own, draws)]
        for own, (name, draw) in zip(keys, kinds.items(), strict=True)
    }


def shuffled_inputs(x: Rows, *, key: PRNGKeyArray) -> Float[Array, "n d"]:
    """Each coordinate of `x` permuted over the examples on its own: the same distribution of every coordinate, and no
    dependence between them."""
    x = jnp.asarray(x)
    return jax.random.permutation(key, x, axis=0, independent=True)


def random_perturbation(
    x: Float[AnyArray, "*n d"], replaced: Float[AnyArray, "*n d"], *, key: PRNGKeyArray
) -> Float[Array, "*n d"]:
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


# Matrices with a column for every neuron; the others have a row.
_FROM_NEURONS = ("w_out", "w_down")

# The bias that moves the gates of a layer, by its first weight.
_BIAS_OF = {"w": "b", "w_in": "b_in", "w_gate": "b_gate"}


def _with_rates_of(layer: ClosedForm, null: Layer, x: Rows) -> Layer:
    """The null with the biases of its neurons shifted so that they are active as often as in the layer."""
    assert isinstance(null, ClosedForm)
    bias = next(name for weight, name in _BIAS_OF.items() if weight in layer.weights())
    trained, redrawn = (_preactivations(of, getattr(of, bias), x) for of in (layer, null))
    rate = (trained > 0).mean(axis=0)
    # Between the entries with so many above: as many of them are then above zero.
    ranked, above = np.sort(redrawn, axis=0), np.rint(rate * len(redrawn)).astype(int)
    padded = np.concatenate([ranked[:1] - 1, ranked, ranked[-1:] + 1])
    at = len(redrawn) - above
    columns = np.arange(padded.shape[1])
    shift = -(padded[at, columns] + padded[at + 1, columns]) / 2
    before = getattr(null, bias)
    moved = shift if before is None else np.asarray(before, np.float64) + shift
    return replace_fields(null, **{bias: moved.astype(null.rights[0].dtype)})


def _preactivations(layer: ClosedForm, bias: AnyArray | None, x: Rows) -> Float[np.ndarray, "n hidden"]:
    normed = np.asarray(normalized(layer.norm, jnp.asarray(x)), np.float64)
    a = normed @ np.asarray(layer.rights[0], np.float64).T
    return a if bias is None else a + np.asarray(bias, np.float64)


def _matrices(layer: Layer) -> dict[str, AnyArray]:
    matrices = {name: w for name, w in layer.weights().items() if w.ndim == 2}
    if not matrices:
        raise ValueError(_no_weights(layer))
    return matrices


def _no_weights(layer: Layer) -> str:
    return (
        f"this null redraws the weights of Dense, MLP and GatedMLP layers, got {type(layer).__name__}: build the null "
        "layer from your own function with weights redrawn"
    )
