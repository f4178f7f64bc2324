"""Every baseline is orthogonal, deterministic and of the layer's size, and does what defines it."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layer_kinds import LAYERS, correlated_inputs, random_weights
from rotsparse._core.alignment import mean_max_cosine
from rotsparse.evaluation import baselines
from rotsparse.evaluation.held_fits import held_fits
from rotsparse.layers.gated import GatedMLP
from rotsparse.layers.jacobians import LayerStatistics
from rotsparse.layers.mlp import Dense
from rotsparse.solvers.anneal import Anneal


@pytest.fixture(params=LAYERS)
def layer(request, rng):
    return LAYERS[request.param](rng)


@pytest.fixture
def x(rng):
    return correlated_inputs(rng)


def diagonal(m, atol=1e-5):
    m = np.asarray(m)
    k = min(m.shape)
    off = m.copy()
    off[np.arange(k), np.arange(k)] = 0
    return np.abs(off).max() < atol * np.abs(m).max() and (np.diff(np.diagonal(m)) < atol).all()


def conjugated(r, m):
    r = np.asarray(r, np.float64)
    return r @ m @ r.T


def test_the_key_draws_the_random_ones(x, rng):
    layer = LAYERS["mlp"](rng)
    a, b = (baselines.haar(layer, x, key=jax.random.key(k)) for k in (0, 1))
    assert np.abs(a.r_in - b.r_in).max() > 0.1
    assert np.abs(a.r_in[:4, :4] - a.r_out).max() > 0.1


def test_pca_diagonalises_the_covariances(layer, x):
    r = baselines.pca(layer, x)
    assert diagonal(conjugated(r.r_in, np.cov(x.T, bias=True)))
    assert diagonal(conjugated(r.r_out, np.cov(np.asarray(layer(x)).T, bias=True)))


def test_uncentred_pca_diagonalises_the_second_moments(layer, x):
    r = baselines.pca_uncentred(layer, x)
    y = np.asarray(layer(x), np.float64)
    assert diagonal(conjugated(r.r_in, x.T @ x / len(x)))
    assert diagonal(conjugated(r.r_out, y.T @ y / len(x)))


def test_mean_jacobian_svd_diagonalises_the_mean_jacobian(layer, x):
    r = baselines.svd_mean_jacobian(layer, x)
    assert diagonal(np.mean(layer.jacobian(jnp.asarray(x), r.r_in, r.r_out), axis=0))


def test_weighted_mean_jacobian_svd(layer, x):
    r = baselines.svd_mean_jacobian_weighted(layer, x)
    mean = np.mean(np.asarray(layer.jacobian(jnp.asarray(x)), np.float64), axis=0)
    sigma = np.cov(x.T, bias=True)
    assert diagonal(conjugated(r.r_out, mean @ sigma @ mean.T))
    values, axes = np.linalg.eigh(sigma)
    root = axes @ np.diag(np.sqrt(values)) @ axes.T
    assert diagonal(np.asarray(r.r_out) @ mean @ root @ np.asarray(r.r_in).T)
    # R_in is the orthogonal matrix nearest to the coordinates in which the mean Jacobian is diagonal.
    left, _, right = np.linalg.svd(np.asarray(r.r_in, np.float64) @ np.linalg.inv(root))
    np.testing.assert_allclose(left @ right, r.r_in, atol=1e-5)


def test_jacobian_gram_diagonalises_both_grams(layer, x):
    r = baselines.jacobian_gram(layer, x)
    j = np.asarray(layer.jacobian(jnp.asarray(x)), np.float64)
    assert diagonal(conjugated(r.r_in, np.einsum("noi,noj->ij", j, j) / len(x)))
    assert diagonal(conjugated(r.r_out, np.einsum("noi,npi->op", j, j) / len(x)))


def test_weight_svd_diagonalises_the_weights(x, rng):
    mlp, dense, residual = (LAYERS[name](rng) for name in ("mlp", "dense", "residual"))
    for layer, product in [
        (mlp, mlp.w_out @ mlp.w_in),
        (dense, dense.w),
        (residual, residual.w_out @ (residual.w_in * residual.norm.scale) @ (np.eye(6) - 1 / 6)),
    ]:
        r = baselines.svd_weights(layer, x)
        assert diagonal(np.asarray(r.r_out) @ product @ np.asarray(r.r_in).T)


def test_weight_svd_of_a_gated_block_ignores_what_does_not_change_its_function(x, rng):
    layer = LAYERS["gated"](rng)
    flipped = GatedMLP(layer.w_gate, -layer.w_up, -layer.w_down)
    np.testing.assert_allclose(layer(x), flipped(x), atol=1e-5)
    a, b = baselines.svd_weights(layer, x), baselines.svd_weights(flipped, x)
    assert mean_max_cosine(a.r_in, b.r_in) == pytest.approx(1, abs=1e-5)
    assert mean_max_cosine(a.r_out, b.r_out) == pytest.approx(1, abs=1e-5)
    gram = layer.w_gate.T @ layer.w_gate + layer.w_up.T @ layer.w_up
    assert diagonal(conjugated(a.r_in, gram))
    assert diagonal(conjugated(a.r_out, layer.w_down @ layer.w_down.T))


def test_weight_svd_needs_weights(x, rng):
    with pytest.raises(ValueError, match="svd_mean_jacobian works for every layer"):
        baselines.svd_weights(LAYERS["function"](rng), x)


def test_ica_recovers_planted_sources(rng):
    directions = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    sources = rng.laplace(size=(5000, 6)) * np.array([0.3, 1, 1, 1, 2, 4])
    x = (sources @ directions + 5).astype(np.float32)
    layer = Dense(np.eye(6, dtype=np.float32), activation="identity")
    r = baselines.ica(layer, x, seed=0)
    assert mean_max_cosine(r.r_in, directions) > 0.995
    assert mean_max_cosine(r.r_out, directions) > 0.995
    # Four of the sources have equal variances or nearly so: the principal axes do not find them.
    assert mean_max_cosine(baselines.pca(layer, x).r_in, directions) < 0.95


def test_ica_leaves_directions_without_variance_alone(rng):
    x = rng.laplace(size=(2000, 5)).astype(np.float32)
    x[:, 3] = 2
    layer = Dense(np.eye(5, dtype=np.float32), activation="identity")
    r = np.asarray(baselines.ica(layer, x, seed=0).r_in)
    np.testing.assert_allclose(np.abs(r[-1]), np.eye(5)[3], atol=1e-6)
    np.testing.assert_allclose(r[:-1, 3], 0, atol=1e-6)


def test_ica_that_does_not_converge_is_reported_and_still_orthogonal(rng, caplog, monkeypatch):
    monkeypatch.setattr(baselines, "_ICA_ITERATIONS", 2)
    layer = Dense(random_weights(rng, 20, 20))
    with caplog.at_level(logging.INFO, logger="rotsparse"):
        r = baselines.ica(layer, rng.standard_normal((100, 20)).astype(np.float32), seed=0)
    assert "has not converged" in caplog.text
    assert r.orthogonality_error() < 1e-6


def varimax_criterion(axes, cov, kept):
    """Kaiser's normal varimax criterion of the first `kept` factors."""
    axes = np.asarray(axes, np.float64)[:kept]
    # Loadings of rotated factors: the covariance of the variables with the unit-variance factors that were rotated.
    values, vectors = np.linalg.eigh(cov)
    principal, scale = vectors.T[::-1][:kept], np.sqrt(values[::-1][:kept])
    loadings = (principal.T * scale) @ (principal @ axes.T)
    loadings /= np.linalg.norm(loadings, axis=1, keepdims=True)
    return np.square(loadings).var(axis=0).sum()


