"""`Anneal` on Jacobians: it reaches planted bases from anywhere, whatever the objective's scale, and stays on the
group. What every method owes (never worse than the start, same bits) is checked here for it too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from planted_bases import hidden_block
from rotsparse._core.orthogonal import haar, orthogonality_error
from rotsparse.engine.solution import Result
from rotsparse.fit.minimize import minimize
from rotsparse.objectives import JacobianSparsity, Objective, WeightedSum
from rotsparse.objectives.measures import Log
from rotsparse.solvers import Anneal, Riemannian

KEY = jax.random.key(0)


def planted(d, seed, activation="relu", n=256):
    """The objective of an MLP block that is sparse on both sides (every one of its 2d neurons has two inputs and two
    outputs), hidden by two Haar-random rotations; and the bases that undo them."""
    rng = np.random.default_rng(seed)
    q_in, q_out = (np.asarray(haar(key, d)) for key in jax.random.split(jax.random.key(seed)))
    layer = hidden_block(
        rng,
        q_in,
        q_out,
        hidden=2 * d,
        values=lambda: rng.choice([-1, 1], 2) * rng.uniform(0.5, 1.5, 2),
        bias=lambda: rng.standard_normal(2 * d) / 10,
        activation=activation,
    )
    x = rng.standard_normal((n, d)).astype(np.float32)
    objective = JacobianSparsity(layer, x, Log(0.1), scale_inputs=False)
    return objective, {"in": jnp.asarray(q_in), "out": jnp.asarray(q_out)}


def identity(objective):
    return {space: jnp.eye(d) for space, d in objective.spaces.items()}


def final(solution):
    return {space: solution.bases[space] for space in ("in", "out")}


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("seed", [0, 1])
def test_at_or_below_the_planted_objective(seed, activation):
    objective, truth = planted(16, seed, activation)
    solution = minimize(objective, identity(objective), key=KEY, method=Anneal(steps=1500), restarts=2)
    assert solution.value <= 1.001 * float(objective.value(truth))


def test_better_than_full_batch_adam_for_the_same_work():
    """16 times the steps on 1/16 of the examples."""
    for seed in range(2):
        objective, _ = planted(24, seed)
        start = identity(objective)
        annealed = minimize(objective, start, key=KEY, method=Anneal(steps=1600))
        plain = minimize(objective, start, key=KEY, method=Riemannian(steps=100))
        assert annealed.value < plain.value


def test_the_objectives_scale_does_not_matter():
    objective, _ = planted(8, 0)
    values = []  # of few steps: over many, rounding alone leads elsewhere
    for weight in (2.0**-40, 1.0, 2.0**40):
        scaled = WeightedSum([objective], [weight])
        values.append(minimize(scaled, identity(objective), key=KEY, method=Anneal(steps=20)).value / weight)
    np.testing.assert_allclose(values, values[1], rtol=1e-3)


class Extreme(Objective):
    """A linear function of two rotations with slopes of any size: no gradient is too large, too small, or zero."""

    slope: float

    @property
    def spaces(self):
        return {"a": 7, "b": 3}

    def value(self, bases):
        return self.slope * bases["a"][0, 1]

    def value_and_grad(self, bases):
        r = bases["a"]
        gradient = jnp.zeros((7, 7)).at[0].set(self.slope * r[:, 1])
        return self.value(bases), {"a": 0.5 * (gradient - gradient.T), "b": jnp.zeros((3, 3))}


@pytest.mark.parametrize("slope", [0.0, 1e-18, 1e-9, 1.0, 1e9, 1e18])
def test_no_gradient_breaks_orthogonality(slope):
    method, objective = Anneal(steps=100, angle=0.5), Extreme(slope)
    bases = {"a": haar(KEY, 7), "b": haar(KEY, 3)}
    state = method.init(bases)
    step = jax.jit(method.step)
    for i in range(100):
        bases, state, value = step(objective, bases, state, i)
        assert np.isfinite(value)
        assert all(float(orthogonality_error(r)) < 1e-5 for r in bases.values())
    # A space without any gradient does not move.
    np.testing.assert_allclose(bases["b"], haar(KEY, 3), atol=1e-6)


def test_never_worse_than_the_start():
    objective, _ = planted(8, 1)
    start = {"in": jnp.eye(8), "out": jnp.eye(8)}
    good = final(minimize(objective, start, key=KEY, method=Anneal(steps=600)))
    # A hot start destroys a good basis, and so short a run does not find back: the start must be returned.
    again = minimize(objective, good, key=KEY, method=Anneal(steps=20, angle=0.5))
    assert again.value <= float(objective.value(good)) * (1 + 1e-6)
    assert again.result is Result.NO_IMPROVEMENT


def test_a_small_angle_improves_a_good_start():
    objective, _ = planted(16, 0)
    rough = minimize(objective, identity(objective), key=KEY, method=Anneal(steps=300))
    better = minimize(objective, final(rough), key=KEY, method=Anneal(steps=300, angle=0.02))
    assert better.value < rough.value


def test_same_key_same_bits():
    objective, _ = planted(8, 0)
    runs = [minimize(objective, identity(objective), key=KEY, method=Anneal(steps=50), restarts=2) for _ in "ab"]
    np.testing.assert_array_equal(runs[0].rotations.r_in, runs[1].rotations.r_in)
    np.testing.assert_array_equal(runs[0].history.objective, runs[1].history.objective)


@pytest.mark.parametrize("options", [{"angle": 0.0}, {"angle": 0.6}, {"decay_mean": 1.0}, {"decay_square": -0.1}])
def test_impossible_options(options):
    with pytest.raises(ValueError, match="expected"):
        Anneal(**options)
