"""Solvers of activation sparsity: planted bases are recovered, nothing breaks orthogonality, nothing gets worse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import random_orthogonal
from planted_bases import sparse_activations
from rotsparse._core.orthogonal import haar, orthogonality_error
from rotsparse.fit.minimize import minimize
from rotsparse.objectives import ActivationSparsity, WeightedSum, measures
from rotsparse.objectives.measures import L4, GemanMcClure, Hoyer, Log, SmoothedL1, SmoothedPower, Welsch
from rotsparse.solvers._rotated_moments import RotatedMoments, rotated_moments
from rotsparse.solvers.fixed_point import FixedPoint, cube, soft_threshold, top_k
from rotsparse.solvers.fixed_point_newton import FixedPointNewton
from rotsparse.solvers.quasi_newton import QuasiNewton, escape, gradient, pair_sums

D = 12


def planted(seed=0, n=3000, d=D, density=0.3, dtype=jnp.float32):
    """Bernoulli-Gaussian activations `x = A s`, and the orthogonal A."""
    rng = np.random.default_rng(seed)
    basis = random_orthogonal(rng, d)
    return jnp.asarray(sparse_activations(rng, n, basis.T, density).astype(dtype)), basis


def recovery_error(r, basis):
    """`1 - ‖R A‖₄⁴/d`: zero if and only if R recovers the basis up to sign and order."""
    u, _, v = np.linalg.svd(np.asarray(r, np.float64))
    return 1 - np.sum((u @ v @ basis) ** 4) / len(basis)


def fit(x, *, key, measure=Log(0.1), start=None, validation=None, restarts=1):  # noqa: B008 (immutable)
    """From random rotations, the first of which `start` replaces."""
    objective = ActivationSparsity(x, measure)
    first = haar(jax.random.fold_in(key, 9), x.shape[1], objective.x.dtype) if start is None else start
    held_out = None if validation is None else objective.on(validation)
    method = FixedPointNewton(random_starts=restarts - 1)
    solution = minimize(objective, {"in": first}, method=method, key=key, validation=held_out)
    return solution.bases["in"], solution


def run(solver, objective, r, steps):
    solver = dataclasses.replace(solver, steps=steps)

    @jax.jit
    def go(r):
        def body(i, carry):
            bases, state, values = carry
            bases, state, value = solver.step(objective, bases, state, i)
            return bases, state, values.at[i].set(value)

        bases = {"in": r}
        return jax.lax.fori_loop(0, steps, body, (bases, solver.init(bases), jnp.zeros(steps, r.dtype)))

    bases, state, values = go(r)
    return bases["in"], state, np.asarray(values)


RESPONSES = {"measure": None, "cube": cube, "soft_threshold": soft_threshold(0.5), "top_k": top_k(4)}


@pytest.mark.parametrize("name", RESPONSES)
def test_fixed_point_recovers_a_planted_basis(name):
    x, basis = planted()
    r, _, values = run(FixedPoint(RESPONSES[name]), ActivationSparsity(x, Log(1.0)), haar(jax.random.key(1), D), 60)
    assert recovery_error(r, basis) < 0.02
    assert values[-1] < values[0]
    assert orthogonality_error(r) < 1e-5


def test_cube_maximises_the_fourth_power_monotonically():
    # -E z⁴ is concave in R, so that matching its linearisation can only lower it.
    x, _ = planted()
    _, _, values = run(FixedPoint(cube), ActivationSparsity(x, L4()), haar(jax.random.key(1), D), 20)
    assert np.all(np.diff(values) < 1e-5 * np.abs(values[1:]))


@pytest.mark.parametrize(
    "measure", [Log(1.0), GemanMcClure(1.0), Welsch(1.0), SmoothedL1(0.5), SmoothedPower(0.5), L4()]
)
def test_quasi_newton_converges_to_the_planted_basis_from_nearby(measure):
    x, basis = planted()
    rng = np.random.default_rng(2)
    u, _, v = np.linalg.svd(basis.T + 0.05 * rng.standard_normal((D, D)))
    nearby = jnp.asarray(u @ v, jnp.float32)
    objective = ActivationSparsity(x, measure)
    _, (search, _), values = run(QuasiNewton(), objective, nearby, 15)
    _, grads = objective.value_and_grad({"in": nearby})
    _, after = objective.value_and_grad({"in": search.anchor})
    assert jnp.linalg.norm(after["in"]) < 1e-2 * jnp.linalg.norm(grads["in"])
    assert search.value == pytest.approx(values.min(), rel=1e-5)
    assert recovery_error(search.anchor, basis) < recovery_error(nearby, basis)


@pytest.mark.parametrize("name", sorted(measures.MEASURES))
def test_quasi_newton_never_accepts_a_higher_objective(name):
    """On activations without a sparse basis, from a random start, where the pair curvatures are wrong."""
    x = np.random.default_rng(3).standard_t(3, (300, D)) * np.geomspace(0.01, 10, D)
    x = x.astype(np.float32)
    objective = ActivationSparsity(x, measures.by_name(name))
    r0 = haar(jax.random.key(4), D)
    r, (search, _), values = run(QuasiNewton(), objective, r0, 40)
    assert np.isfinite(values).all()
    assert search.value <= values[0] and search.value == pytest.approx(values.min(), rel=1e-4)
    assert search.value == pytest.approx(float(objective.value({"in": search.anchor})), rel=1e-5, abs=1e-6)
    assert orthogonality_error(r) < 1e-5 and orthogonality_error(search.anchor) < 1e-5


@pytest.mark.parametrize("name", sorted(set(measures.MEASURES) - {"tanh"}))
def test_curvature_is_the_second_derivative(name):
    with jax.enable_x64(True):
        measure = measures.by_name(name, 0.3)
        z = jnp.asarray(np.random.default_rng(0).standard_normal(50))
        exact = jax.vmap(jax.grad(jax.grad(measure)))(z)
        np.testing.assert_allclose(measure.curvature(z), exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted(measures.MEASURES))
def test_second_derivative_along_the_rotation_of_a_pair(name):
    """`E[S''_i z_j² + S''_j z_i² - S'_i z_i - S'_j z_j]`, for every measure, by autodiff through the rotation."""
    with jax.enable_x64(True):
        measure = measures.by_name(name, 0.3)
        z = jnp.asarray(np.random.default_rng(1).standard_normal((40, 2)))

        def value(angle):
            c, s = jnp.cos(angle), jnp.sin(angle)
            return 2 * jnp.mean(measure.example_value(z @ jnp.array([[c, s], [-s, c]])))

        slope, curvature = measure.example_slope(z), measure.example_curvature(z)
        closed = jnp.mean(jnp.sum(curvature * z[:, ::-1] ** 2 - slope * z, axis=1))
        np.testing.assert_allclose(closed, jax.grad(jax.grad(value))(0.0), rtol=1e-8)


def test_moments_agree_with_the_objective():
    x, _ = planted(n=1001)
    r = haar(jax.random.key(0), D)
    for measure in (Log(0.1), Hoyer(0.1)):
        objective = ActivationSparsity(x, measure)
        m = rotated_moments(objective, r)
        value, grads = objective.value_and_grad({"in": r})
        np.testing.assert_allclose(m.value, value, rtol=1e-5)
        np.testing.assert_allclose(gradient(m) / D, grads["in"], atol=1e-6)


def test_escape_undoes_a_mixed_pair_that_the_gradient_does_not_see():
    x, basis = planted(n=20000)
    mixed = basis.T.copy()
    mixed[:2] = np.array([[1, 1], [1, -1]]) / np.sqrt(2) @ mixed[:2]
    mixed = jnp.asarray(mixed, jnp.float32)
    objective = ActivationSparsity(x, Log(1.0))
    m = rotated_moments(objective, mixed)
    pairs = pair_sums(objective.x, jnp.ones(len(x)), mixed / objective.rms, objective.measure) / len(x)
    omega = escape(m, pairs)
    assert np.count_nonzero(omega) == 2 and abs(omega[0, 1]) == 1
    assert recovery_error(mixed + omega @ mixed, basis) < 1e-3 and recovery_error(mixed, basis) > 0.05


def test_escape_takes_the_most_curved_pair_whatever_is_rounded(rng):
    for _ in range(30):
        pull, pairs = (jnp.asarray(rng.standard_normal((D, D)), jnp.float32) for _ in range(2))
        h = np.asarray(pairs + pairs.T, np.float64) - np.add.outer(*[np.diagonal(np.asarray(pull, np.float64))] * 2)
        i, j = np.unravel_index(np.argmin(np.where(np.eye(D), np.inf, h)), h.shape)
        zero = jnp.zeros(D)
        assert abs(escape(RotatedMoments(zero[0], pull, zero, zero), pairs)[i, j]) == 1


@pytest.mark.parametrize("seed", range(3))
def test_fit_recovers_exactly_with_a_small_eps(seed):
    x, basis = planted(seed, n=4000, d=30)
    r, found = fit(x, key=jax.random.key(seed), measure=Log(0.01))
    assert recovery_error(r, basis) < 1e-7
    assert found.stats["converged"] and found.result.ok and found.stats["orthogonality_error"] < 1e-5
    objective = ActivationSparsity(x, Log(0.01))
    assert found.value == pytest.approx(float(objective.value({"in": r})), rel=1e-5)
    slope = objective.value_and_grad({"in": r})[1]["in"]
    assert found.stats["gradient_norm"] == pytest.approx(float(jnp.linalg.norm(slope)), rel=0.05)


def test_restarts_recover_from_few_examples():
    x, basis = planted(1, n=160, d=20)
    values = [fit(x, key=jax.random.key(2), measure=Log(0.02), restarts=k)[1].value for k in (1, 8)]
    r, _ = fit(x, key=jax.random.key(2), measure=Log(0.02), restarts=8)
    assert values[1] <= values[0] and recovery_error(r, basis) < 1e-3


def test_fit_is_deterministic_and_its_key_counts():
    x, _ = planted()
    first, second, other = (fit(x, key=jax.random.key(k), measure=Log(0.1))[0] for k in (0, 0, 1))
    assert (first == second).all() and not (first == other).all()


def test_fit_never_returns_worse_than_its_start():
    x, basis = planted()
    objective = ActivationSparsity(x, Log(0.05))
    optimum, _ = fit(x, key=jax.random.key(0), measure=Log(0.05))
    again, found = fit(x, key=jax.random.key(1), measure=Log(0.05), start=optimum)
    assert found.value <= float(objective.value({"in": optimum})) + 1e-5
    assert recovery_error(again, basis) < 1e-5
    # Gaussian activations have no sparse basis: whatever comes out is no worse than the start.
    noise = jnp.asarray(np.random.default_rng(0).standard_normal((200, D)), jnp.float32)
    start = fit(noise, key=jax.random.key(0), measure=Log(0.01), restarts=10)[0]
    r, found = fit(noise, key=jax.random.key(5), measure=Log(0.01), start=start)
    assert found.value <= float(ActivationSparsity(noise, Log(0.01)).value({"in": start})) * (1 + 1e-6)
    assert found.result.ok or (r == start).all()


def test_validation_chooses_a_larger_eps_for_noisier_activations():
    clean, basis = planted(n=6000)
    noisy = clean + 0.4 * np.random.default_rng(9).standard_normal(clean.shape).astype(np.float32)
    chosen = {}
    for name, x in {"clean": clean, "noisy": noisy}.items():
        r, found = fit(x[:4000], key=jax.random.key(0), measure=Log(0.1), validation=x[4000:])
        sharp, _ = fit(x[:4000], key=jax.random.key(0), measure=Log(0.02))
        chosen[name] = found.stats["eps"]
        assert recovery_error(r, basis) <= recovery_error(sharp, basis) + 1e-6
    assert chosen["noisy"] > 5 * chosen["clean"]


@pytest.mark.parametrize(
    "measure", [Log(1e-4), Log(50.0), L4(), Hoyer(), SmoothedPower(0.01, 0.1), measures.Tanh(0.05)]
)
def test_absurd_activations_and_scales_keep_rotations_orthogonal(measure):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, D)).astype(np.float32)
    x[:, 3:6] = 0  # directions that never vary
    x[:, 6] = x[:, 7]  # rank deficient
    x[0] *= 1e6  # an outlier
    r, found = fit(jnp.asarray(x), key=jax.random.key(0), measure=measure)
    assert jnp.isfinite(r).all() and orthogonality_error(r) < 1e-5
    assert np.isfinite(found.value)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        x, basis = planted(dtype=jnp.float64)
        r, found = fit(x, key=jax.random.key(0), measure=Log(0.003))
        assert r.dtype == np.float64 and found.stats["orthogonality_error"] < 1e-12
        assert recovery_error(r, basis) < 1e-8


def test_float32_stays_float32_where_double_precision_is_on():
    x, _ = planted()
    expected, _ = fit(x, key=jax.random.key(0), measure=Log(0.1))
    with jax.enable_x64(True):
        r, _ = fit(x, key=jax.random.key(0), measure=Log(0.1))
    assert r.dtype == jnp.float32
    np.testing.assert_allclose(r, expected, atol=1e-4)


def test_messages():
    x, _ = planted(n=50)
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="random_starts should not be negative"):
        fit(x, key=key, restarts=0)
    with pytest.raises(ValueError, match="cannot be negative"):
        soft_threshold(-1.0)
    with pytest.raises(ValueError, match="at least one entry"):
        top_k(0)
    total = WeightedSum([ActivationSparsity(x, Log())])
    for solver in (FixedPoint(), QuasiNewton()):
        with pytest.raises(ValueError, match="use Riemannian"):
            bases = {"in": jnp.eye(D)}
            solver.step(total, bases, solver.init(bases), jnp.zeros((), int))
