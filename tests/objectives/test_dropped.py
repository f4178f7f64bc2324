"""`DroppedError`: its value, its gradient, and what its metric means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rotsparse as rs
from rotsparse._core.orthogonal import haar
from rotsparse.objectives.dropped import DroppedError


@pytest.fixture
def x(rng):
    return rng.standard_normal((300, 8)).astype(np.float32) * np.linspace(0.3, 2, 8, dtype=np.float32)


def a_metric(rng, d=8):
    w = rng.standard_normal((5, d)).astype(np.float32)
    return w, w.T @ w


@pytest.mark.parametrize("weighted", [False, True])
def test_the_value_is_the_error_of_what_reads_the_space(rng, x, weighted):
    w, metric = a_metric(rng)
    r = haar(jax.random.key(1), 8)
    z = x @ r.T
    importance = np.abs(z) * (np.linalg.norm(w @ r.T, axis=0) if weighted else 1)
    dropped = importance <= np.sort(importance, axis=1)[:, [4]]  # five of eight are dropped
    error = np.where(dropped, z, 0) @ r @ w.T
    expected = np.square(error).sum() / np.square(x @ w.T).sum()
    objective = DroppedError(x, metric, keep=3 / 8, weighted=weighted)
    assert float(objective.value({"in": r})) == pytest.approx(expected, rel=1e-4)
    assert float(objective.value_and_grad({"in": r})[0]) == pytest.approx(expected, rel=1e-4)


def test_the_gradient_is_that_of_differences(rng, x):
    with jax.enable_x64(True):
        objective = DroppedError(x.astype(np.float64), a_metric(rng)[1].astype(np.float64), weighted=False)
        r = haar(jax.random.key(2), 8, jnp.float64)
        a = rng.standard_normal((8, 8))
        omega, step = a - a.T, 1e-6
        there, back = (float(objective.value({"in": jax.scipy.linalg.expm(s * omega) @ r})) for s in (step, -step))
        gradient = objective.value_and_grad({"in": r})[1]["in"]
        assert float(jnp.sum(gradient * omega)) == pytest.approx((there - back) / (2 * step), rel=1e-5)


def test_with_the_identity_it_is_the_energy_that_top_k_measures(x):
    r = haar(jax.random.key(3), 8)
    error = DroppedError(x, np.eye(8, dtype=np.float32), weighted=False).value({"in": r})
    energy = rs.ActivationSparsity(x, rs.TopK(0.5)).value({"in": r})
    assert float(error) == pytest.approx(float(energy), rel=1e-5)


def test_a_fit_finds_the_planted_basis(rng):
    planted = np.asarray(haar(jax.random.key(4), 8))
    codes = rng.standard_normal((4000, 8)) * (rng.random((4000, 8)) < 0.3)
    x = (codes @ planted).astype(np.float32)
    objective = DroppedError(x, np.diag(np.linspace(0.5, 2, 8)), keep=0.5)
    method = rs.Then(rs.Anneal(steps=800, batch_size=256), rs.Each(rs.Anneal(steps=400, angle=0.1, batch_size=256)))
    solution = rs.minimize(objective, method=method, key=jax.random.key(0))
    assert float(objective.value(solution.bases)) < 1.2 * float(objective.value({"in": jnp.asarray(planted)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 0.0}, "between 0 and 1"),
        ({"metric": np.eye(7, dtype=np.float32)}, r"expected a metric \[8, 8\]"),
        ({"x": np.full((3, 8), np.nan, np.float32)}, "NaN"),
    ],
)
def test_bad_arguments_are_explained(x, change, message):
    arguments = {"x": x, "metric": np.eye(8, dtype=np.float32), **change}
    with pytest.raises(ValueError, match=message):
        DroppedError(arguments.pop("x"), arguments.pop("metric"), **arguments)
