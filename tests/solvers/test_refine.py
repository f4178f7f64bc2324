"""Refinement: pairs that annealing left mixed are found, polishing that harms is dropped, and where pairs gain nothing
it stops after one look."""

import jax.numpy as jnp
import numpy as np
import pytest

from rotsparse.layers.mlp import MLP
from rotsparse.objectives import ActivationSparsity, Held, JacobianSparsity
from rotsparse.objectives.measures import Log
from rotsparse.solvers.pair_search import pair_search, row_entries
from rotsparse.solvers.refine import refine

D = 12


def sparse_block(rng, turn=None, examples=200):
    """Every neuron has two inputs and two outputs; `turn` mixes the inputs."""
    w_in, w_out = np.zeros((2 * D, D), np.float32), np.zeros((D, 2 * D), np.float32)
    for neuron in range(2 * D):
        w_in[neuron, rng.choice(D, 2, replace=False)] = rng.choice([-1, 1], 2)
        w_out[rng.choice(D, 2, replace=False), neuron] = rng.choice([-1, 1], 2)
    layer = MLP(w_in if turn is None else w_in @ turn, None, w_out, activation="gelu")
    return JacobianSparsity(layer, rng.standard_normal((examples, D)).astype(np.float32), Log(0.1), scale_inputs=False)


def identity():
    return {"in": jnp.eye(D), "out": jnp.eye(D)}


def turned_by(angle, pairs):
    turn = np.eye(D, dtype=np.float32)
    for i, j in pairs:
        turn[np.ix_([i, j], [i, j])] = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    return turn


def test_mixed_pairs_are_found_without_any_polish(rng):
    turn = turned_by(0.7, [(0, 1), (4, 9)])
    objective = sparse_block(rng, turn)
    truth = {"in": jnp.asarray(turn), "out": jnp.eye(D)}
    refined = refine(objective, identity(), lambda bases: bases)
    assert refined.certificate.value <= float(objective.value(truth)) * (1 + 1e-4)
    assert refined.gain >= refined.first_gain * 0.9 > 0.01 and "at first" in str(refined)
    assert refined.certificate.value == pytest.approx(float(objective.value(refined.bases)), rel=1e-5)


def test_a_polish_that_harms_is_dropped(rng):
    objective = sparse_block(rng, turned_by(0.7, [(0, 1)]))
    harmful = np.linalg.qr(rng.standard_normal((D, D)))[0].astype(np.float32)
    refined = refine(objective, identity(), lambda bases: bases | {"out": jnp.asarray(harmful)}, screen=None)
    assert refined.certificate.value < float(objective.value(identity()))


def test_where_pairs_gain_nothing_nothing_is_polished(rng):
    def polish(bases):
        raise AssertionError("a polish after a first look that gained nothing")

    objective = sparse_block(rng)
    found, _ = pair_search(objective, identity())
    refined = refine(objective, found, polish)
    assert refined.first_gain < 2e-3 and "hardly anything" in str(refined)


def test_a_search_on_few_examples_never_makes_all_of_them_worse(rng):
    objective = sparse_block(rng, turned_by(0.7, [(0, 1)]))
    start = float(objective.value(identity()))
    for examples in (1, 3):
        assert refine(objective, identity(), lambda bases: bases, examples=examples).certificate.value <= start


def test_entries_of_a_row_are_those_of_the_shorter_side(rng):
    layer = MLP(rng.standard_normal((3, 5)).astype(np.float32), activation="relu")
    objective = JacobianSparsity(layer, rng.standard_normal((9, 5)).astype(np.float32), Log(0.1))
    assert row_entries(objective) == row_entries(Held(objective, {"in": jnp.eye(5)})) == 3
    assert row_entries(ActivationSparsity(rng.standard_normal((9, 5)).astype(np.float32), Log(0.1))) == 1
