"""What only a GPU (or TPU) can show: `make gpu`. Skipped where JAX has none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rotsparse as rs
from rotsparse._core.orthogonal import exact_error, polar, skew, skew_norm, turn
from rotsparse._core.precision import PRECISIONS, lacking

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() == "cpu", reason="JAX has no accelerator here"),
]

KEY = jax.random.key(0)


def block(d, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: (rng.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32)  # noqa: E731
    return rs.MLP(normal(2 * d, d), None, normal(d, 2 * d), None, activation="gelu"), 2 * normal(64, d)


def exact_value(layer, x, r_in, r_out):
    """The objective by NumPy in float64."""
    w_in, w_out, x, r_in, r_out = (np.asarray(a, np.float64) for a in (layer.w_in, layer.w_out, x, r_in, r_out))
    h = x @ w_in.T
    erf = np.asarray(jax.scipy.special.erf(h / np.sqrt(2)), np.float64)
    gates = 0.5 * (1 + erf) + h * np.exp(-(h**2) / 2) / np.sqrt(2 * np.pi)
    z = np.einsum("oh,nh,hi->noi", r_out @ w_out, gates, w_in @ r_in.T)
    z = z * np.sqrt(np.diagonal(r_in @ np.cov(x.T, bias=True) @ r_in.T))
    return np.mean(np.log1p(np.square(z / np.sqrt(np.mean(z**2))) / 0.01))


def test_the_objective_is_that_of_float64():
    layer, x = block(96)
    r_in, r_out = (np.linalg.qr(np.random.default_rng(i).standard_normal((96, 96)))[0] for i in range(2))
    bases = {"in": jnp.asarray(r_in, jnp.float32), "out": jnp.asarray(r_out, jnp.float32)}
    exact = exact_value(layer, x, r_in, r_out)
    for precision in PRECISIONS:
        if not lacking(precision):
            value = float(rs.JacobianSparsity(layer, x, rs.Log(0.1), precision=precision).value(bases))
            assert value == pytest.approx(exact, rel=1e-5 if precision == "highest" else 2e-2), precision


def test_reduced_precision_is_another_computation():
    layer, x = block(96)
    bases = {"in": jnp.eye(96), "out": jnp.eye(96)}
    gradients = {
        p: np.asarray(rs.JacobianSparsity(layer, x, rs.Log(0.1), precision=p).value_and_grad(bases)[1]["in"])
        for p in PRECISIONS
        if not lacking(p)
    }
    exact = gradients.pop("highest")
    errors = {p: np.abs(g - exact).max() / np.abs(exact).max() for p, g in gradients.items()}
    assert 1e-6 < errors.get("tensorfloat32", 1e-3) < errors["bfloat16"] < 1


@pytest.mark.parametrize("angle", [0.5, 0.3, 0.05, 0.01])
def test_steps_stay_orthogonal(angle):
    d = 1024
    a = jax.random.normal(KEY, (d, d))
    direction, r = a - a.T, jnp.eye(d)
    for _ in range(20):
        r = turn(r, direction, jnp.asarray(angle))
    assert exact_error(r) < 1e-4
    assert exact_error(turn(r, direction, jnp.asarray(1e-4))) < 1e-5


def test_polar_factors_and_norms_are_those_of_numpy():
    a = np.random.default_rng(0).standard_normal((300, 300)).astype(np.float32)
    u, _, vt = np.linalg.svd(a.astype(np.float64))
    assert np.abs(np.asarray(polar(jnp.asarray(a))) - u @ vt).max() < 5e-3  # σ is small somewhere
    turning = skew(jnp.asarray(a))
    largest = np.linalg.norm(np.asarray(turning, np.float64), 2)
    assert 0.8 * largest < float(skew_norm(turning)) < 1.001 * largest


@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_a_fit_finds_what_was_planted(precision):
    d, rng = 32, np.random.default_rng(1)
    q_in, q_out = (np.linalg.qr(rng.standard_normal((d, d)))[0] for _ in range(2))
    sparse = lambda *shape: rng.standard_normal(shape) * (rng.random(shape) < 0.1)  # noqa: E731
    w_in, w_out = (sparse(2 * d, d) @ q_in).astype(np.float32), (q_out.T @ sparse(d, 2 * d)).astype(np.float32)
    layer, x = rs.MLP(w_in, None, w_out, None, activation="gelu"), rng.standard_normal((512, d)).astype(np.float32)
    solution = rs.find_rotations(layer, x, key=KEY, precision=precision, method=rs.default_method(steps=2000))
    planted = float(
        rs.JacobianSparsity(layer, x, rs.Log(0.1)).value(
            {"in": jnp.asarray(q_in, jnp.float32), "out": jnp.asarray(q_out, jnp.float32)}
        )
    )
    assert solution.value < 1.1 * planted
    assert exact_error(solution.rotations.r_in) < 1e-5
    assert rs.fold(layer, solution.rotations, x).error < 1e-4


def test_a_basis_is_found_and_repeats_to_the_bit():
    x = np.random.default_rng(0).laplace(size=(4000, 300)).astype(np.float32)
    x = x @ np.linalg.qr(np.random.default_rng(1).standard_normal((300, 300)))[0].astype(np.float32)
    fits = [rs.find_basis(x, key=KEY, method=rs.default_basis_method(rs.TopK(0.5), steps=60)) for _ in range(2)]
    assert fits[0].value < fits[0].start_value
    np.testing.assert_array_equal(fits[0].bases["x"], fits[1].bases["x"])
