"""The parts of the modular-addition experiment that other results rest on, on a small network with random weights."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rotsparse as rs
from helpers import ROOT
from rotsparse._core.orthogonal import haar
from rotsparse.objectives import JacobianSparsity
from rotsparse.objectives.base import sampled

sys.path.insert(0, str(ROOT / "experiments"))

from _modular_addition import Attention, Copies


@pytest.fixture
def attention(rng, x64):
    """Two heads of three dimensions over a stream of five, in float64."""
    shapes = {"W_Q": (2, 5, 3), "W_K": (2, 5, 3), "W_V": (2, 5, 3), "W_O": (2, 3, 5)}
    shapes |= {"b_Q": (2, 3), "b_K": (2, 3), "b_V": (2, 3), "b_O": (5,)}
    w = {f"blocks.0.attn.{name}": rng.standard_normal(shape) for name, shape in shapes.items()}
    return w, Attention(w, rng.standard_normal(5))


def test_attention_is_the_transformers(attention, rng):
    """Against the textbook: queries, keys, values and a softmax over three positions."""
    w, layer = attention
    x = rng.standard_normal((4, 10))
    q, k, v, o, b_q, b_k, b_v, b_o = (w[f"blocks.0.attn.{n}"] for n in "W_Q W_K W_V W_O b_Q b_K b_V b_O".split())
    for row, y in zip(x, layer(x), strict=True):
        stream = np.stack([row[:5], row[5:], layer.last])
        expected = stream[2] + b_o
        for h in range(2):
            score = (stream @ k[h] + b_k[h]) @ (stream[2] @ q[h] + b_q[h]) / np.sqrt(3)
            weight = np.exp(score) / np.exp(score).sum()
            expected = expected + weight @ (stream @ v[h] + b_v[h]) @ o[h]
        np.testing.assert_allclose(y, expected, rtol=1e-10)


def test_attention_jacobian(attention, rng):
    layer, x = attention[1], jnp.asarray(rng.standard_normal((4, 10)))
    r_in, r_out = rng.standard_normal((7, 10)), rng.standard_normal((3, 5))
    expected = jax.vmap(jax.jacfwd(layer))(x)
    np.testing.assert_allclose(layer.jacobian(x), expected, atol=1e-12)
    np.testing.assert_allclose(layer.jacobian(x, r_in, r_out), r_out @ expected @ r_in.T, atol=1e-12)


def test_copies_share_one_rotation(attention, rng):
    """The value is that of the block-diagonal rotation, and the gradient its derivative."""
    layer, x = attention[1], jnp.asarray(rng.standard_normal((20, 10)))
    inner = JacobianSparsity(layer, x, rs.Log(0.3))
    objective = Copies(inner, "in", 2)
    assert objective.spaces == {"in": 5, "out": 5}
    r, r_out = haar(jax.random.key(0), 5, jnp.float64), jnp.eye(5)
    value, grads = objective.value_and_grad({"in": r, "out": r_out})
    assert float(value) == pytest.approx(float(inner.value({"in": jnp.kron(jnp.eye(2), r), "out": r_out})), rel=1e-12)
    omega = rng.standard_normal((5, 5))
    omega = omega - omega.T
    moved = lambda t: objective.value({"in": jax.scipy.linalg.expm(t * omega) @ r, "out": r_out})  # noqa: E731
    slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
    assert float(jnp.sum(grads["in"] * omega)) == pytest.approx(float(slope), rel=1e-5)


def test_copies_draw_the_minibatches_of_what_they_copy(attention, rng):
    inner = JacobianSparsity(attention[1], jnp.asarray(rng.standard_normal((20, 10))), rs.Log(0.3))
    key, bases = jax.random.key(0), {"in": jnp.eye(5), "out": jnp.eye(5)}
    batch = sampled(Copies(inner, "in", 2), key, 4)
    assert float(batch.value(bases)) == float(Copies(sampled(inner, key, 4), "in", 2).value(bases))
    assert float(batch.value(bases)) != float(Copies(inner, "in", 2).value(bases))


def test_redrawn_attention_keeps_the_scale_and_nothing_else(attention):
    _, layer = attention
    null = layer.redrawn(jax.random.key(0))
    for name in ("value", "score"):
        old, new = getattr(layer, name), getattr(null, name)
        assert new.shape == old.shape and not jnp.any(new == old)
        assert 0.5 < float(jnp.mean(jnp.square(new)) / jnp.mean(jnp.square(old))) < 2
    for name in ("value_bias", "score_bias", "last", "bias"):
        np.testing.assert_array_equal(getattr(null, name), getattr(layer, name))
