"""The orthogonal group: retractions have the order they claim, and nothing a caller does breaks orthogonality."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from helpers import random_orthogonal
from rotsparse._core import orthogonal
from rotsparse._core.orthogonal import (
    WIDE,
    bound_step,
    exact_error,
    haar,
    orthogonality_error,
    polar,
    skew,
    skew_norm,
    spectral_norm_bound,
    turn,
)

pytestmark = pytest.mark.usefixtures("strict")

# Order of agreement with the geodesic expm(Ω) R: the error is O(‖Ω‖^(order + 1)).
RETRACTIONS = {
    orthogonal.retract_polar: 2,
    orthogonal.retract_cayley: 2,
    orthogonal.retract_qr: 1,
    orthogonal.retract_expm: np.inf,
}
FIRST_AND_SECOND = [(r, order) for r, order in RETRACTIONS.items() if order < np.inf]
PARAMETRIZATIONS = [orthogonal.cayley, orthogonal.expm, orthogonal.qr]


def error64(r):
    """Largest entry of |R Rᵀ - I|, in float64 whatever `r` is."""
    r = np.asarray(r, np.float64)
    return np.abs(r @ r.T - np.eye(len(r))).max()


def tangent(rng, d, size):
    """A random skew-symmetric matrix of that spectral norm."""
    a = rng.standard_normal((d, d))
    a = (a - a.T) / 2
    return a * (size / np.linalg.norm(a, 2))


# --- retractions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("retract", "order"), FIRST_AND_SECOND)
def test_retraction_error_falls_with_the_power_it_claims(retract, order, x64, rng):
    r = scipy.linalg.qr(rng.standard_normal((7, 7)))[0]
    omega = tangent(rng, 7, 1.0)
    sizes = np.logspace(-2.5, -1, 6)
    errors = [
        np.abs(retract(jnp.asarray(r), jnp.asarray(t * omega)) - scipy.linalg.expm(t * omega) @ r).max() for t in sizes
    ]
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert slope == pytest.approx(order + 1, abs=0.05)


def test_expm_retraction_is_the_geodesic(x64, rng):
    r = scipy.linalg.qr(rng.standard_normal((7, 7)))[0]
    for size in (1e-3, 1.0, 30.0):
        omega = tangent(rng, 7, size)
        moved = orthogonal.retract_expm(jnp.asarray(r), jnp.asarray(omega))
        np.testing.assert_allclose(moved, scipy.linalg.expm(omega) @ r, atol=1e-12)


@pytest.mark.parametrize("retract", RETRACTIONS)
def test_no_step_is_no_step(retract):
    r = haar(jax.random.key(0), 7)
    np.testing.assert_allclose(retract(r, jnp.zeros_like(r)), r, atol=1e-6)


@pytest.mark.parametrize("retract", RETRACTIONS)
@given(exponent=st.integers(-30, 30), seed=st.integers(0, 2**32 - 1))
def test_absurd_steps_stay_orthogonal_once_bounded(retract, exponent, seed):
    """Sizes from 1e-30 to 1e30, in float32: no learning rate can break orthogonality."""
    rng = np.random.default_rng(seed)
    omega = jnp.asarray(tangent(rng, 7, 1.0) * 10.0**exponent, jnp.float32)
    moved = jax.jit(retract)(haar(jax.random.key(seed), 7), bound_step(omega, 0.5))
    assert error64(moved) < 3e-6


@pytest.mark.parametrize("retract", RETRACTIONS)
def test_ten_thousand_random_steps_in_float32(retract):
    """Rounding does not accumulate: steps of every size up to the bound, at the issue's limit of 1e-5."""
    steps, d = (10_000, 12) if retract is orthogonal.retract_polar else (1_000, 6)

    def step(r, key):
        k1, k2 = jax.random.split(key)
        omega = skew(jax.random.normal(k1, (d, d))) * 10 ** jax.random.uniform(k2, minval=-4.0, maxval=2.0)
        r = retract(r, bound_step(omega, 0.5))
        return r, orthogonality_error(r)

    r, errors = jax.jit(lambda k: jax.lax.scan(step, haar(k, d), jax.random.split(k, steps)))(jax.random.key(1))
    assert errors.max() <= 1e-5
    assert error64(r) <= 1e-5
    # It did move: a retraction that ignores its step would pass the above.
    assert jnp.abs(r - haar(jax.random.key(1), d)).max() > 0.1


def test_polar_retraction_repairs_drift(rng):
    r = jnp.asarray(random_orthogonal(rng, 20) * 1.01, jnp.float32)
    assert error64(r) > 0.01
    assert error64(orthogonal.retract_polar(r, jnp.zeros_like(r))) < 2e-6


