"""Covariances that a few rows cannot move, and the units that they give."""

from typing import Any

import jax
import numpy as np
import pytest

import rotsparse as rs
from rotsparse.data.moments import covariance, far_rows
from rotsparse.data.scales import by_name, covariance_of, named, winsorised
from rotsparse.evaluation.units import units_of


@pytest.fixture
def x(rng):
    return rng.standard_normal((4000, 6)).astype(np.float32) @ np.diag([1, 2, 3, 1, 2, 3]).astype(np.float32)


def test_of_normal_rows_it_is_the_covariance_but_for_a_factor(x):
    ratio = np.diagonal(winsorised(x)) / np.diagonal(covariance(x)[1])
    np.testing.assert_allclose(np.sqrt(ratio), 0.96, atol=0.01)


def test_it_is_the_definition(rng):
    x = (rng.laplace(size=(9000, 3)) @ rng.standard_normal((3, 3))).astype(np.float32)  # more rows than one block
    mean, sigma = covariance(x)
    v = np.linalg.eigh(sigma)[1]
    z = (x - mean) @ v
    some = z[np.arange(8192) * len(x) // 8192]
    clipped = np.clip(z, *np.quantile(some, [0.02, 0.98], axis=0))
    np.testing.assert_allclose(winsorised(x), v @ np.cov(clipped.T, bias=True) @ v.T, rtol=1e-9, atol=1e-12)


def test_it_turns_with_the_inputs(x):
    r = np.asarray(rs.Rotations.haar(jax.random.key(0), 6, 6).r_in, np.float64)
    stretched = x * np.arange(1, 7)  # distinct principal components
    np.testing.assert_allclose(winsorised(stretched @ r.T), r @ winsorised(stretched) @ r.T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [5, 15, 30, 3e4])
@pytest.mark.parametrize("directions", [1, 2])
def test_one_row_in_a_hundred_moves_it_little(x, size, directions):
    outlying = x.copy()
    for i in range(directions):
        outlying[i :: 100 * directions] = size * np.eye(6, dtype=np.float32)[3 * i]
    expected = np.diagonal(winsorised(x))
    np.testing.assert_allclose(np.diagonal(winsorised(outlying)), expected, rtol=0.15)
    if size == 15:  # too near for the default to leave them out
        assert far_rows(outlying) < 40 and np.diagonal(covariance_of(True, outlying))[0] > 2 * expected[0]


def test_names_and_functions(x):
    assert [named(by_name(name)) for name in ("std", "robust", "none")] == [True, "winsorised", False]
    with pytest.raises(ValueError, match="a scale is one of std, robust, none, got 'mad'"):
        by_name("mad")
    with pytest.raises(ValueError, match=r"the covariance that scales.*\[6, 6\]"):
        covariance_of(lambda rows: np.ones(len(rows.T)), x)


def sinks(size):
    """`../shared/cases/08_attention_sinks.py`: a planted block, and one row in a hundred of the given norm."""
    rng, d, h = np.random.default_rng(0), 16, 48
    a, b = (np.linalg.qr(np.random.default_rng(s).normal(size=(d, d)))[0] for s in (1, 2))
    w_in, w_out = (rng.normal(size=s) * (rng.random(s) < 0.15) for s in ((h, d), (d, h)))
    w_in, bias, w_out = (w.astype(np.float32) for w in (w_in @ a, rng.normal(size=h) * 0.2, b.T @ w_out))
    layer = rs.MLP(w_in, bias, w_out, activation="gelu", norm=rs.rms_norm(np.ones(d, np.float32), 1e-6))
    x = (rng.normal(size=(2000, d)) @ a).astype(np.float32)
    if size:
        x[::100] = 0
        x[::100, 3], x[::100, 7] = size, -size / 2
    return layer, x, a


def test_a_fit_says_which_rows_the_default_leaves_out(x):
    layer = rs.Dense(np.eye(6, dtype=np.float32), np.zeros(6, np.float32), activation="identity")
    options: dict[str, Any] = {"key": jax.random.key(0), "method": rs.Anneal(steps=2), "scale_outputs": True}
    assert "left out" not in rs.find_rotations(layer, x, **options).detail
    x[::100, 0] = 1000
    said = rs.find_rotations(layer, x, **options).detail
    assert "40 of 4,000 examples lie more than 5 times as far from the median as most" in said
    assert "the outputs of 40 of 4,000 examples are as far from the median of outputs" in said
    robust: dict[str, Any] = {"scale_inputs": winsorised, "scale_outputs": winsorised}
    assert "far" not in rs.find_rotations(layer, x, **options | robust).detail


@pytest.mark.slow
@pytest.mark.parametrize("size", [15, 120])
def test_planted_bases_survive_sinks_of_any_norm(size):
    found = {}
    for of in (0, size):
        layer, x, truth = sinks(of)
        fit = rs.find_rotations(layer, x, key=jax.random.key(0), restarts=4, scale_inputs=winsorised)
        found[of] = rs.mean_max_cosine(fit.rotations.r_in, truth)
    assert found[size] > found[0] - 0.02


def test_objective_metrics_and_nulls_take_the_same_units(x):
    layer = rs.MLP(*(np.random.default_rng(0).standard_normal(s).astype(np.float32) for s in ((9, 6), 9, (4, 9))))
    x[::100, 0] = 15
    r = rs.Rotations.haar(jax.random.key(0), 6, 4)
    units = units_of(layer, x, scale_inputs=winsorised, scale_outputs=winsorised)
    np.testing.assert_array_equal(units["covariance"], winsorised(x))
    np.testing.assert_allclose(units["covariance_out"], winsorised(np.asarray(layer(x))), rtol=1e-5, atol=1e-5)
    both: dict[str, Any] = {"scale_inputs": winsorised, "scale_outputs": winsorised}
    plain: dict[str, Any] = {"scale_inputs": True, "scale_outputs": True}
    found, given, other = (rs.evaluate(layer, x, r, key=jax.random.key(0), **of) for of in (both, plain | units, plain))
    assert found["hoyer"] == given["hoyer"] != other["hoyer"]
    objective = rs.JacobianSparsity(layer, x, rs.Log(0.1), **both)
    assert objective.covariance is not None and objective.covariance_out is not None
    np.testing.assert_allclose(objective.covariance, winsorised(x), rtol=1e-6)
    np.testing.assert_array_equal(objective.on(x).covariance, objective.covariance)
    np.testing.assert_array_equal(objective.on(x).covariance_out, objective.covariance_out)