def test_varimax_increases_its_criterion_and_keeps_the_factor_space(rng):
    # Two groups of variables, each driven by a factor of its own. The factors correlate, so the principal axes are
    # their sum and their difference, which load on every variable.
    factors = rng.standard_normal((3000, 2)) @ np.array([[1, 0.3], [0.3, 1]])
    x = factors @ np.kron(np.eye(2), np.ones(4)) + 0.2 * rng.standard_normal((3000, 8))
    x = x.astype(np.float32)
    layer = Dense(np.eye(8, dtype=np.float32), activation="identity")
    pca, varimax = baselines.pca(layer, x).r_in, baselines.varimax(layer, x).r_in
    cov = np.cov(x.T, bias=True)
    assert varimax_criterion(varimax, cov, 2) > varimax_criterion(pca, cov, 2) + 0.05
    # No other rotation of the two factors has a higher criterion.
    best = max(
        varimax_criterion(np.array([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]]) @ pca[:2], cov, 2)
        for t in np.linspace(0, np.pi, 500)
    )
    assert varimax_criterion(varimax, cov, 2) > best - 1e-6
    np.testing.assert_allclose(varimax[:2].T @ varimax[:2], pca[:2].T @ pca[:2], atol=1e-5)
    np.testing.assert_array_equal(varimax[2:], pca[2:])


