"""Read layers from models of any JAX library, and write folded weights back.

A model is a pytree, and every array in it has a name: the path to it, `"layers.0.weight"`. `Where` says which names
hold a layer's weights, and whether the library stores matrices as `[in, out]`:

    where = EQUINOX.block("layers.0", "layers.1")
    layer = read_layer(model, where, activation="gelu")
    model = write_layer(model, where, rs.fold(layer, rotations).layer)

This covers Equinox modules, Flax NNX modules and states, Flax Linen parameters, and nested dictionaries and lists.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey, keystr

from rotsparse.layers.activations import identity
from rotsparse.layers.base import Layer
from rotsparse.layers.function import FunctionLayer
from rotsparse.layers.gated import GatedMLP
from rotsparse.layers.mlp import MLP, Dense

Tree = TypeVar("Tree")

# By its first weight, what a layer is.
_KINDS = {"w": Dense, "w_in": MLP, "w_gate": GatedMLP}


@dataclass(frozen=True)
class Where:
    """The name of the array behind each weight of a layer: `w`, `b` of a `Dense`, `w_in`, `b_in`, `w_out`, `b_out` of
    an `MLP`, `w_gate`, `w_up`, `w_down` and their biases of a `GatedMLP`. A bias that the model lacks is none."""

    names: Mapping[str, str]
    transposed: bool = False


@dataclass(frozen=True)
class Convention:
    """How a library calls and stores the two arrays of a dense layer."""

    weight: str
    bias: str
    transposed: bool

    def dense(self, module: str) -> Where:
        """A single layer `φ(W x + b)`."""
        return self._where(("", module))

    def block(self, up: str, down: str) -> Where:
        """`W_out φ(W_in x + b_in) + b_out` from two dense layers."""
        return self._where(("_in", up), ("_out", down))

    def gated(self, gate: str, up: str, down: str) -> Where:
        """`W_down (φ(W_gate x) ⊙ W_up x)` from three dense layers."""
        return self._where(("_gate", gate), ("_up", up), ("_down", down))

    def _where(self, *modules: tuple[str, str]) -> Where:
        weights = {f"w{field}": f"{module}.{self.weight}" for field, module in modules}
        biases = {f"b{field}": f"{module}.{self.bias}" for field, module in modules}
        return Where({**weights, **biases}, self.transposed)


EQUINOX = Convention("weight", "bias", transposed=False)
FLAX = Convention("kernel", "bias", transposed=True)


def array_names(tree: Any) -> dict[str, Any]:
    """Every array of a model by its name."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0] if eqx.is_array(leaf)}


def read_layer(tree: Any, where: Where, **options: Any) -> Layer:
    """The layer whose weights are there. `options` go to the layer (`activation`, `norm`, `skip`).

    Raises `ValueError` for a name that the model does not have (it says which are like it), and for shapes that do not
    fit each other.
    """
    arrays = array_names(tree)
    weights = {}
    for field, name in where.names.items():
        if name in arrays:
            weights[field] = _turned(arrays[name], where)
        elif field.startswith("w"):
            raise ValueError(_unknown(name, arrays))
    kind = next(kind for first, kind in _KINDS.items() if first in where.names)
    return kind(**weights, **options)


def write_layer(tree: Tree, where: Where, layer: Layer) -> Tree:
    """A copy of the model with the layer's weights there, in the types that the model has.

    Raises `ValueError` if the model has no place for a weight of the layer, or one of another shape.
    """
    weights = layer.weights()
    if not weights:
        raise ValueError(f"a {type(layer).__name__} has no weights to write")
    if "w" in where.names and "w_out" in weights:
        raise ValueError(
            "the outputs of a single layer stand behind its activation, and a rotation of them has no place in it: "
            "rotate the inputs only, or take this layer and the next as one block"
        )
    arrays = array_names(tree)
    new = {}
    for field in {**where.names, **weights}:
        value, name = weights.get(field), where.names.get(field, "")
        if name not in arrays:
            _check_dispensable(field, value, name, arrays)
            continue
        old = arrays[name]
        value = np.zeros(old.shape) if value is None else _turned(np.asarray(value), where)
        if value.shape != old.shape:
            raise ValueError(f"{field} would be {list(value.shape)} in {name!r}, where the model has {list(old.shape)}")
        new[name] = jnp.asarray(value, old.dtype) if isinstance(old, jax.Array) else np.asarray(value, old.dtype)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: new.get(_name(path), leaf), tree)


def equinox_mlp(mlp: eqx.nn.MLP) -> tuple[list[Where], list[Layer]]:
    """Every dense layer of an `eqx.nn.MLP` with its activation, and where it is.

    An activation with parameters (`eqx.nn.PReLU`), of which Equinox keeps a copy for every neuron, makes its layer a
    `FunctionLayer`.
    """
    where = [EQUINOX.dense(f"layers.{i}") for i in range(len(mlp.layers))]
    activations: list[Callable] = [_activation_of(mlp.activation, i) for i in range(mlp.depth)]
    activations.append(mlp.final_activation if mlp.depth else identity)  # a single layer has none
    return where, [_dense(mlp, w, a) for w, a in zip(where, activations, strict=True)]


def _activation_of(activation: Callable, layer: int) -> Callable:
    return jax.tree.map(lambda leaf: leaf[layer] if eqx.is_array(leaf) else leaf, activation)


def _dense(mlp: eqx.nn.MLP, where: Where, activation: Callable) -> Layer:
    if not any(map(eqx.is_array, jax.tree.leaves(activation))):
        return read_layer(mlp, where, activation=activation)
    linear = read_layer(mlp, where, activation="identity")
    of_neurons = eqx.filter_vmap(lambda own, a: own(a))
    return FunctionLayer(lambda x: of_neurons(activation, linear(x)), linear.d_in, linear.d_out)


def _name(path) -> str:
    # Flax NNX keeps an array as the value of a variable; the variable's name is the array's.
    if isinstance(path[-1], GetAttrKey) and path[-1].name in ("value", "raw_value"):
        path = path[:-1]
    return keystr(path, simple=True, separator=".")


def _turned(array, where: Where):
    return array.T if where.transposed and array.ndim == 2 else array


def _unknown(name: str, arrays: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, arrays, n=5, cutoff=0.3) or list(arrays)[:5]
    return f"the model has no array {name!r}. It has {', '.join(near)}" + (
        " and others" if len(arrays) > len(near) else ""
    )


def _check_dispensable(field: str, value, name: str, arrays: Mapping[str, Any]) -> None:
    """A field of the layer that has no place in the model must not matter."""
    if value is None or (field.startswith("b") and not np.any(value)):
        return
    if field.startswith("b"):
        raise ValueError(f"the layer has a bias {field}, and the model has no place for it ({name!r})")
    raise ValueError(_unknown(name, arrays))
