"""Substitution: lossless where everything is kept, and the costs are what their formulas say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rotsparse as rs
from rotsparse._core.orthogonal import haar
from rotsparse.evaluation.substitution import KeepAbove, KeepLargest, substitute, substitution


@pytest.fixture
def x(rng):
    return rng.standard_normal((200, 8)).astype(np.float32)


R = haar(jax.random.key(0), 8)


def test_keeping_everything_loses_nothing(x):
    for keep in (KeepLargest(8), KeepAbove(0.0)):
        np.testing.assert_allclose(substitute(x, R, keep), x, atol=1e-5)
        result = substitution(x, R, keep, loss=lambda y: float(jnp.sum(y)))
        assert result.sparsity == 0
        assert result.energy_lost < 1e-10
        assert result.loss_change == pytest.approx(0, abs=1e-3)


@given(seed=st.integers(0, 2**31), count=st.integers(0, 8))
def test_the_energy_lost_is_that_of_the_smallest_coordinates(seed, count):
    x = np.random.default_rng(seed).standard_normal((20, 8)).astype(np.float32)
    square = np.sort(np.square(x.astype(np.float64) @ np.asarray(R, np.float64).T), axis=1)
    result = substitution(x, R, KeepLargest(count))
    assert result.energy_lost == pytest.approx(square[:, : 8 - count].sum() / square.sum(), abs=1e-6)
    assert result.sparsity == pytest.approx(1 - count / 8)


def test_ties_keep_no_more_than_asked():
    z = jnp.ones((3, 5))
    assert int(jnp.count_nonzero(KeepLargest(2)(z))) == 6


def test_a_sparse_basis_loses_less_than_another(rng):
    """Activations with one active coordinate in the basis R: keeping one loses nothing there, much elsewhere."""
    x = (np.eye(8)[rng.integers(8, size=100)] * rng.standard_normal((100, 1)) @ np.asarray(R)).astype(np.float32)
    assert substitution(x, R, KeepLargest(1)).energy_lost < 1e-10
    assert substitution(x, np.eye(8, dtype=np.float32), KeepLargest(1)).energy_lost > 0.2


def test_threshold_reaches_its_sparsity(x, rng):
    keep = KeepAbove.at_sparsity(x, R, 0.6)
    assert substitution(x, R, keep).sparsity == pytest.approx(0.6, abs=1e-3)
    others = rng.standard_normal((5000, 8)).astype(np.float32)
    assert substitution(others, R, keep).sparsity == pytest.approx(0.6, abs=0.05)


def test_output_error_and_loss(x, rng):
    layer = rs.Dense(rng.standard_normal((4, 8)).astype(np.float32), activation="tanh")
    keep = KeepLargest(3)
    replaced = substitute(x, R, keep)
    result = substitution(x, R, keep, layer=layer, loss=lambda y: float(jnp.mean(jnp.square(layer(y)))))
    y, y_hat = np.asarray(layer(x), np.float64), np.asarray(layer(replaced), np.float64)
    assert result.output_error == pytest.approx(np.square(y - y_hat).sum() / np.square(y).sum(), rel=1e-4)
    assert result.loss_change == pytest.approx(np.square(y_hat).mean() - np.square(y).mean(), rel=1e-3)


def test_bad_input(x, untyped):
    with pytest.raises(ValueError, match="r should have shape"):
        substitution(x, np.eye(7, dtype=np.float32), KeepLargest(1))
    with pytest.raises(ValueError, match="r is not orthogonal"):
        substitution(x, 2 * R, KeepLargest(1))
    with pytest.raises(ValueError, match="9 cannot be kept"):
        substitution(x, R, KeepLargest(9))
    with pytest.raises(ValueError, match="share of zeros"):
        KeepAbove.at_sparsity(x, R, 1.0)
    with pytest.raises(ValueError, match="reads 3 inputs"):
        substitution(x, R, KeepLargest(1), layer=rs.Dense(np.eye(3, dtype=np.float32)))
