"""Moves of finite size: what the Jacobian names against what moves, one example and one input at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rotsparse as rs
from rotsparse._core.orthogonal import haar
from rotsparse.data import moments
from rotsparse.evaluation.finite_effects import finite_effects, named_effects

KEY = jax.random.key(0)


@pytest.fixture
def block(rng):
    w_in, w_out = rng.standard_normal((9, 4)), rng.standard_normal((3, 9)) * (rng.uniform(size=(3, 9)) < 0.5)
    layer = rs.MLP(w_in.astype(np.float32), rng.standard_normal(9).astype(np.float32), w_out.astype(np.float32))
    return layer, (rng.standard_normal((25, 4)) * [2, 1, 1, 0.3]).astype(np.float32)


@pytest.mark.parametrize("chunk_bytes", [None, 4 * 36 * 7])
def test_named_effects_count_by_the_definition(block, monkeypatch, chunk_bytes):
    layer, x = block
    if chunk_bytes:
        monkeypatch.setattr(moments, "CHUNK_BYTES", chunk_bytes)
    r = rs.Rotations.haar(KEY, 4, 3)
    r_in, r_out = (np.asarray(m, np.float64) for m in (r.r_in, r.r_out))
    deviations = (x @ r_in.T).std(axis=0)
    z = np.asarray(layer.jacobian(jnp.asarray(x), r.r_in, r.r_out), np.float64) * deviations
    named = np.abs(z) >= 0.2 * np.sqrt(np.mean(np.square(z)))
    outputs = lambda x: np.asarray(layer(jnp.asarray(x, jnp.float32)), np.float64) @ r_out.T  # noqa: E731
    y = outputs(x)
    for found in named_effects(layer, x, r, sizes=(0.5, 2), threshold=0.3, small=0.2):
        moved = [
            [np.abs(outputs(x + sign * found.size * deviations[i] * r_in[i]) - y) > 0.3 * y.std(axis=0)]
            for i in range(4)
            for sign in (1, -1)
        ]
        moved = np.moveaxis(np.array(moved).reshape(4, 2, 25, 3), 0, -1)  # [sign, example, output, input]
        both = (moved & named).sum()
        expected = (moved.mean(), named.mean(), both / moved.sum(), both / (2 * named.sum()))
        np.testing.assert_allclose(found[1:], expected, atol=0.01)
    everything = finite_effects(layer, x, r, size=2, threshold=0.3)
    assert found.moved == pytest.approx(everything.mean(), abs=1e-6)


def test_a_linear_layer_moves_what_its_jacobian_names(rng):
    """Three inputs that move an output each, in a hidden basis: by 0.25 of a standard deviation and by 2."""
    truth = rs.Rotations(haar(KEY, 3), haar(jax.random.key(1), 3))
    layer = rs.Dense(np.asarray(truth.r_out.T @ truth.r_in), activation="identity")
    x = rng.standard_normal((200, 3)).astype(np.float32)
    for found in named_effects(layer, x, truth):
        assert found[1:] == pytest.approx((1 / 3, 1 / 3, 1, 1), abs=1e-6)
    for found in named_effects(layer, x, rs.Rotations.identity(3, 3)):
        assert found.named > 0.8


def test_a_gate_that_a_move_opens_was_not_named():
    """A ReLU that is closed on every example but one: large moves open it on others, and no Jacobian says so."""
    layer = rs.Dense(np.eye(2, dtype=np.float32), np.array([0, -1], np.float32))
    x = np.array([[1.0, 0.9], [2.0, 0.8], [3.0, 0.7], [4.0, 1.1]], np.float32)
    small, large = named_effects(layer, x, rs.Rotations.identity(2, 2), sizes=(0.1, 20))
    assert large.moved > small.moved and large.named_of_moved < small.named_of_moved


def test_what_does_not_fit_is_refused(block):
    layer, x = block
    with pytest.raises(ValueError, match="widths 5 and 3, the layer 4 and 3"):
        named_effects(layer, x, rs.Rotations.identity(5, 3))
    dead = rs.Dense(np.ones((2, 4), np.float32), np.full(2, -100, np.float32))
    with pytest.raises(ValueError, match="zero for every example"):
        named_effects(dead, x, rs.Rotations.identity(4, 2))