@pytest.mark.parametrize("d", [1, 2, 3, 6, 12, 64, 100, 768])
def test_hadamard_spreads_every_neuron(d):
    r = baselines._hadamard(d)
    np.testing.assert_allclose(r @ r.T, np.eye(d), atol=1e-12)
    assert np.abs(r).max() <= np.sqrt(2 / d) + 1e-12
    if d & (d - 1) == 0:
        np.testing.assert_allclose(np.abs(r), 1 / np.sqrt(d))


def test_neurons_are_the_identity(layer, x):
    r = baselines.neurons(layer, x)
    np.testing.assert_array_equal(r.r_in, np.eye(layer.d_in))
    np.testing.assert_array_equal(r.r_out, np.eye(layer.d_out))


def test_dead_inputs_and_outputs_do_no_harm(rng):
    x = rng.standard_normal((50, 6)).astype(np.float32)
    x[:, :3] = 0
    dead = Dense(random_weights(rng, 5, 6), np.full(5, -100, np.float32))
    for name, r in baselines.all_baselines(dead, x, key=jax.random.key(0)).items():
        assert r.orthogonality_error() < 1e-6, name


def test_bad_inputs_are_named(layer):
    with pytest.raises(ValueError, match="NaN"):
        baselines.pca(layer, np.full((10, 6), np.nan, np.float32))
    with pytest.raises(ValueError, match="6"):
        baselines.all_baselines(layer, np.ones((10, 5), np.float32), key=jax.random.key(0))


def test_statistics_are_computed_once(layer, x, monkeypatch):
    calls = []
    original = LayerStatistics.jacobian.func
    monkeypatch.setattr(LayerStatistics.jacobian, "func", lambda self: calls.append(None) or original(self))
    baselines.all_baselines(layer, x, key=jax.random.key(0))
    assert len(calls) == 1


def test_singular_vectors_of_the_mean_jacobian_are_turned_by_varimax(rng):
    # Two groups of inputs, each moving a group of outputs; nearly equal singular values mix the groups.
    jacobian = np.kron(np.array([[1, 0.1], [0.1, 1]]), np.ones((3, 3))) + 0.01 * rng.standard_normal((6, 6))
    layer, x = Dense(jacobian.astype(np.float32), activation="identity"), correlated_inputs(rng)
    groups = np.kron(np.eye(2), np.ones(3)) / np.sqrt(3)
    turned, singular = baselines.svd_varimax(layer, x), baselines.svd_mean_jacobian(layer, x)
    for side in ("r_in", "r_out"):
        of_groups, before = (
            np.abs(np.asarray(getattr(r, side))[:2] @ groups.T).max(axis=1) for r in (turned, singular)
        )
        assert (of_groups > 0.99).all() and (before < 0.8).all()


def test_held_fits_leave_one_side_at_the_neurons(x, rng):
    layer = LAYERS["mlp"](rng)
    found = held_fits(layer, x, key=jax.random.key(0), method=Anneal(steps=30))
    np.testing.assert_array_equal(found["outputs_held"].r_out, np.eye(layer.d_out))
    np.testing.assert_array_equal(found["inputs_held"].r_in, np.eye(layer.d_in))
    assert np.abs(found["outputs_held"].r_in - np.eye(layer.d_in)).max() > 0.1
    assert np.abs(found["inputs_held"].r_out - np.eye(layer.d_out)).max() > 0.1
