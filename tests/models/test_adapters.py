"""Small trained networks of every library: layers out, folded weights in, the same function."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rotsparse import MLP, GatedMLP, Rotations
from rotsparse.layers.fold import fold
from rotsparse.models.adapters import (
    EQUINOX,
    FLAX,
    Convention,
    Where,
    array_names,
    equinox_mlp,
    read_layer,
    write_layer,
)

X = jax.random.normal(jax.random.key(0), (200, 6))
Y = jnp.stack([jnp.sin(X[:, 0] + X[:, 1]), X[:, 2] * X[:, 3], jnp.tanh(X[:, 4] - X[:, 5])], axis=1)


class Blocks(eqx.Module):
    """Two MLP blocks with a linear space of width 5 between them."""

    first: eqx.nn.MLP
    second: eqx.nn.MLP

    def __init__(self, key):
        a, b = jax.random.split(key)
        self.first = eqx.nn.MLP(6, 5, 16, 1, activation=jax.nn.silu, key=a)
        self.second = eqx.nn.MLP(5, 3, 16, 1, activation=jax.nn.silu, key=b)

    def __call__(self, x):
        return self.second(self.first(x))


class LinenBlocks(nn.Module):
    @nn.compact
    def __call__(self, x):
        for hidden, out in ((16, 5), (16, 3)):
            x = nn.silu(nn.Dense(hidden)(x))
            x = nn.Dense(out)(x)
        return x


class NnxBlocks(nnx.Module):
    def __init__(self, rngs):
        self.up1, self.down1 = nnx.Linear(6, 16, rngs=rngs), nnx.Linear(16, 5, rngs=rngs)
        self.up2, self.down2 = nnx.Linear(5, 16, rngs=rngs), nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        x = self.down1(nn.silu(self.up1(x)))
        return self.down2(nn.silu(self.up2(x)))


def plain_blocks(params, x):
    for w_in, b_in, w_out, b_out in params["blocks"]:
        x = jax.nn.silu(x @ w_in.T + b_in) @ w_out.T + b_out
    return x


def train(params, apply):
    """Adam on the squared error: real, if small, trained weights."""
    optimiser = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        loss, gradient = jax.value_and_grad(lambda p: jnp.mean((apply(p, X) - Y) ** 2))(params)
        updates, state = optimiser.update(gradient, state)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimiser.init(params), []
    for _ in range(150):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.3 * losses[0]
    return params


@dataclass
class Trained:
    model: Any
    apply: Callable
    first: Where
    second: Where


def make_equinox():
    arrays, static = eqx.partition(Blocks(jax.random.key(1)), eqx.is_array)

    def apply(arrays, x):
        return jax.vmap(eqx.combine(arrays, static))(x)

    first, second = (EQUINOX.block(f"{name}.layers.0", f"{name}.layers.1") for name in ("first", "second"))
    model = eqx.combine(train(arrays, apply), static)
    return Trained(model, lambda m, x: jax.vmap(m)(x), first, second)


def make_linen():
    module = LinenBlocks()
    params = train(module.init(jax.random.key(1), X), module.apply)
    first, second = (FLAX.block(f"params.Dense_{i}", f"params.Dense_{i + 1}") for i in (0, 2))
    return Trained(params, module.apply, first, second)


def make_nnx():
    graph, state = nnx.split(NnxBlocks(nnx.Rngs(1)))
    state = train(state, lambda s, x: nnx.merge(graph, s)(x))
    first, second = (FLAX.block(f"up{i}", f"down{i}") for i in (1, 2))
    return Trained(nnx.merge(graph, state), lambda m, x: m(x), first, second)


def make_plain():
    keys = iter(jax.random.split(jax.random.key(1), 4))
    shapes = [((16, 6), (5, 16)), ((16, 5), (3, 16))]
    blocks = [
        [
            jax.random.normal(next(keys), a) * 0.4,
            jnp.zeros(a[0]),
            jax.random.normal(next(keys), b) * 0.2,
            jnp.zeros(b[0]),
        ]
        for a, b in shapes
    ]
    fields = ("w_in", "b_in", "w_out", "b_out")
    first, second = (Where({f: f"blocks.{i}.{n}" for n, f in enumerate(fields)}) for i in (0, 1))
    return Trained(train({"blocks": blocks}, plain_blocks), plain_blocks, first, second)


@pytest.fixture(scope="module", params=[make_equinox, make_linen, make_nnx, make_plain])
def trained(request):
    return request.param()


def test_layers_compute_what_the_model_computes(trained):
    first, second = (read_layer(trained.model, w, activation="silu") for w in (trained.first, trained.second))
    assert (first.d_in, first.d_out, second.d_in, second.d_out) == (6, 5, 5, 3)
    np.testing.assert_allclose(second(first(X)), trained.apply(trained.model, X), atol=1e-5)


def test_written_back_unchanged(trained):
    layer = read_layer(trained.model, trained.first, activation="silu")
    again = write_layer(trained.model, trained.first, layer)
    assert type(again) is type(trained.model)
    before, after = array_names(trained.model), array_names(again)
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])
        assert before[name].dtype == after[name].dtype


def test_a_rotation_between_two_blocks_changes_nothing(trained):
    first, second = (read_layer(trained.model, w, activation="silu") for w in (trained.first, trained.second))
    r = Rotations.haar(jax.random.key(2), 5, 5).r_in
    model = write_layer(trained.model, trained.first, fold(first, Rotations(np.eye(6, dtype="f"), r), X).layer)
    hidden = first(X)
    model = write_layer(model, trained.second, fold(second, Rotations(r, np.eye(3, dtype="f")), hidden).layer)
    np.testing.assert_allclose(trained.apply(model, X), trained.apply(trained.model, X), atol=1e-5)
    # And it is the rotated space that stands between them now.
    between = read_layer(model, trained.first, activation="silu")(X)
    np.testing.assert_allclose(between, hidden @ r.T, atol=1e-5)


def test_rotated_ends(trained):
    first, second = (read_layer(trained.model, w, activation="silu") for w in (trained.first, trained.second))
    r_in, r_out = Rotations.haar(jax.random.key(2), 6, 6).r_in, Rotations.haar(jax.random.key(3), 3, 3).r_in
    model = write_layer(trained.model, trained.first, first.rotate(r_in, None))
    model = write_layer(model, trained.second, second.rotate(None, r_out))
    np.testing.assert_allclose(trained.apply(model, X @ r_in.T), trained.apply(trained.model, X) @ r_out.T, atol=1e-5)


def test_equinox_mlp():
    mlp = eqx.nn.MLP(4, 3, 8, 2, activation=jnp.tanh, key=jax.random.key(0))
    where, layers = equinox_mlp(mlp)
    x = jax.random.normal(jax.random.key(1), (7, 4))
    y = x
    for layer in layers:
        y = layer(y)
    np.testing.assert_allclose(y, jax.vmap(mlp)(x), atol=1e-6)

    r = Rotations.haar(jax.random.key(2), 4, 4).r_in
    turned = write_layer(mlp, where[0], layers[0].rotate(r, None))
    np.testing.assert_allclose(jax.vmap(turned)(x @ r.T), jax.vmap(mlp)(x), atol=1e-6)
    with pytest.raises(ValueError, match="take this layer and the next as one block"):
        write_layer(mlp, where[0], layers[0].rotate(None, jnp.eye(8)[::-1]))


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_equinox_mlp_whose_activation_has_parameters(depth):
    mlp = eqx.nn.MLP(8, 8, 12, depth, eqx.nn.PReLU(0.3), eqx.nn.PReLU(0.2), key=jax.random.key(0))
    slopes = lambda leaf: jnp.linspace(0.1, 0.9, leaf.size).reshape(leaf.shape)  # noqa: E731
    mlp = eqx.tree_at(lambda m: (m.activation, m.final_activation), mlp, replace_fn=lambda a: jax.tree.map(slopes, a))
    y = x = jax.random.normal(jax.random.key(1), (2, 8))
    for layer in equinox_mlp(mlp)[1]:
        y = layer(y)
    np.testing.assert_allclose(y, jax.vmap(mlp)(x), atol=1e-6)


def test_gated_block_of_dense_layers():
    rngs = nnx.Rngs(0)
    model = nnx.Dict(gate=nnx.Linear(4, 9, rngs=rngs), up=nnx.Linear(4, 9, rngs=rngs), down=nnx.Linear(9, 4, rngs=rngs))
    where = FLAX.gated("gate", "up", "down")
    layer = read_layer(model, where, activation="silu")
    assert isinstance(layer, GatedMLP)
    x = jax.random.normal(jax.random.key(1), (7, 4))
    expected = model.down(nn.silu(model.gate(x)) * model.up(x))
    np.testing.assert_allclose(layer(x), expected, atol=1e-6)
    r = Rotations.haar(jax.random.key(2), 4, 4)
    turned = write_layer(model, where, fold(layer, r, x).layer)
    z = jnp.asarray(r.apply_in(x))
    np.testing.assert_allclose(turned.down(nn.silu(turned.gate(z)) * turned.up(z)), r.apply_out(expected), atol=1e-5)


def test_numpy_float64_stays(rng):
    tree = {"a.weight": rng.normal(size=(8, 4)), "b.weight": rng.normal(size=(4, 8))}
    where = Where({"w_in": "a.weight", "w_out": "b.weight"})
    again = write_layer(tree, where, read_layer(tree, where))
    assert isinstance(again["a.weight"], np.ndarray) and again["a.weight"].dtype == np.float64
    np.testing.assert_array_equal(again["b.weight"], tree["b.weight"])


# --- bad input ----------------------------------------------------------------------------------------------------


def test_names_that_are_not_there():
    mlp = eqx.nn.MLP(4, 3, 8, 1, use_bias=False, use_final_bias=False, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"no array 'layer.0.weight'. It has layers\.\d\.weight, layers\.\d\.weight$"):
        read_layer(mlp, EQUINOX.dense("layer.0"))
    where = EQUINOX.block("layers.0", "layers.1")
    layer = read_layer(mlp, where)
    assert isinstance(layer, MLP) and layer.b_in is None
    with pytest.raises(ValueError, match=r"a bias b_in, and the model has no place for it \('layers\.0\.bias'\)"):
        write_layer(mlp, where, MLP(layer.w_in, np.ones(8, np.float32), layer.w_out))
    write_layer(mlp, where, MLP(layer.w_in, np.zeros(8, np.float32), layer.w_out))  # a bias of zero is none


def test_shapes_that_do_not_fit():
    mlp = eqx.nn.MLP(4, 3, 8, 1, key=jax.random.key(0))
    with pytest.raises(
        ValueError, match=r"w_in would be \[8, 5\] in 'layers\.0\.weight', where the model has \[8, 4\]"
    ):
        write_layer(mlp, EQUINOX.block("layers.0", "layers.1"), MLP(np.ones((8, 5), "f"), None, np.ones((3, 8), "f")))
    with pytest.raises(ValueError, match=r"b_in should have shape \[4\].*got \[8\]"):  # read the wrong way round
        read_layer(mlp, Convention("weight", "bias", transposed=True).block("layers.0", "layers.1"))
