"""Pair search: gains are what the objective really changes by, wrong pairs are found across barriers, nothing gets
worse, and the certificate is true."""

import itertools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rotsparse._core.orthogonal import haar, orthogonality_error
from rotsparse.engine.method import Problem
from rotsparse.engine.record import Record
from rotsparse.engine.run import Run
from rotsparse.engine.solution import Result
from rotsparse.fit.minimize import minimize
from rotsparse.layers.mlp import MLP, Dense
from rotsparse.objectives import ActivationSparsity, Held, JacobianSparsity, WeightedSum, measures
from rotsparse.solvers import _pair_angles as angles_of_pairs
from rotsparse.solvers.pair_search import PairSearch, certify

D_IN, D_OUT = 5, 4


def jacobian_objective(
    seed=0,
    n=40,
    scale_inputs=True,
    measure: measures.Measure = measures.Log(0.3),  # noqa: B008
    dtype=np.float32,
):
    """A small GELU block with sparse weights, whose inputs have very different variances."""
    rng = np.random.default_rng(seed)
    w_in = rng.standard_normal((10, D_IN)) * (rng.random((10, D_IN)) < 0.4)
    w_out = rng.standard_normal((D_OUT, 10)) * (rng.random((D_OUT, 10)) < 0.4)
    x = rng.standard_normal((n, D_IN)) @ rng.standard_normal((D_IN, D_IN)) * np.geomspace(0.1, 3, D_IN)
    layer = MLP(w_in.astype(dtype), None, w_out.astype(dtype), activation="gelu")
    return JacobianSparsity(layer, x.astype(dtype), measure, scale_inputs=scale_inputs)


def activation_objective(seed=0, n=400, d=6, measure: measures.Measure = measures.Log(0.1)):  # noqa: B008
    rng = np.random.default_rng(seed)
    return ActivationSparsity((rng.standard_normal((n, d)) * (rng.random((n, d)) < 0.3)).astype(np.float32), measure)


OBJECTIVES = {
    "scaled": jacobian_objective,
    "raw": lambda: jacobian_objective(scale_inputs=False),
    "activations": activation_objective,
}


@pytest.fixture(params=OBJECTIVES)
def objective(request):
    return OBJECTIVES[request.param]()


def pair_search(objective, bases, **options):
    """The bases that a pair search ends with, and its certificate."""
    solution = minimize(objective, bases, method=PairSearch(**options), key=jax.random.key(0))
    return solution.bases, solution.certificate


@eqx.filter_jit
def value_of(objective, bases):
    return objective.value(bases)


def random_bases(objective, seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {space: haar(key, d) for key, (space, d) in zip(keys, objective.spaces.items(), strict=False)}


def turned(r, i, j, angle):
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return r.at[i].set(cos * r[i] + sin * r[j]).at[j].set(cos * r[j] - sin * r[i])


def test_a_certificate_is_true_by_brute_force(objective):
    """1,000 angles of every pair."""
    bases = random_bases(objective)
    certificate = certify(objective, bases, screen=None)
    values = eqx.filter_jit(lambda objective, bases: jax.vmap(objective.value)(bases))
    best, angles = 0.0, jnp.linspace(0, math.pi / 2, 1000)
    for space, d in objective.spaces.items():
        for i, j in itertools.combinations(range(d), 2):
            candidates = jax.vmap(turned, (None, None, None, 0))(bases[space], i, j, angles)
            others = {k: jnp.broadcast_to(r, (1000, *r.shape)) for k, r in bases.items() if k != space}
            best = max(best, float(value_of(objective, bases) - values(objective, {space: candidates, **others}).min()))
    assert certificate.tested == certificate.pairs == {space: math.comb(d, 2) for space, d in objective.spaces.items()}
    np.testing.assert_allclose(certificate.delta, best, rtol=2e-3)
    np.testing.assert_allclose(certificate.value, value_of(objective, bases), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "measure"), [(jacobian_objective, measures.L4()), (activation_objective, measures.SmoothedL1(0.05))]
)
def test_predicted_gains_are_what_the_objective_changes_by(make, measure):
    objective = make(measure=measure)
    bases = random_bases(objective)
    value = float(value_of(objective, bases))
    for side in angles_of_pairs.sides(objective, bases)[0]:
        found = zip(*angles_of_pairs.gains(side, bases, None), strict=True)
        for (i, j), angle, gain in found:
            after = float(value_of(objective, bases | {side.space: turned(bases[side.space], i, j, angle)}))
            assert gain >= 0
            # Three float32 sums, each of up to the larger of the two values.
            np.testing.assert_allclose(value - after, gain, atol=4e-6 * max(1, abs(value), abs(after)))


