"""Hints: good starts win by the zeros that they leave, and are as if they were not there where they do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rotsparse as rs
from rotsparse._core.alignment import mean_max_cosine
from rotsparse.engine.solution import Result
from rotsparse.solvers.hinted import entries_left

KEY = jax.random.key(0)
FAR, NEAR = rs.Anneal(steps=5), rs.Anneal(steps=5, angle=0.01)


@pytest.fixture
def problem(rng):
    """Activations that are sparse in a hidden basis, and that basis."""
    d = 12
    sparse = rng.standard_normal((300, d)) * (rng.random((300, d)) < 0.2)
    hidden = np.linalg.qr(rng.standard_normal((d, d)))[0]
    objective = rs.ActivationSparsity((sparse @ hidden).astype(np.float32), rs.Log(0.1), space="x")
    return objective, {"x": jnp.asarray(hidden, jnp.float32)}


def minimize(objective, method, hints=(), **options):
    return rs.minimize(objective, method=method, key=KEY, hints=hints, **options)


def test_a_hint_that_leaves_fewer_entries_is_kept(problem):
    objective, hidden = problem
    solution = minimize(objective, rs.Hinted(FAR, NEAR), [hidden], restarts=2)
    assert entries_left(objective, solution.bases) == pytest.approx(0.2, abs=0.03)
    assert solution.stages[-1].remark.endswith("kept")
    assert len(solution.candidates) == 2
    for name, r in solution.bases.items():
        np.testing.assert_array_equal(solution.candidates[solution.best][name], r)
    assert solution.value < solution.start_value
    assert solution.agreement()["x"].shape == (1, 12)


class Never(rs.Anneal):
    """A method that must not run."""

    def run(self, problem, starts, *, key, run):
        raise AssertionError("the far method ran")


def test_a_hint_that_is_clear_of_all_else_is_gone_on_from_alone(problem):
    objective, hidden = problem
    solution = minimize(objective, rs.Hinted(Never(), NEAR), [{"x": jnp.eye(12)}, hidden])
    assert mean_max_cosine(np.asarray(solution.bases["x"]), np.asarray(hidden["x"])) > 0.99
    assert solution.start_value == pytest.approx(float(objective.value({"x": jnp.eye(12)})))
    assert [stage.name for stage in solution.stages] == ["Anneal from hints"]
    assert "clear of the other starts" in solution.stages[0].remark


def test_one_of_two_good_hints_is_not_clear_and_restarts_are_all_taken(problem):
    objective, hidden = problem
    with pytest.raises(AssertionError, match="far"):
        minimize(objective, rs.Hinted(Never(), NEAR), [hidden, hidden])
    with pytest.raises(AssertionError, match="far"):
        minimize(objective, rs.Hinted(Never(), NEAR), [hidden], restarts=2)


def test_a_hint_outside_of_a_basin_does_not_replace_the_far_method(problem):
    """Half of its directions are mixed in pairs; the near method finds them, and its result competes, once."""
    objective, hidden = problem
    turn = np.eye(12, dtype=np.float32)
    for i in range(0, 6, 2):
        turn[i : i + 2, i : i + 2] = np.array([[1, 1], [-1, 1]]) / np.sqrt(2)
    mixed = {"x": jnp.asarray(turn) @ hidden["x"]}
    assert entries_left(objective, mixed) < 0.5 * entries_left(objective, {"x": jnp.eye(12)})
    solution = minimize(objective, rs.Hinted(FAR, rs.Anneal(steps=300)), [mixed])
    assert [stage.name for stage in solution.stages] == ["Anneal", "Anneal from hints"]
    assert solution.stages[1].remark.endswith("kept")
    assert entries_left(objective, solution.bases) == pytest.approx(0.2, abs=0.03)


def test_a_negative_objective_is_no_share_of_entries(problem):
    objective, hidden = problem
    with pytest.raises(AssertionError, match="far"):
        minimize(objective.map_measures(lambda _: rs.L4()), rs.Hinted(Never(), NEAR), [hidden])


def test_a_poor_hint_changes_nothing(problem):
    objective, _ = problem
    plain = minimize(objective, FAR)
    hinted = minimize(objective, rs.Hinted(FAR, rs.Anneal(steps=1, angle=1e-4)), [{"x": jnp.eye(12)}])
    assert hinted.stages[-1].remark.endswith("dropped")
    without = minimize(objective, rs.Hinted(FAR, NEAR))
    for solution in (hinted, without):
        np.testing.assert_array_equal(solution.bases["x"], plain.bases["x"])
        assert solution.value == plain.value
    assert len(without.stages) == len(plain.stages)


def test_an_interrupted_hint_is_an_interrupted_fit(problem, tmp_path):
    objective, hidden = problem

    class Stopped(rs.Anneal):
        def run(self, problem, starts, *, key, run):
            run.stop()
            return super().run(problem, starts, key=key, run=run)

    near = Stopped(steps=5, angle=0.01)
    first = minimize(objective, rs.Hinted(Never(), near), [hidden], run=tmp_path / "first")
    assert first.result is Result.INTERRUPTED and first.value < first.start_value
    stopped = minimize(objective, rs.Hinted(FAR, near), [hidden, hidden], run=tmp_path / "last")
    assert stopped.result is Result.INTERRUPTED
    np.testing.assert_array_equal(stopped.bases["x"], minimize(objective, FAR).bases["x"])


def test_measures_without_a_scale_are_judged_by_the_objective(problem):
    objective, hidden = problem
    for measure in (rs.L4(), rs.TopK(0.5)):
        other = objective.map_measures(lambda _, m=measure: m)
        assert entries_left(other, hidden) == pytest.approx(float(other.value(hidden)))


def test_find_rotations_gives_the_basis_of_the_weights_as_a_hint(rng):
    w = rng.standard_normal((6, 6)) * (rng.random((6, 6)) < 0.4) + np.eye(6)
    layer = rs.Dense((w @ np.linalg.qr(rng.standard_normal((6, 6)))[0]).astype(np.float32))
    x = rng.standard_normal((60, 6)).astype(np.float32)
    method = rs.Hinted(FAR, NEAR)
    assert "hints" in rs.find_rotations(layer, x, key=KEY, method=method).stages[-1].name
    given = rs.find_rotations(layer, x, key=KEY, method=method, start=rs.Rotations.identity(6, 6))
    tied = rs.find_rotations(layer, x, key=KEY, method=method, tie=True)
    assert all("hints" not in solution.stages[-1].name for solution in (given, tied))
    held = rs.find_rotations(layer, x, key=KEY, method=method, hold=("out",))
    np.testing.assert_array_equal(held.rotations.r_out, np.eye(6))
