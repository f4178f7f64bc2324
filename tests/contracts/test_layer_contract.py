"""What every kind of layer does. Add a new one to `LAYERS` in `layer_kinds.py`."""

import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import random_orthogonal
from layer_kinds import D_IN, LAYERS
from rotsparse.layers.base import Layer
from rotsparse.layers.fold import fold
from rotsparse.layers.rotations import Rotations
from rotsparse.layers.subspace import Subspace

N = 3


def a_subspace(rng):
    layer = LAYERS["mlp"](rng)
    frames = (random_orthogonal(rng, d)[:k] for d, k in ((layer.d_in, 4), (layer.d_out, 3)))
    return Subspace(layer, *(frame.astype(np.float32) for frame in frames))


KINDS = {**LAYERS, "subspace": a_subspace}


@pytest.fixture(params=KINDS)
def layer(request, rng):
    return KINDS[request.param](rng)


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.standard_normal((N, D_IN)) + 0.3, jnp.float32)


def test_every_kind_is_here(rng):
    def kinds(of):
        return {of, *(kind for below in of.__subclasses__() for kind in kinds(below))}

    ours = {kind for kind in kinds(Layer) if kind.__module__.startswith("rotsparse.layers.")}
    assert {type(make(rng)) for make in KINDS.values()} == {kind for kind in ours if not inspect.isabstract(kind)}


def test_its_jacobian_is_autodiffs_rotated(layer, x, rng):
    r = Rotations.haar(jax.random.key(0), layer.d_in, layer.d_out)
    if isinstance(layer, Subspace):  # its examples are whole: it has no input of its own to differentiate by
        plain = layer.frame_out @ np.asarray(jax.vmap(jax.jacfwd(layer.layer))(x)) @ layer.frame_in.T
    else:
        plain = np.asarray(jax.vmap(jax.jacfwd(layer))(x))
    assert plain.shape == (N, layer.d_out, layer.d_in)
    np.testing.assert_allclose(layer.jacobian(x), plain, atol=1e-5)
    np.testing.assert_allclose(layer.jacobian(x, r.r_in, None), plain @ np.asarray(r.r_in).T, atol=1e-5)
    np.testing.assert_allclose(layer.jacobian(x, None, r.r_out), np.asarray(r.r_out) @ plain, atol=1e-5)
    z = layer.jacobian(x, r.r_in[:2], r.r_out[:1])
    np.testing.assert_allclose(z, np.asarray(r.r_out)[:1] @ plain @ np.asarray(r.r_in)[:2].T, atol=1e-5)
    assert z.dtype == layer(x).dtype == jnp.float32


@pytest.mark.parametrize("kind", LAYERS)  # a subspace is a view of a layer for its Jacobians, and is not folded
def test_folded_it_is_the_same_function(kind, x, rng):
    layer = LAYERS[kind](rng)
    folded = fold(layer, Rotations.haar(jax.random.key(0), layer.d_in, layer.d_out), x)
    assert (folded.layer.d_in, folded.layer.d_out) == (layer.d_in, layer.d_out)
    assert folded.error < 1e-5 and folded.layer.jacobian(x).shape == (N, layer.d_out, layer.d_in)


def test_it_takes_any_leading_axes(layer, x):
    together = layer(jnp.stack([x, 2 * x]))
    assert together.shape == (2, N, layer.d_out)
    np.testing.assert_allclose(together[1], layer(2 * x), atol=1e-6)
    np.testing.assert_allclose(together[0, 0], layer(x[0]), atol=1e-6)


def test_it_is_traced_once_for_other_weights_of_the_same_shape(layer, x):
    traces = []

    @eqx.filter_jit
    def jacobian(layer, x):
        traces.append(None)
        return layer.jacobian(x)

    other = jax.tree.map(lambda w: 0.5 * w if eqx.is_inexact_array_like(w) else w, layer)
    for each in (layer, other):
        np.testing.assert_allclose(jacobian(each, x), each.jacobian(x), atol=1e-5)
    assert len(traces) == 1


def test_gathered_for_examples_it_has_the_same_jacobian_there(layer, x):
    np.testing.assert_allclose(layer.gathered(x).jacobian(x), layer.jacobian(x), atol=1e-6)


def test_its_weights_can_be_replaced_by_name_and_by_nothing_else(layer, x):
    weights = layer.weights()
    same = layer.with_weights(**weights)
    np.testing.assert_array_equal(same(x), layer(x))
    for name, w in weights.items():
        changed = layer.with_weights(**{name: 2 * w})
        np.testing.assert_array_equal(changed.weights()[name], 2 * w)
        np.testing.assert_array_equal(layer.weights()[name], w)
        with pytest.raises(ValueError, match=f"cannot replace {name}"):
            layer.with_weights(**{name: w[1:]})
    with pytest.raises(ValueError, match="cannot replace w_other"):
        layer.with_weights(w_other=np.ones((2, 2), np.float32))
