"""`find_rotations`: it finds planted rotations, is deterministic, never returns something worse, and says how it
ended."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import random_orthogonal
from planted_bases import hidden_block
from rotsparse._core.alignment import mean_max_cosine
from rotsparse._core.orthogonal import haar, retract_cayley, retract_expm, retract_qr
from rotsparse.engine.solution import Result, Solution
from rotsparse.fit.default_method import default_method
from rotsparse.fit.find_rotations import find_rotations
from rotsparse.fit.minimize import minimize
from rotsparse.layers.function import FunctionLayer
from rotsparse.layers.gated import GatedMLP
from rotsparse.layers.mlp import MLP, Dense
from rotsparse.layers.rotations import Rotations
from rotsparse.objectives import ActivationSparsity, JacobianSparsity, WeightedSum, measures
from rotsparse.objectives.jacobian import looked_at
from rotsparse.solvers import Anneal, Refine, Riemannian, Then
from rotsparse.solvers.riemannian import constant, geometric

KEY = jax.random.key(0)
D = 8


def planted(n=400, d=D, seed=0):
    """`f(x) = Q_out φ(Q_inᵀ x)` with an elementwise φ: diagonal Jacobians in the rotated basis."""
    rng = np.random.default_rng(seed)
    q_in, q_out = (random_orthogonal(rng, d).astype(np.float32) for _ in range(2))
    layer = Dense(q_in.T.copy(), activation="squared_relu").rotate(None, q_out)
    return layer, rng.standard_normal((n, d)).astype(np.float32), Rotations(q_in.T.copy(), q_out.T.copy())


def quick(layer, x, *, method=None, **options):
    """A short fit: of annealing, unless another method is given; its fields may stand among the options."""
    fields = {name: options.pop(name) for name in ("steps", "batch_size") if name in options}
    method = Anneal(**{"steps": 100, **fields}) if method is None else method
    return find_rotations(layer, x, **{"key": KEY, "scale_inputs": False, "method": method, **options})


def same_bits(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda u, v: bool((np.asarray(u) == np.asarray(v)).all()), a, b)))


def stages(solution):
    return [stage.name for stage in solution.stages]


def test_planted_rotations_are_found():
    layer, x, truth = planted()
    x, validation = x[:300], x[300:]
    solution = quick(layer, x, steps=200, restarts=4, validation=validation)
    assert solution.result is Result.ALL_STEPS and solution.result.ok
    assert mean_max_cosine(np.asarray(solution.rotations.r_in), truth.r_in) > 0.999
    assert mean_max_cosine(np.asarray(solution.rotations.r_out), truth.r_out) > 0.999
    assert solution.rotations.orthogonality_error() < 1e-5
    assert solution.value < 0.3 * solution.start_value
    assert solution.validation_value == pytest.approx(solution.candidate_values.min())
    assert "objective" in solution.summary()


def test_same_key_same_bits_and_another_key_other_bits():
    layer, x, _ = planted()
    runs = [quick(layer, x, restarts=2, batch_size=32, key=jax.random.key(k)) for k in (1, 1, 2)]
    assert same_bits(runs[0].candidates, runs[1].candidates)
    assert not same_bits(runs[0].candidates, runs[2].candidates)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (optax.adam(1e3), {}),
        (optax.adam(3e38), {}),
        (optax.sgd(3e38, momentum=0.9), {}),
        (optax.adam(1e30), {"retraction": retract_cayley}),
        (optax.adam(1e30), {"retraction": retract_qr}),
        (optax.adam(1e30), {"retraction": retract_expm}),
    ],
)
def test_no_learning_rate_breaks_orthogonality(optimizer, options):
    layer, x, _ = planted(n=50)
    solution = quick(layer, x, method=Riemannian(optimizer, steps=30, decay=constant, **options))
    assert solution.result in (Result.ALL_STEPS, Result.NO_IMPROVEMENT)
    assert solution.rotations.orthogonality_error() < 1e-5
    assert solution.value <= solution.start_value


@pytest.mark.parametrize(
    "method", [Riemannian(steps=30, eps=geometric(1.0, 0.1)), Anneal(steps=30)], ids=["riemannian", "anneal"]
)
def test_float32_data_stay_float32_when_x64_is_on(x64, method):
    layer, x, _ = planted(n=50)
    solution = quick(layer, x, method=method)
    assert solution.rotations.r_in.dtype == np.float32
    solution = quick(jax.tree.map(lambda w: np.asarray(w, np.float64), layer), x.astype(np.float64), method=method)
    assert solution.rotations.r_in.dtype == np.float64
    assert solution.rotations.orthogonality_error() < 1e-13


def test_a_start_that_cannot_be_improved_is_returned():
    layer, x, truth = planted()
    solution = quick(layer, x, start=truth, method=Riemannian(optax.sgd(1e3), decay=constant, steps=20))
    assert solution.result is Result.NO_IMPROVEMENT and not solution.result.ok
    np.testing.assert_array_equal(solution.rotations.r_in, truth.r_in)
    assert "start" in solution.result.value


def test_warm_start_and_continuing_with_another_measure():
    layer, x, _ = planted()
    first = quick(layer, x)
    second = quick(layer, x, start=first.rotations, measure=measures.GemanMcClure(0.1), steps=30)
    assert second.value <= second.start_value
    again = quick(layer, x, start=first.rotations, steps=20)
    np.testing.assert_allclose(again.start_value, first.value, rtol=1e-5)


def test_held_and_tied_sides():
    layer, x, _ = planted()
    held = quick(layer, x, hold=("out",))
    np.testing.assert_array_equal(held.rotations.r_out, np.eye(D))
    assert held.value < held.start_value
    tied = quick(layer, x, tie=True)
    np.testing.assert_array_equal(tied.rotations.r_in, tied.rotations.r_out)
    assert tied.value < tied.start_value


def test_active_subspace_of_a_layer_with_few_directions():
    """Variance in 3 of 12 directions: only these are rotated, and what is found lies in them."""
    layer, x3, truth = planted(d=3)
    rng = np.random.default_rng(1)
    frame = random_orthogonal(rng, 12).astype(np.float32)
    wide = FunctionLayer(lambda x: jnp.asarray(frame[:3].T) @ layer(frame[:3] @ x), 12, 12)
    x = x3 @ frame[:3] + 1e-4 * rng.standard_normal((len(x3), 12)).astype(np.float32)
    solution = quick(wide, x, active_subspace=0.999, restarts=2, validation=x[:50], steps=100)
    np.testing.assert_allclose(solution.rotations.r_in @ solution.rotations.r_in.T, np.eye(12), atol=1e-5)
    found = np.abs(np.asarray(solution.rotations.r_in)[:3] @ (truth.r_in @ frame[:3]).T)
    assert (found.max(1) > 0.999).all()
    # All values are of one problem, that of the three active directions ...
    best = solution.history.checked.min(axis=1)
    np.testing.assert_allclose(solution.candidate_values, best)
    assert solution.validation_value == pytest.approx(best.min(), rel=1e-5)
    assert solution.value < 0.5 * solution.start_value
    # ... and the others, which are the same in every restart, do not count as found again.
    reproduced = solution.reproduced()
    assert reproduced is not None and {len(again) for again in reproduced.values()} == {3}


def test_early_stopping():
    layer, x, truth = planted()
    solution = quick(layer, x, start=truth, method=Riemannian(optax.sgd(1e-3), patience=40, steps=1000))
    assert solution.stats["steps"] < 1000
    assert solution.result in (Result.CONVERGED, Result.NO_IMPROVEMENT)


def test_patience_is_not_lost_before_anybody_looked():
    """Looking at all examples is dear here, and for the first hundreds of steps the fit improves all the time."""
    layer, x, _ = planted(n=4000)
    adam = Riemannian(optax.adam(0.01), decay=constant, batch_size=4, patience=100, steps=400)
    solution = quick(layer, x, method=adam)
    assert solution.stats["best_step"] > 0 and solution.value < 0.9 * solution.start_value
    assert np.diff(solution.history.checked_at).max() <= 100


def test_few_validation_examples_are_looked_at_often():
    layer, x, _ = planted(n=4000)
    often, seldom = (quick(layer, x, batch_size=4, steps=400, validation=v).history for v in (x[:10], None))
    assert len(often.checked_at) > 10 > len(seldom.checked_at)


def test_history_and_schedules():
    layer, x, _ = planted()
    solution = quick(layer, x, restarts=3, method=Riemannian(optax.adam(0.1), steps=70, eps=geometric(1.0, 0.1)))
    history = solution.history
    assert history.objective.shape == (3, 70)
    assert history.checked_at.tolist() == [0, 20, 40, 60, 70]
    assert history.checked.shape == (3, 5)
    assert np.isfinite(history.objective).all()
    # at ε = 1 everything counts as nearly zero
    assert (history.objective[:, 0] < history.checked[:, 0]).all()


class Exploding(measures.Log):
    """NaN as soon as the entries leave the start."""

    def example_value(self, z):
        return jnp.where(jnp.abs(z[:, 0, 1]) > 0.5, jnp.nan, super().example_value(z))


def test_non_finite_values_stop_the_run_and_say_where():
    layer = Dense(np.eye(3, dtype=np.float32), activation="tanh")
    x = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
    turn = np.array([[0.995, 0.0999, 0], [-0.0999, 0.995, 0], [0, 0, 1]], np.float32)
    start = Rotations(turn, np.eye(3, dtype=np.float32))
    solution = quick(
        layer, x, start=start, measure=Exploding(0.1), method=Riemannian(optax.sgd(-1e6), steps=100, decay=constant)
    )
    assert solution.result is Result.NON_FINITE and not solution.result.ok
    assert "step" in solution.detail
    assert np.isfinite(np.asarray(solution.rotations.r_in)).all()
    assert solution.rotations.orthogonality_error() < 1e-5


def test_what_came_before_a_nan_is_not_lost(monkeypatch):
    """Nobody looked at the objective between the start and step 350."""
    layer, x, _ = planted(n=4000)
    late = lambda i: jnp.where(i < 350, 1.0, jnp.nan)  # noqa: E731
    adam = optax.chain(optax.adam(0.05), optax.scale_by_schedule(late))
    solution = quick(layer, x, method=Riemannian(adam, decay=constant, batch_size=4, steps=400))
    assert solution.result is Result.NON_FINITE
    assert 300 <= solution.stats["best_step"] <= 350
    assert solution.value < 0.9 * solution.start_value


def test_wide_layers_are_not_searched_whatever_is_held():
    layer, x, _ = planted(n=50)
    method = Then(Anneal(steps=5), Refine(Anneal(steps=5), largest=D * D - 1))
    variants: list[dict[str, Any]] = [{}, {"hold": ("in",)}, {"tie": True}]
    for options in variants:
        assert find_rotations(layer, x, key=KEY, method=method, **options).certificate is None


def test_an_optimiser_that_returns_nan_is_caught():
    broken = optax.stateless(lambda updates, params: jax.tree.map(lambda u: u * jnp.nan, updates))
    layer, x, _ = planted(n=50)
    solution = quick(layer, x, method=Riemannian(broken))
    assert solution.result is Result.NON_FINITE
    np.testing.assert_array_equal(solution.rotations.r_in, np.eye(D))


def test_interrupting_keeps_the_best(monkeypatch):
    layer, x, _ = planted()
    updates = []

    def interrupt(self, done, **shown):
        updates.append(done)
        if len(updates) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("rotsparse.engine._progress.Progress.update", interrupt)
    solution = quick(layer, x, steps=1000)
    assert solution.result is Result.INTERRUPTED and not solution.result.ok
    assert 0 < solution.stats["steps"] < 1000
    assert solution.value < solution.start_value


def test_ten_thousand_float32_steps_stay_orthogonal():
    layer, x, _ = planted(n=16)
    solution = quick(layer, x, method=Riemannian(optax.adam(0.1), steps=10_000, decay=constant))
    assert solution.rotations.orthogonality_error() < 1e-5


def test_one_compilation_serves_the_whole_run(monkeypatch):
    traces = []
    original = JacobianSparsity.value_and_grad
    monkeypatch.setattr(
        JacobianSparsity, "value_and_grad", lambda self, bases: (traces.append(1), original(self, bases))[1]
    )
    layer, x, _ = planted(n=50)
    quick(layer, x, steps=130)
    assert len(traces) <= 2  # the steps, and the certificate at the end


def test_activations_and_sums_go_through_minimize(rng):
    codes = rng.standard_normal((2000, 6)) * (rng.random((2000, 6)) < 0.2)
    q = random_orthogonal(rng, 6)
    x = (codes @ q).astype(np.float32)
    objective = ActivationSparsity(x, measures.Log(0.3))
    start = {"in": haar(KEY, 6)}
    solution = minimize(objective, start, key=KEY, method=Anneal(steps=200, batch_size=None), restarts=3)
    assert mean_max_cosine(np.asarray(solution.bases["in"]), q) > 0.999
    both = WeightedSum([objective, ActivationSparsity(x[:100], measures.Log(1.0))], [1.0, 0.1])
    assert minimize(both, start, key=KEY, method=Anneal(steps=50, batch_size=None)).value < both.value(start)


def test_the_default_searches_pairs_and_leaves_a_certificate():
    layer, x, _ = planted()
    default = default_method(steps=60)
    alone, complete = quick(layer, x, steps=60), quick(layer, x, method=default)
    assert "no rotation of two rows improves" in str(complete.certificate)
    assert str(complete.certificate) in complete.summary()
    assert alone.certificate is None
    assert stages(complete) == ["Anneal", "Anneal from hints", "Refine"]
    assert complete.value <= alone.value
    assert complete.rotations.orthogonality_error() < 1e-5
    objective = JacobianSparsity(layer, x, measures.Log(0.1), scale_inputs=False)
    gradient = objective.value_and_grad(complete.bases)[1]
    assert complete.stats["gradient_norm"] == pytest.approx(float(optax.tree.norm(gradient)), rel=0.01, abs=1e-6)
    judged = quick(layer, x, method=default, validation=x[:50], restarts=2)
    assert judged.validation_value == pytest.approx(judged.candidate_values.min())
    held = quick(layer, x, method=default, hold=("out",))
    np.testing.assert_array_equal(held.rotations.r_out, np.eye(D))
    small = quick(layer, x, method=default, active_subspace=0.9)
    assert small.rotations.orthogonality_error() < 1e-5
    assert quick(layer, x, method=default, tie=True).certificate is None  # no plain sum over rows


def test_the_default_goes_on_from_the_weights_where_these_show_the_basis(rng):
    """150 steps at small angles would not find it from the neurons."""
    d = 24
    q_in, q_out = random_orthogonal(rng, d), random_orthogonal(rng, d)
    layer = hidden_block(rng, q_in, q_out, hidden=2 * d, activation="gelu")
    x = rng.standard_normal((200, d)).astype(np.float32)
    method = default_method(steps=300)
    solution = quick(layer, x, method=method)
    assert stages(solution) == ["Anneal from hints", "Refine"]
    assert mean_max_cosine(np.asarray(solution.rotations.r_in), q_in) > 0.99
    assert mean_max_cosine(np.asarray(solution.rotations.r_out), q_out) > 0.99
    assert stages(quick(layer, x, method=method, start=Rotations.identity(d, d)))[0] == "Anneal"
    assert stages(quick(layer, x, method=method, restarts=2))[0] == "Anneal"


def test_the_default_knows_the_svd_of_a_linear_layer(rng):
    """Its weights have no sparse basis on one side alone, and the sparsest on both is diagonal."""
    layer = Dense(rng.standard_normal((6, 20)).astype(np.float32), activation="identity")
    solution = quick(layer, rng.standard_normal((50, 20)).astype(np.float32), method=default_method(steps=20))
    assert stages(solution)[0] == "Anneal from hints"
    z = np.abs(layer.jacobian(jnp.ones((1, 20)), solution.rotations.r_in, solution.rotations.r_out)[0])
    assert np.count_nonzero(z > 1e-3 * z.max()) == 6


def test_agreement_between_restarts():
    layer, x, _ = planted()
    solution = quick(layer, x, restarts=3, steps=200)
    agreement = solution.agreement()
    assert agreement["in"].shape == (2, D)
    assert np.median(agreement["in"]) > 0.999
    with pytest.raises(ValueError, match="restarts=2"):
        quick(layer, x, steps=20).agreement()


def test_solution_round_trip(tmp_path):
    layer, x, _ = planted(n=50)
    solution = quick(layer, x, steps=40, restarts=2)
    solution.save(tmp_path / "solution.npz")
    loaded = Solution.load(tmp_path / "solution.npz")
    assert same_bits(solution.candidates, loaded.candidates) and same_bits(solution.bases, loaded.bases)
    assert same_bits(solution.free, loaded.free)
    arrays = {"bases", "candidates", "candidate_values", "history", "free"}
    scalars = [{name: value for name, value in vars(s).items() if name not in arrays} for s in (loaded, solution)]
    assert scalars[0] == scalars[1]
    content = (tmp_path / "solution.npz").read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"not a zip"):
        (tmp_path / "damaged.npz").write_bytes(damaged)
        with pytest.raises(ValueError, match="cannot read a solution"):
            Solution.load(tmp_path / "damaged.npz")
    with pytest.raises(ValueError, match="cannot read a solution"):
        Solution.load(tmp_path / "missing.npz")


def test_gated_and_function_layers_fit(rng):
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    x = draw(40, 6)
    for layer in (
        GatedMLP(draw(10, 6), draw(10, 6), draw(6, 10), skip=True),
        FunctionLayer(lambda x: jnp.sin(x[:4]), 6, 4),
    ):
        solution = find_rotations(layer, x, key=KEY, method=Anneal(steps=40))
        assert solution.value <= solution.start_value
        assert solution.rotations.r_out.shape == (layer.d_out, layer.d_out)


def test_bad_arguments():
    layer, x, _ = planted(n=50)
    with pytest.raises(ValueError, match="steps should be at least 1, got 0"):
        quick(layer, x, steps=0)
    with pytest.raises(ValueError, match="restarts should be at least 1"):
        quick(layer, x, restarts=0)
    with pytest.raises(ValueError, match="hold names \\['left'\\]"):
        quick(layer, x, hold=("left",))
    with pytest.raises(ValueError, match="nothing to optimise"):
        quick(layer, x, hold=("in", "out"))
    with pytest.raises(ValueError, match="start has widths 3 and 3"):
        quick(layer, x, start=Rotations.identity(3, 3))
    with pytest.raises(ValueError, match="share of the variance"):
        quick(layer, x, active_subspace=1.5)
    with pytest.raises(ValueError, match="excludes start, tie and hold"):
        quick(layer, x, active_subspace=0.9, tie=True)
    with pytest.raises(ValueError, match=r"validation should have shape \[examples, 8\]"):
        quick(layer, x, validation=x[:, :3])
    with pytest.raises(ValueError, match="batch_size should be at least 1, got 0"):
        quick(layer, x, batch_size=0)
    with pytest.raises(ValueError, match="r_in and r_out to be equal"):
        quick(layer, x, tie=True, start=Rotations.haar(KEY, D, D))
    with pytest.raises(ValueError, match="patience should be at least 1, got 0"):
        Riemannian(patience=0)
    with pytest.raises(TypeError, match="patience"):  # annealing improves most near its end
        Anneal(patience=10)  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValueError, match="max_step"):
        Riemannian(max_step=2.0)


def test_objectives_are_pytrees():
    layer, x, _ = planted(n=50)
    objective = JacobianSparsity(layer, x, measures.Log(0.1))
    leaves, structure = jax.tree.flatten(objective)
    assert eqx.tree_equal(jax.tree.unflatten(structure, leaves), objective)


def test_looks_bound_what_the_objective_is_computed_on_and_not_what_is_drawn():
    layer, x, _ = planted(90)
    few = JacobianSparsity(layer, x, measures.Log(0.1), looks=20)
    assert len(few.x) == 20 and few.data.total_count == 90
    np.testing.assert_array_equal(few.gram, JacobianSparsity(layer, x, measures.Log(0.1)).gram)  # of all examples
    method = Anneal(steps=30, batch_size=4)
    a, b = (find_rotations(layer, x, key=KEY, method=method, looks=looks) for looks in (20, None))
    np.testing.assert_array_equal(a.history.objective, b.history.objective)  # the same minibatches
    assert a.value != b.value


def test_examples_that_are_looked_at_are_fewer_for_wide_layers():
    of = lambda d: looked_at(MLP(np.ones((4 * d, d), np.float32), None, np.ones((d, 4 * d), np.float32)))  # noqa: E731
    assert of(64) > 100_000 and of(768) == 256