@pytest.mark.parametrize(("block", "together"), [(2, 4), (64, 2**14)])
def test_some_pairs_have_the_gains_that_they_have_among_all(monkeypatch, block, together):
    monkeypatch.setattr(angles_of_pairs, "BLOCK", block)
    monkeypatch.setattr(angles_of_pairs, "TOGETHER", together)
    objective = jacobian_objective(measure=measures.Log(0.1))
    bases = random_bases(objective)
    for side in angles_of_pairs.sides(objective, bases)[0]:
        every = angles_of_pairs.gains(side, bases, None)
        rows = np.arange(side.size) == 2
        some = angles_of_pairs.gains(side, bases, None, rows)
        chosen = (every[0] == 2).any(axis=1)
        assert len(some[0]) == chosen.sum() == side.size - 1
        for found, expected in zip(some, every, strict=True):
            np.testing.assert_allclose(found, expected[chosen], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("angle", [0.3, 0.785])
def test_a_wrong_pair_is_found_across_the_barrier(angle):
    objective = activation_objective(measure=measures.Log(0.02))
    bases = {"in": turned(jnp.eye(6), 1, 4, angle)}
    found, certificate = pair_search(objective, bases)
    cosines = np.abs(np.asarray(found["in"]))
    assert (cosines.max(axis=1) > 0.9999).all()
    assert certificate.delta <= 1e-4 * certificate.value


def test_a_wrong_pair_of_a_jacobian_is_found():
    rng = np.random.default_rng(0)
    w_in = np.eye(8, dtype=np.float32)[rng.integers(0, 8, 16)]
    w_out = np.eye(8, dtype=np.float32)[:, rng.permutation(np.arange(16) % 8)]
    layer = MLP(w_in, None, w_out, activation="relu")
    objective = JacobianSparsity(layer, rng.standard_normal((200, 8)).astype(np.float32), measures.Log(0.1))
    truth = {"in": jnp.eye(8), "out": jnp.eye(8)}
    bases = {"in": turned(turned(jnp.eye(8), 0, 3, 0.7), 5, 6, 0.5), "out": turned(jnp.eye(8), 2, 7, 0.6)}
    _, certificate = pair_search(objective, bases, screen=None)
    assert certificate.value <= 1.001 * value_of(objective, truth) < value_of(objective, bases)


def test_never_worse_and_still_orthogonal(objective):
    for seed in range(3):
        bases = random_bases(objective, seed)
        found, certificate = pair_search(objective, bases, sweeps=4, tolerance=0.0)
        assert float(value_of(objective, found)) <= float(value_of(objective, bases))
        np.testing.assert_allclose(value_of(objective, found), certificate.value, rtol=1e-6)
        assert max(float(orthogonality_error(r)) for r in found.values()) < 1e-6
        assert {k: r.shape for k, r in found.items()} == {k: r.shape for k, r in bases.items()}


def test_where_nothing_improves_the_bases_come_back_unchanged():
    objective = activation_objective()
    found, certificate = pair_search(objective, {"in": jnp.eye(6)}, screen=None)
    assert (np.asarray(found["in"]) == np.eye(6)).all()
    assert certificate.delta <= 1e-4 * certificate.value
    assert "no rotation of two rows improves the objective by more than" in str(certificate)
    assert "15 of 15 in 'in'" in str(certificate)


def test_chunks_of_examples_add_up():
    """The same gains, however the examples are cut (the last chunk is filled up)."""
    objective = jacobian_objective()
    bases = random_bases(objective)
    delta = certify(objective, bases, screen=None).delta
    object.__setattr__(objective, "chunk", 7)
    np.testing.assert_allclose(certify(objective, bases, screen=None).delta, delta, rtol=1e-4)


def test_screening_takes_the_rows_that_are_active_together():
    """Rows 0 and 1 share their pattern, so do 2 and 3."""
    rng = np.random.default_rng(0)
    patterns = np.repeat(rng.random((500, 2)) < 0.3, 2, axis=1)
    x = (rng.standard_normal((500, 4)) * patterns).astype(np.float32)
    bases = {"in": jnp.eye(4)}
    [side], bases = angles_of_pairs.sides(ActivationSparsity(x, measures.Log(0.1)), bases)
    assert angles_of_pairs.gains(side, bases, 1)[0].tolist() == [[0, 1], [2, 3]]
    assert len(angles_of_pairs.gains(side, bases, None)[0]) == len(angles_of_pairs.gains(side, bases, 3)[0]) == 6


def test_held_spaces_are_left_alone():
    objective = jacobian_objective()
    bases = random_bases(objective)
    held = Held(objective, {"in": bases["in"]})
    found, certificate = pair_search(held, {"out": bases["out"]})
    assert set(found) == set(certificate.tested) == {"out"}
    assert float(value_of(held, found)) < float(value_of(held, {"out": bases["out"]}))


def test_what_cannot_be_searched_is_refused():
    objective = activation_objective()
    bases = {"in": jnp.eye(6)}
    with pytest.raises(ValueError, match="WeightedSum"):
        certify(WeightedSum([objective]), bases)
    with pytest.raises(ValueError, match="Hoyer"):
        certify(activation_objective(measure=measures.Hoyer()), bases)
    layer = Dense(np.eye(6, dtype=np.float32), activation="relu")
    tied = JacobianSparsity(layer, np.asarray(objective.x), measures.Log(0.1), space_out="in")
    with pytest.raises(ValueError, match="tied"):
        certify(tied, bases)
    with pytest.raises(ValueError, match="tied"):
        pair_search(tied, bases)


def test_an_interrupted_search_continues_to_the_same_bits(tmp_path, monkeypatch):
    """The first session ends after one sweep."""
    objective = jacobian_objective()
    bases, problem, method = random_bases(objective), Problem(objective), PairSearch(tolerance=0.0)
    search = lambda run: method.run(problem, (bases,), key=jax.random.key(0), run=run)  # noqa: E731
    whole, show = search(Run()), Record.show

    def once(self, *arguments, **shown):
        listening._stop.requested = True
        show(self, *arguments, **shown)

    with monkeypatch.context() as patch, Run(tmp_path).listening() as listening:
        patch.setattr(Record, "show", once)
        stopped = search(listening)
    assert stopped.result is Result.INTERRUPTED and stopped.certificate is None
    assert stopped.value < stopped.start_value
    resumed = search(Run(tmp_path))
    assert resumed.certificate == whole.certificate and resumed.result is Result.ALL_STEPS
    for space, r in whole.bases.items():
        np.testing.assert_array_equal(resumed.bases[space], r)


def test_held_out_examples_decide():
    """What the search gains on its own examples is dropped where it loses on the held-out ones."""
    objective = activation_objective(n=12)
    start = {"in": jnp.eye(6)}
    held_out = objective.on(np.asarray(activation_objective(seed=1, n=400).x))
    solution = minimize(objective, start, method=PairSearch(screen=None), validation=held_out, key=jax.random.key(0))
    assert float(value_of(held_out, solution.bases)) <= float(value_of(held_out, start))