# --- the bound of the spectral norm, and bounded steps ----------------------------------------------------------


@given(
    arrays(
        np.float32,
        st.integers(1, 9).map(lambda d: (d, d)),
        elements=st.floats(-1, 1, width=32, allow_subnormal=False),
    ),
    st.sampled_from([1e-30, 1e-12, 1.0, 1e12, 1e30]),
)
def test_spectral_norm_bound_is_a_bound_and_a_close_one(a, size):
    a = a * np.float32(size)
    d = len(a)
    true = np.linalg.norm(a.astype(np.float64), 2)
    bound = float(spectral_norm_bound(jnp.asarray(a)))
    # Rounding: entries near float32's smallest numbers flush to zero, which no product can see.
    assert bound >= true * (1 - 1e-6) - 1e-36
    assert bound <= max(true * d ** (1 / 16) * (1 + 1e-5), 1e-36)


@pytest.mark.parametrize("d", [2, 100])
def test_spectral_norm_bound_on_equal_and_on_lone_singular_values(d, rng):
    q = random_orthogonal(rng, d).astype(np.float32)
    assert spectral_norm_bound(jnp.asarray(q)) == pytest.approx(d ** (1 / 16), rel=1e-4)  # the worst case
    assert spectral_norm_bound(jnp.asarray(np.outer(q[0], q[1]))) == pytest.approx(1.0, rel=1e-4)  # exact


@given(st.floats(-6, 6), st.floats(0.01, 2.0), st.integers(0, 1000))
def test_bound_step_limits_long_steps_and_leaves_short_ones(exponent, limit, seed):
    omega = tangent(np.random.default_rng(seed), 6, 10.0**exponent).astype(np.float32)
    bounded = np.asarray(bound_step(jnp.asarray(omega), limit))
    assert np.linalg.norm(bounded, 2) <= limit * (1 + 1e-5)
    np.testing.assert_allclose(bounded, -bounded.T)
    if 10.0**exponent * 6 ** (1 / 16) < limit * (1 - 1e-5):
        np.testing.assert_array_equal(bounded, omega)
    # Only the length changes, never the direction.
    scale = np.linalg.norm(bounded) / np.linalg.norm(omega)
    np.testing.assert_allclose(bounded, omega * scale, rtol=1e-5, atol=1e-12)


def test_bound_step_of_zero_is_zero():
    assert not np.any(bound_step(jnp.zeros((5, 5)), 0.5))


# --- the polar factor --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e5, 1e8])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_polar_is_the_svd_one_from_badly_conditioned_starts(condition, scale, x64, rng):
    d = 25
    u, _, v = np.linalg.svd(rng.standard_normal((d, d)))
    a = u * np.geomspace(1, 1 / condition, d) @ v * scale
    result = jax.jit(polar)(jnp.asarray(a))
    # The polar factor itself moves by about eps · condition when A is rounded.
    np.testing.assert_allclose(result, u @ v, atol=1e-14 * (10 + condition))
    assert error64(result) < 1e-12


def test_polar_in_float32_is_orthogonal_to_rounding(rng):
    a = rng.standard_normal((100, 100)).astype(np.float32)
    u, _, v = np.linalg.svd(a.astype(np.float64))
    result = polar(jnp.asarray(a))
    assert result.dtype == jnp.float32
    assert error64(result) < 5e-6
    np.testing.assert_allclose(result, u @ v, atol=1e-3)


def test_newton_schulz_squares_the_error(x64, rng):
    """One step turns an error e in the singular values into about 1.5 e²."""
    q = jnp.asarray(random_orthogonal(rng, 10))
    for e in (1e-2, 1e-3, 1e-4):
        singular_values = jnp.linalg.svd(orthogonal.newton_schulz((1 + e) * q, 1), compute_uv=False)
        np.testing.assert_allclose(1 - singular_values, 1.5 * e**2, rtol=0.02)


# --- parametrizations, Haar, skew ----------------------------------------------------------------------------------


@pytest.mark.parametrize("parametrize", PARAMETRIZATIONS)
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([1e-3, 1.0, 10.0]))
def test_parametrizations_are_orthogonal(parametrize, seed, size):
    a = jnp.asarray(np.random.default_rng(seed).standard_normal((6, 6)) * size, jnp.float32)
    assert error64(parametrize(a)) < 1e-5


