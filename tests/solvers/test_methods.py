"""The contract of every method on every kind of problem that it takes: one candidate for each start, never worse than
it, orthogonal, the same bits again, and a result that says how it ended."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rotsparse as rs
from helpers import random_orthogonal
from planted_bases import sparse_activations
from rotsparse._core.orthogonal import haar, worst_error
from rotsparse.engine.method import Problem
from rotsparse.engine.run import Run

D = 6
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
LAYER = rs.MLP(*(RNG.standard_normal(s).astype(np.float32) for s in ((10, D), 10, (D, 10))), activation="gelu")
X = RNG.standard_normal((80, D)).astype(np.float32)
CODES = sparse_activations(RNG, 300, random_orthogonal(RNG, D), 0.3).astype(np.float32)
JACOBIAN = rs.JacobianSparsity(LAYER, X, rs.Log(0.3))

PROBLEMS = {
    "jacobian": JACOBIAN,
    "tied": rs.JacobianSparsity(LAYER, X, rs.Log(0.3), space_out="in"),
    "held": rs.Held(JACOBIAN, {"out": jnp.eye(D)}),
    "activations": rs.ActivationSparsity(CODES, rs.Log(0.3)),
    "top-k": rs.ActivationSparsity(CODES, rs.TopK(0.5)),
    "sum": rs.WeightedSum([JACOBIAN, rs.ActivationSparsity(X, rs.Log(0.3))], [1.0, 0.5]),
}
ANNEAL = rs.Anneal(steps=20, batch_size=8)
EVERY = set(PROBLEMS)
PAIRS = {"jacobian", "held", "activations"}  # plain sums over rows, elementwise measures

# Each method, and the problems it takes; others it refuses.
METHODS = {
    "anneal": (ANNEAL, EVERY),
    "riemannian": (rs.Riemannian(optax.adam(0.1), steps=20), EVERY),
    "pair search": (rs.PairSearch(sweeps=2), PAIRS),
    "refine": (rs.Refine(ANNEAL), PAIRS),
    "fixed point": (rs.FixedPoint(steps=10), {"activations", "top-k"}),
    "quasi-Newton": (rs.QuasiNewton(steps=10), {"activations", "top-k"}),
    "fixed point, Newton": (rs.FixedPointNewton(), {"activations"}),
    "power method": (rs.PowerMethod(steps=10), {"top-k"}),
    "then": (rs.Then(ANNEAL, rs.Riemannian(steps=10)), EVERY),
    "best of": (rs.BestOf(ANNEAL, rs.Riemannian(steps=10)), EVERY),
    "each": (rs.Each(ANNEAL), EVERY),
    "hinted": (rs.Hinted(ANNEAL, ANNEAL), EVERY),
    "with measure": (rs.Then(rs.WithMeasure(rs.GemanMcClure(0.6), ANNEAL), ANNEAL), EVERY),
}
TAKEN = [(method, problem) for method, (_, taken) in METHODS.items() for problem in sorted(taken)]
REFUSED = [(m, p) for m, (_, taken) in METHODS.items() for p in sorted(EVERY - taken) if m != "fixed point, Newton"]


def run(method: str, problem: str) -> tuple[tuple, rs.Solution]:
    """From the identity and from a random start."""
    objective = PROBLEMS[problem]
    keys = jax.random.split(KEY, len(objective.spaces))
    random = {name: haar(k, d) for k, (name, d) in zip(keys, objective.spaces.items(), strict=True)}
    starts = {name: jnp.eye(d) for name, d in objective.spaces.items()}, random
    return starts, METHODS[method][0].run(Problem(objective), starts, key=KEY, run=Run())


@pytest.mark.parametrize(("method", "problem"), TAKEN)
def test_contract(method, problem):
    objective = PROBLEMS[problem]
    starts, solution = run(method, problem)
    assert len(solution.candidates) == len(solution.candidate_values) == 2
    at_starts = Problem(objective).judged(starts)
    found = Problem(objective).judged(solution.candidates)
    np.testing.assert_allclose(solution.candidate_values, found, rtol=1e-4)
    if METHODS[method][0].descends:
        assert (found <= at_starts + 1e-5 * np.abs(at_starts)).all()
    assert found.min() <= at_starts[0] * (1 + 1e-5)
    best = int(np.argmin(solution.candidate_values))
    for name, d in objective.spaces.items():
        assert solution.bases[name].shape == (d, d) and solution.bases[name].dtype == np.float32
        np.testing.assert_array_equal(solution.bases[name], solution.candidates[best][name])
        assert solution.free[name].all() and solution.free[name].shape == (d,)
    assert max(worst_error({k: r[None] for k, r in c.items()}) for c in solution.candidates) < 1e-5
    assert solution.result in (rs.Result.ALL_STEPS, rs.Result.CONVERGED, rs.Result.NO_IMPROVEMENT)
    assert solution.value == pytest.approx(found.min(), rel=1e-4)
    assert solution.stages and all(np.isfinite(stage.value) and stage.seconds >= 0 for stage in solution.stages)
    assert {"seconds", "gradient_norm", "orthogonality_error"} <= solution.stats.keys()
    again = run(method, problem)[1]
    for one, other in zip(jax.tree.leaves(solution.candidates), jax.tree.leaves(again.candidates), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("method", "problem"), REFUSED)
def test_what_a_method_does_not_take_it_refuses(method, problem):
    with pytest.raises(ValueError):
        run(method, problem)
