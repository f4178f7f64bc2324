"""Agreement of restarts, weighted by influence: on restarts made by hand, of which we know what they share."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import rotsparse as rs
from rotsparse._core.orthogonal import haar
from rotsparse.evaluation.agreement import agreements

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def case():
    """A linear layer with singular values from 8 to 1/16, inputs, and a fit of it with two restarts."""
    rng = np.random.default_rng(0)
    layer = rs.Dense(np.diag(2.0 ** -np.arange(-3, 5)).astype(np.float32), activation="identity")
    x = rng.standard_normal((60, 8)).astype(np.float32)
    solution = rs.find_rotations(layer, x, key=KEY, method=rs.Anneal(steps=2), restarts=2, scale_inputs=False)
    return layer, x, solution


def with_candidates(solution, *candidates):
    """The same fit with these rotations of its inputs as the restarts, the first one the best; outputs are neurons."""
    eye = np.eye(8, dtype=np.float32)
    bases = tuple({"in": np.asarray(r, np.float32), "out": eye} for r in candidates)
    values = np.arange(len(bases), dtype=float)
    return dataclasses.replace(solution, bases=bases[0], candidates=bases, candidate_values=values)


def turned(*directions):
    """The neuron basis with these directions replaced by a random basis of their span."""
    r, d = np.eye(8, dtype=np.float32), list(directions)
    r[np.ix_(d, d)] = haar(KEY, len(d))
    return r


def test_directions_are_numbered_in_the_restart_that_was_returned(case):
    """Which need not be the one with the lowest value: a method may choose by more than that."""
    layer, x, solution = case
    made = with_candidates(solution, np.eye(8)[::-1], np.eye(8))
    returned = dataclasses.replace(made, bases=made.candidates[1])
    assert returned.best == 1
    np.testing.assert_array_equal(agreements(layer, x, returned, scale_inputs=False)["in"].order, np.arange(8))


def test_few_directions_that_carry_the_influence(case):
    layer, x, solution = case
    made = with_candidates(solution, np.eye(8)[::-1], turned(2, 3, 4, 5, 6, 7)[[3, 0, 5, 1, 2, 4, 6, 7]])
    found = agreements(layer, x, made, scale_inputs=False)["in"]
    energy = 4.0 ** -np.arange(8)
    np.testing.assert_array_equal(found.order, np.arange(8)[::-1])  # the strongest is the last row
    np.testing.assert_allclose(found.influence, energy / energy.sum(), rtol=1e-5)
    np.testing.assert_array_equal(found.again, [True, True] + 6 * [False])
    assert found.carried == pytest.approx(energy[:2].sum() / energy.sum(), rel=1e-5)
    assert found.sentence() == (
        "2 of 8 input directions are found again by every start (|cos| > 0.99); they carry 94% of the influence."
    )
    assert agreements(layer, x, made, scale_inputs=False)["out"].carried == pytest.approx(1)
    json.dumps(found.to_json())


def test_a_subspace_agrees_where_its_directions_do_not(case):
    _, x, solution = case
    equal = rs.Dense(np.diag([4, 4, 1, 1, 1, 1, 1, 1]).astype(np.float32), activation="identity")
    mixed = turned(0, 1)
    found = agreements(equal, x, with_candidates(solution, np.eye(8), mixed), scale_inputs=False)["in"]
    one, two, five = found.blocks
    assert (one.size, two.size, five.size) == (1, 2, 5)
    assert two.cosine == pytest.approx(1) and two.chance == 0.25
    assert two.influence == pytest.approx(32 / 38, rel=1e-5)
    assert not found.again[:2].any() and found.again[2:].all()
    assert one.cosine == pytest.approx(np.max(np.square(mixed[:2, 0])), rel=1e-4)
    assert "2 strongest span nearly the same subspace" in found.sentence() and "carry 84%." in found.sentence()


def test_the_restart_that_agrees_least_counts(case):
    layer, x, solution = case
    three = with_candidates(solution, np.eye(8), np.eye(8), turned(0, 1, 2))
    found = agreements(layer, x, three, scale_inputs=False)["in"]
    np.testing.assert_array_equal(found.again, 3 * [False] + 5 * [True])
    assert found.blocks[0].cosine < 0.99


def test_random_restarts_agree_as_chance_has_it(case):
    _, x, solution = case
    flat = rs.Dense(np.eye(8, dtype=np.float32), activation="identity")
    cosines = []
    for i in range(40):
        two = with_candidates(solution, *(haar(jax.random.key(2 * i + j), 8) for j in (1, 2)))
        found = agreements(flat, x, two, scale_inputs=False)["in"]
        cosines.append([block.cosine - block.chance for block in found.blocks])
        assert "None of 8 input directions is found again" in found.sentence()
    np.testing.assert_allclose(np.mean(cosines, axis=0), 0, atol=0.06)


def test_inputs_are_scaled_as_in_the_metrics(case):
    layer, x, solution = case
    made = with_candidates(solution, np.eye(8), np.eye(8))
    sigma = np.diag(4.0 ** np.arange(8))  # undoes the singular values
    found = agreements(layer, x, made, covariance=sigma)
    for side in found.values():
        np.testing.assert_allclose(side.influence, 1 / 8, rtol=1e-5)


def test_of_what_is_held_or_has_one_start_nothing_is_said(case):
    layer, x, _ = case
    one = rs.find_rotations(layer, x, key=KEY, method=rs.Anneal(steps=2))
    assert agreements(layer, x, one) == {}
    held = rs.find_rotations(layer, x, key=KEY, method=rs.Anneal(steps=2), restarts=2, hold=("out",))
    assert list(agreements(layer, x, held)) == ["in"]
    tied = rs.find_rotations(layer, x, key=KEY, method=rs.Anneal(steps=2), restarts=2, tie=True)
    found = agreements(layer, x, tied)
    assert list(found) == ["in"] and found["in"].influence.sum() == pytest.approx(1)
