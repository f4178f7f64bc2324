"""Streamed statistics against dense formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rotsparse import statistics
from rotsparse.layers import MLP, Dense, FunctionLayer
from rotsparse.statistics import LayerStatistics, chunk_size, chunks, covariance, jacobian_gram, jacobian_moments


def mlp(rng, d_in=5, hidden=7, d_out=4):
    w_in = rng.standard_normal((hidden, d_in)).astype(np.float32)
    w_out = rng.standard_normal((d_out, hidden)).astype(np.float32)
    return MLP(w_in, rng.standard_normal(hidden).astype(np.float32), w_out, activation="gelu")


@pytest.mark.parametrize("n", [1, 6, 7, 20])
def test_chunks_hold_every_row_once_and_have_one_shape(n):
    x = np.arange(2 * n).reshape(n, 2)
    parts = list(chunks(x, 7))
    np.testing.assert_array_equal(np.concatenate([np.asarray(c)[:count] for c, count in parts]), x)
    assert {c.shape for c, _ in parts} == {(min(7, n), 2)}


def test_covariance_with_a_mean_far_larger_than_the_spread(rng, monkeypatch):
    monkeypatch.setattr(statistics, "CHUNK_BYTES", 8 * 6 * 37)  # 37 rows a chunk: the last one is not full
    x = rng.standard_normal((1000, 6)) @ rng.standard_normal((6, 6)) + 1e6
    mean, cov = covariance(x)
    np.testing.assert_allclose(mean, x.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(cov, np.cov(x.T, bias=True), rtol=1e-8, atol=1e-9)


def test_covariance_of_outputs(rng):
    layer, x = mlp(rng), rng.standard_normal((200, 5)).astype(np.float32)
    np.testing.assert_allclose(
        LayerStatistics(layer, x).outputs[1],
        np.cov(np.asarray(layer(x), np.float64).T, bias=True),
        rtol=1e-5,
        atol=1e-6,
    )


def test_jacobian_moments_against_autodiff(rng, x64, monkeypatch):
    monkeypatch.setattr(statistics, "CHUNK_BYTES", 4 * 35 * 16)  # 16 examples a chunk
    layer, x = mlp(rng), jnp.asarray(rng.standard_normal((50, 5)))
    j = np.asarray(jax.vmap(jax.jacfwd(layer))(x))
    moments = jacobian_moments(layer, x)
    np.testing.assert_allclose(moments.mean, j.mean(axis=0), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(moments.gram_in, np.mean([a.T @ a for a in j], axis=0), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(moments.gram_out, np.mean([a @ a.T for a in j], axis=0), rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(jacobian_gram(layer, x), moments.gram_in)


def test_jacobians_come_in_order_and_scaled_by_the_rows_of_the_rotations(rng, monkeypatch):
    monkeypatch.setattr(statistics, "CHUNK_BYTES", 4 * 35 * 4)  # four examples a chunk
    layer, x = mlp(rng), jnp.asarray(rng.standard_normal((10, 5)), jnp.float32)
    scaled = np.diag([1.0, 2, 3, 4, 5])
    parts = list(statistics.jacobians(layer, x, scaled))
    assert [len(p) for p in parts] == [4, 4, 2]
    expected = layer.jacobian(x) * np.arange(1, 6, dtype="f")
    np.testing.assert_allclose(np.concatenate(parts), expected, rtol=1e-5, atol=1e-5)


def test_chunk_size_counts_the_hidden_layer_and_never_falls_to_zero():
    wide = MLP(np.ones((3072, 768), np.float32), None, np.ones((768, 3072), np.float32))
    assert chunk_size(wide) == statistics.CHUNK_BYTES // (4 * 768 * 3072)
    assert chunk_size(FunctionLayer(function=jnp.tanh, d_in=8, d_out=8), 4 * 64 * 10) == 10
    assert chunk_size(wide, 1) == 1


def test_the_jacobian_is_traced_once_however_many_chunks(rng, monkeypatch):
    monkeypatch.setattr(statistics, "CHUNK_BYTES", 4 * 9 * 8)  # eight examples a chunk
    traces = []

    def function(x):
        traces.append(None)
        return jnp.tanh(x)

    layer, x = FunctionLayer(function=function, d_in=3, d_out=3), jnp.asarray(rng.standard_normal((50, 3)), jnp.float32)
    assert len(list(statistics.jacobians(layer, x))) == 7
    assert len(traces) == 1


def test_bad_inputs_are_named():
    with pytest.raises(ValueError, match=r"x should have shape \[examples, 5\]"):
        LayerStatistics(Dense(np.eye(5, dtype=np.float32)), np.ones((4, 6), np.float32))
