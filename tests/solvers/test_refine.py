"""Refinement: pairs that annealing left mixed are found, polishing that harms is dropped, and where pairs gain nothing
it stops after one look."""

import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import random_orthogonal
from planted_bases import hidden_block
from rotsparse.engine.method import Method
from rotsparse.fit.minimize import minimize
from rotsparse.layers.mlp import Dense
from rotsparse.objectives import ActivationSparsity, Held, JacobianSparsity
from rotsparse.objectives.base import thinned
from rotsparse.objectives.measures import Log, TopK
from rotsparse.solvers import Anneal, PairSearch, Refine, Then
from rotsparse.solvers._pair_angles import row_entries

D = 12


def sparse_block(rng, turn=None, examples=200):
    """Every neuron has two inputs and two outputs; `turn` mixes the inputs."""
    turn = np.eye(D, dtype=np.float32) if turn is None else turn
    signs = lambda: rng.choice([-1, 1], 2)  # noqa: E731
    layer = hidden_block(rng, turn, np.eye(D), hidden=2 * D, values=signs, activation="gelu")
    return JacobianSparsity(layer, rng.standard_normal((examples, D)).astype(np.float32), Log(0.1), scale_inputs=False)


def identity():
    return {"in": jnp.eye(D), "out": jnp.eye(D)}


def turned_by(angle, pairs):
    turn = np.eye(D, dtype=np.float32)
    for i, j in pairs:
        turn[np.ix_([i, j], [i, j])] = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    return turn


class Polish(Method):
    """Whatever a function does to the bases."""

    function: Callable = eqx.field(static=True)

    def run(self, problem, starts, *, key, run):
        found = minimize(problem.objective, starts[0], method=PairSearch(sweeps=1), key=key)
        bases = self.function(starts[0])
        return dataclasses.replace(found, bases=bases, candidates=(bases,))


def refine(objective, bases, function=lambda bases: bases, **options):
    return minimize(objective, bases, method=Refine(Polish(function), **options), key=jax.random.key(0))


def test_mixed_pairs_are_found_without_any_polish(rng):
    turn = turned_by(0.7, [(0, 1), (4, 9)])
    objective = sparse_block(rng, turn)
    truth = {"in": jnp.asarray(turn), "out": jnp.eye(D)}
    refined = refine(objective, identity())
    assert refined.certificate.value <= float(objective.value(truth)) * (1 + 1e-4)
    assert refined.value < 0.99 * refined.start_value and "at first" in refined.stages[0].remark
    assert refined.certificate.value == pytest.approx(float(objective.value(refined.bases)), rel=1e-5)


def test_a_polish_that_harms_is_dropped(rng):
    objective = sparse_block(rng, turned_by(0.7, [(0, 1)]))
    harmful = random_orthogonal(rng, D).astype(np.float32)
    refined = refine(objective, identity(), lambda bases: bases | {"out": jnp.asarray(harmful)}, screen=None)
    assert refined.certificate.value < float(objective.value(identity()))


def test_where_pairs_gain_nothing_nothing_is_polished(rng):
    def polish(bases):
        raise AssertionError("a polish after a first look that gained nothing")

    objective = sparse_block(rng)
    found = minimize(objective, identity(), method=PairSearch(), key=jax.random.key(0)).bases
    assert "hardly anything" in refine(objective, found, polish).stages[0].remark


def test_a_search_on_few_examples_never_makes_all_of_them_worse(rng):
    objective = sparse_block(rng, turned_by(0.7, [(0, 1)]))
    start = float(objective.value(identity()))
    for entries in (D, 3 * D):  # one example, and three
        assert refine(objective, identity(), entries=entries).certificate.value <= start


def test_the_final_search_sees_four_times_as_many_examples_and_is_certified_on_these(rng):
    objective = sparse_block(rng, turned_by(0.7, [(0, 1), (4, 9)]))
    refined = refine(objective, identity(), entries=10 * D)
    assert "at first" in refined.stages[0].remark
    on_these = float(thinned(objective, 40).value(refined.bases))
    assert refined.certificate.value == pytest.approx(on_these, rel=1e-5)
    assert refined.certificate.value != pytest.approx(float(objective.value(refined.bases)), rel=1e-3)


def test_as_a_later_stage_it_is_skipped_where_pairs_cannot_be_searched(rng):
    x = rng.standard_normal((50, D)).astype(np.float32)
    after = lambda objective, **options: minimize(  # noqa: E731
        objective, method=Then(Anneal(steps=5), Refine(Anneal(steps=5), **options)), key=jax.random.key(0)
    )
    assert [stage.name for stage in after(ActivationSparsity(x, TopK(0.5))).stages] == ["Anneal"]
    assert [stage.name for stage in after(sparse_block(rng), largest=D * D - 1).stages] == ["Anneal"]
    assert [stage.name for stage in after(sparse_block(rng), largest=D * D).stages] == ["Anneal", "Refine"]
    with pytest.raises(ValueError, match="TopK"):
        refine(ActivationSparsity(x, TopK(0.5)), {"in": jnp.eye(D)})


def test_entries_of_a_row_are_those_of_the_shorter_side(rng):
    layer = Dense(rng.standard_normal((3, 5)).astype(np.float32), activation="relu")
    objective = JacobianSparsity(layer, rng.standard_normal((9, 5)).astype(np.float32), Log(0.1))
    assert row_entries(objective) == row_entries(Held(objective, {"in": jnp.eye(5)})) == 3
    assert row_entries(ActivationSparsity(rng.standard_normal((9, 5)).astype(np.float32), Log(0.1))) == 1
