"""`find_basis`: finds planted directions, loses less energy than principal components, and never makes things worse."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rotsparse as rs
from helpers import random_orthogonal
from planted_bases import sparse_activations
from rotsparse._core.orthogonal import WIDE
from rotsparse.data.examples import Examples
from rotsparse.data.sources import ArrayRows
from rotsparse.engine.run import Run
from rotsparse.engine.solution import Result
from rotsparse.examples.digits import train
from rotsparse.fit.default_method import default_basis_method
from rotsparse.solvers.fixed_point import FixedPoint, top_k

KEY = jax.random.key(0)


def planted(n=3000):
    """Activations, and the directions that they are sums of."""
    rng = np.random.default_rng(0)
    directions = random_orthogonal(rng, 12)
    return sparse_activations(rng, n, directions, 0.2).astype(np.float32), directions


@pytest.fixture(scope="module")
def activations():
    """What enters the second layer of a network trained on digits."""
    network = train(0)
    return tuple(np.asarray(network.layers[0](jnp.asarray(x))) for x in (network.train, network.test))


def find(x, *, steps, measure: rs.Measure = rs.TopK(0.5), **options):  # noqa: B008 (immutable)
    method = default_basis_method(measure, steps=steps)
    return rs.find_basis(x, key=options.pop("key", KEY), measure=measure, method=method, **options)


def energy_lost(x, r, keep):
    square = np.sort(np.square(x @ np.asarray(r).T), axis=1)
    return square[:, : square.shape[1] - round(keep * square.shape[1])].sum() / square.sum()


@pytest.mark.parametrize("measure", [rs.Log(0.1), rs.TopK(0.3)], ids=lambda m: type(m).__name__)
def test_planted_directions_are_found(measure):
    x, dictionary = planted()
    solution = find(x, measure=measure, steps=600)
    cosines = np.abs(np.asarray(solution.bases["x"]) @ dictionary.T).max(axis=0)
    assert cosines.min() > 0.99
    if isinstance(measure, rs.Log):
        assert [stage.name for stage in solution.stages] == ["Anneal", "FixedPointNewton"]
        assert cosines.min() > 0.9999


def test_it_loses_less_energy_than_principal_components(activations):
    train_x, test_x = activations
    solution = find(train_x, validation=test_x[:200], steps=1500)
    _, components = np.linalg.eigh(train_x.T @ train_x)
    bases = solution.bases["x"], components.T, np.eye(64)
    ours, pca, none = (energy_lost(train_x, r, 0.5) for r in bases)
    assert ours < 0.85 * pca < 0.1 * none
    # 1,437 examples for 2,016 angles: on others it is at least no worse than the baseline it was chosen against.
    ours, pca, none = (energy_lost(test_x[200:], r, 0.5) for r in bases)
    assert ours < 1.05 * pca < 0.1 * none
    # The objective is that energy.
    assert energy_lost(train_x, solution.bases["x"], 0.5) == pytest.approx(solution.value, rel=1e-3)


@pytest.fixture
def half_zero(rng):
    """`x = Dᵀ s` with s half zeros: all energy lies in d/2 coordinates of the basis D."""
    d = 12
    basis = random_orthogonal(rng, d)
    kept = np.argsort(rng.random((3000, d)), axis=1) < d // 2
    return (rng.standard_normal((3000, d)) * kept @ basis).astype(np.float32), basis


def test_top_k_finds_the_basis_in_which_half_is_zero(half_zero):
    x, basis = half_zero
    solution = find(x[:2000], validation=x[2000:], steps=1000)
    assert energy_lost(x[2000:], solution.bases["x"], 0.5) < 1e-3
    assert np.abs(np.asarray(solution.bases["x"]) @ basis.T).max(axis=1).min() > 0.999


def test_power_steps_never_lose_energy_and_finish_a_near_basis(half_zero, rng):
    x, basis = half_zero
    near = np.linalg.qr(basis + 0.15 * rng.standard_normal(basis.shape))[0]
    near *= np.sign(np.sum(near * basis, axis=1, keepdims=True))
    objective = rs.ActivationSparsity(x, rs.TopK(0.5))
    start = {"in": jnp.asarray(near, jnp.float32)}
    solution = rs.minimize(objective, start, key=KEY, method=FixedPoint(top_k(6), steps=100))
    values = solution.history.objective[0]
    assert (np.diff(values) <= 1e-6).all()
    assert values[-1] < 0.02 * values[0]


def test_a_good_start_is_kept_where_nothing_better_is_found():
    x, _ = planted()
    best = find(x, measure=rs.Log(0.1), steps=600)
    again = find(x, key=jax.random.key(1), measure=rs.Log(0.1), start=best.bases["x"], steps=20)
    assert again.value <= best.value + 1e-6


@pytest.mark.parametrize("held_out", [False, True])
def test_an_optimal_start_is_returned_and_the_result_says_so(rng, held_out):
    """Half of the neurons are exactly zero in each example: nothing is lost, and nothing can be better."""
    x = rng.choice([-1.0, 1.0], (600, 8)) * (np.argsort(rng.random((600, 8)), axis=1) < 4)
    x, validation = x[:500].astype(np.float32), x[500:].astype(np.float32)
    solution = find(x, steps=40, restarts=2, validation=validation if held_out else None)
    assert solution.result is Result.NO_IMPROVEMENT
    np.testing.assert_array_equal(solution.bases["x"], np.eye(8))
    assert solution.value == solution.start_value == solution.candidate_values.min() == 0


def test_the_result_is_that_of_all_parts():
    """One step of annealing improves little or nothing; what follows it does."""
    x, _ = planted(n=500)
    solution = find(x, measure=rs.Log(0.1), steps=1)
    assert solution.result is Result.ALL_STEPS and solution.value < solution.start_value


class Overflowing(rs.TopK):
    """Infinite where any entry is large, as almost everywhere."""

    def example_value(self, z):
        return super().example_value(z) + jnp.where(jnp.max(jnp.abs(z)) > 1.5, jnp.inf, 0)


def test_an_objective_that_overflows_in_the_second_part_is_reported(rng):
    """The first part minimises another measure, and sees nothing of it."""
    x = rng.choice([-1.0, 1.0], (500, 8)).astype(np.float32)
    solution = find(x, measure=Overflowing(), steps=40, restarts=2)
    assert solution.result is Result.NON_FINITE and "the objective" in solution.detail
    np.testing.assert_array_equal(solution.bases["x"], np.eye(8))  # the last good rotation
    assert solution.value == solution.start_value and np.isfinite(solution.value)


def test_same_key_same_bits():
    x, _ = planted(n=500)
    one, other = (find(x, steps=50, restarts=2).bases["x"] for _ in range(2))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("stage", ["start-0", "start-1", "components"])
def test_an_interrupted_fit_goes_on(stage, tmp_path, monkeypatch):
    """Interrupted in the second stage, in its first or second fit, or in the power steps."""
    x, _ = planted(n=500)
    fit = lambda **more: find(x, steps=80, restarts=2, **more)  # noqa: E731
    whole, subrun = fit(), Run.subrun

    def interrupted(run, name):
        if name == stage:
            run._stop.requested = True
        return subrun(run, name)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "subrun", interrupted)
        stopped = fit(run=tmp_path)
    assert stopped.result is Result.INTERRUPTED and len(stopped.candidates) == 2
    resumed = fit(run=tmp_path)
    np.testing.assert_array_equal(resumed.bases["x"], whole.bases["x"])
    assert len(resumed.candidates) == 2 and resumed.agreement()["x"].shape == (1, 12)
    assert resumed.value < resumed.start_value


def test_bad_input(untyped):
    x, _ = planted(n=50)
    with pytest.raises(ValueError, match=r"start should have shape \[12, 12\]"):
        rs.find_basis(x, key=KEY, start=np.eye(11, dtype=np.float32))
    with pytest.raises(ValueError, match="start is not orthogonal"):
        rs.find_basis(x, key=KEY, start=0.5 * np.eye(12, dtype=np.float32))
    with pytest.raises(ValueError, match="validation should have shape"):
        rs.find_basis(x, key=KEY, validation=x[:, :5])
    with pytest.raises(ValueError, match="batch_size should be at least 1"):
        default_basis_method(rs.TopK(0.5), batch_size=0)


def test_activations_may_be_a_source_or_a_memory_map(tmp_path, rng):
    x = rng.standard_normal((50, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    forms = x, rs.open_source(tmp_path / "x.npy"), np.load(tmp_path / "x.npy", mmap_mode="r")
    newton = rs.FixedPointNewton()
    of_array, *others = (rs.find_basis(of, key=KEY, measure=rs.Log(0.1), method=newton) for of in forms)
    for other in others:
        np.testing.assert_array_equal(other.bases["x"], of_array.bases["x"])


def test_a_basis_is_no_pair_of_rotations():
    x, _ = planted(n=50)
    with pytest.raises(ValueError, match=r"solution.bases\['x'\].*Rotations\(R, np.eye"):
        find(x, steps=5).rotations  # noqa: B018


def test_wide_spaces_start_from_principal_components_and_take_other_steps(rng):
    d = WIDE
    x = (rng.standard_normal((600, d)) * np.geomspace(1, 0.05, d)) @ random_orthogonal(rng, d)
    x = x.astype(np.float32)
    of = rs.ActivationSparsity(x, rs.TopK(0.5))
    planned = default_basis_method(rs.TopK(0.5), of).planned
    assert planned == [("Anneal", 500, 2 * d), ("Anneal", 500, 2 * d)]
    assert default_basis_method(rs.TopK(0.5), of, steps=8, batch_size=3).planned == [("Anneal", 4, 3)] * 2
    method = default_basis_method(rs.TopK(0.5), of, steps=8)
    solution = rs.find_basis(x, key=jax.random.key(0), method=method)
    components = {"in": jnp.asarray(np.linalg.eigh((x.T @ x).astype(np.float64))[1].T[::-1], jnp.float32)}
    assert solution.start_value == pytest.approx(float(of.value(components)), rel=1e-3)
    assert solution.value <= solution.start_value
    assert solution.stats["orthogonality_error"] < 1e-4


@pytest.mark.parametrize("measure", [rs.TopK(0.5), rs.Log(0.1)])
def test_a_source_is_drawn_from(rng, measure):
    x = rng.laplace(size=(300, 6)).astype(np.float32)
    streamed = rs.ActivationSparsity(x, measure).with_examples((Examples(jnp.asarray(x[:50]), ArrayRows(x)),))
    names = [name for name, *_ in default_basis_method(measure, streamed).planned]
    assert names == (["Anneal", "Anneal"] if isinstance(measure, rs.TopK) else ["Anneal"])
    options: dict[str, Any] = {"key": KEY, "measure": measure, "method": rs.Anneal(steps=20, batch_size=16)}
    solution, same = rs.find_basis(ArrayRows(x), **options), rs.find_basis(x, **options)
    np.testing.assert_array_equal(solution.bases["x"], same.bases["x"])