def test_cayley_and_expm_agree_near_zero_and_are_proper(x64, rng):
    a = rng.standard_normal((6, 6))
    np.testing.assert_allclose(
        orthogonal.cayley(jnp.asarray(1e-4 * a)), orthogonal.expm(jnp.asarray(1e-4 * a)), atol=1e-11
    )
    for parametrize in (orthogonal.cayley, orthogonal.expm):
        assert np.linalg.det(parametrize(jnp.asarray(a))) == pytest.approx(1.0)


def test_qr_has_a_positive_triangle(x64, rng):
    a = rng.standard_normal((8, 8))
    upper = np.asarray(orthogonal.qr(jnp.asarray(a))).T @ a
    assert (np.diag(upper) > 0).all()
    np.testing.assert_allclose(np.tril(upper, -1), 0, atol=1e-12)


def test_haar_is_orthogonal_deterministic_and_keyed():
    for d in (1, 17):
        r = haar(jax.random.key(3), d)
        assert r.shape == (d, d) and r.dtype == jnp.float32
        assert error64(r) < 1e-5
        np.testing.assert_array_equal(r, haar(jax.random.key(3), d))
        if d > 1:
            assert jnp.abs(r - haar(jax.random.key(4), d)).max() > 1e-3


def test_haar_is_uniform():
    """Moments of the entries, and both signs of the determinant: an uncorrected QR factor has neither the mean
    nor the determinants right."""
    d, n = 4, 4000
    r = np.asarray(jax.vmap(lambda k: haar(k, d))(jax.random.split(jax.random.key(0), n)), np.float64)
    np.testing.assert_allclose(r.mean(0), 0, atol=5 * (1 / d / n) ** 0.5)
    np.testing.assert_allclose((r**2).mean(0), 1 / d, atol=0.03)
    assert 0.45 < (np.linalg.det(r) > 0).mean() < 0.55


@given(arrays(np.float32, (4, 4), elements=st.floats(-1e3, 1e3, width=32)))
def test_skew_is_the_skew_part(a):
    s = np.asarray(skew(jnp.asarray(a)))
    np.testing.assert_array_equal(s, -s.T)
    np.testing.assert_allclose(s + (a + a.T) / 2, a, atol=1e-3)


def test_orthogonality_error_is_the_largest_entry_for_square_batched_and_frames(rng):
    q = np.linalg.qr(rng.standard_normal((3, 6, 6)))[0].astype(np.float32)
    assert (orthogonality_error(jnp.asarray(q)) < 1e-6).all()
    assert orthogonality_error(jnp.asarray(q)).shape == (3,)
    assert orthogonality_error(jnp.asarray(q[0, :2])) < 1e-6
    assert orthogonality_error(jnp.asarray(1.1 * q[0])) == pytest.approx(0.21, rel=1e-4)


@pytest.mark.parametrize("retract", RETRACTIONS)
def test_retractions_under_vmap_and_jit_are_the_plain_ones(retract, rng):
    rs = jax.vmap(lambda k: haar(k, 7))(jax.random.split(jax.random.key(0), 3))
    omegas = jnp.asarray([tangent(rng, 7, 0.3) for _ in range(3)], jnp.float32)
    together = jax.jit(jax.vmap(retract))(rs, omegas)
    for r, omega, moved in zip(rs, omegas, together, strict=True):
        np.testing.assert_allclose(moved, retract(r, omega), atol=1e-6)


@pytest.mark.parametrize("angle", [0.5, 0.31, 0.3, 0.06, 0.05, 1e-4])
def test_turns_of_wide_spaces_stay_orthogonal_and_turn_by_the_angle(rng, angle):
    d = WIDE
    a = jnp.asarray(rng.standard_normal((d, d)), jnp.float32)
    r = jnp.asarray(random_orthogonal(rng, d), jnp.float32)
    before = r
    for _ in range(5):
        r = turn(r, skew(a), jnp.asarray(angle))
    assert exact_error(r) < 3e-5
    # Steps along one direction add up, and the fastest plane turns by the arc tangent of each.
    turned = np.linalg.norm(np.asarray(turn(before, skew(a), jnp.asarray(angle)) - before, np.float64), 2)
    assert turned == pytest.approx(2 * np.sin(np.arctan(angle) / 2), rel=0.25)


def test_the_norm_of_a_skew_matrix_is_never_too_large(rng):
    for d in (5, 64, 300):
        a = skew(jnp.asarray(rng.standard_normal((d, d)), jnp.float32))
        exact = np.linalg.norm(np.asarray(a, np.float64), 2)
        assert 0.75 * exact < float(skew_norm(a)) < 1.0001 * exact
    assert float(skew_norm(jnp.zeros((8, 8)))) < 1e-30
