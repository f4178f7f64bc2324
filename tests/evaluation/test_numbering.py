"""One number and one sign for every direction."""

import jax
import numpy as np
import pytest

import rotsparse as rs
from rotsparse.evaluation.agreement import agreements
from rotsparse.evaluation.numbering import influences, numbered, numbered_rotations, reordered


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    w_in, w_out = (rng.standard_normal(shape).astype(np.float32) for shape in ((12, 8), (6, 12)))
    layer = rs.MLP(w_in, None, w_out, activation="gelu")
    return layer, rng.gamma(1.0, size=(300, 8)).astype(np.float32)


def bases(r):
    return {"in": np.asarray(r.r_in), "out": np.asarray(r.r_out)}


UNITS = {"scale_inputs": True}


def test_order_and_signs_are_those_of_the_rule_whatever_they_were(case):
    layer, x = case
    r = rs.Rotations.haar(jax.random.key(0), 8, 6)
    first = numbered_rotations(layer, x, r, **UNITS)
    for of in influences(layer, x, bases(first), UNITS).values():
        assert (np.diff(of) <= 1e-9).all() and of.sum() == pytest.approx(1)
    z_in, z_out = first.apply_in(x), first.apply_out(np.asarray(layer(x)))
    for z in (z_in, z_out):
        assert (((z - z.mean(axis=0)) ** 3).mean(axis=0) > 0).all()
    rng = np.random.default_rng(1)
    shuffled = (reordered(m, rng.permutation(len(m)), rng.choice([-1.0, 1.0], len(m))) for m in (r.r_in, r.r_out))
    again = numbered_rotations(layer, x, rs.Rotations(*shuffled), **UNITS)
    np.testing.assert_array_equal(again.r_in, first.r_in)
    np.testing.assert_array_equal(again.r_out, first.r_out)


def test_a_symmetric_direction_takes_the_sign_of_its_largest_entry(case):
    layer, _ = case
    x = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    x = np.concatenate([x, -x])
    r = numbered_rotations(layer, x, rs.Rotations(-np.eye(8, dtype=np.float32), np.eye(6, dtype=np.float32)), **UNITS)
    assert (r.r_in.max(axis=1) == 1).all()


@pytest.mark.parametrize("options", [{}, {"hold": ("out",)}, {"active_subspace": 0.9}], ids=str)
def test_a_solution_is_the_same_fit_with_other_numbers(case, options):
    layer, x = case
    method = rs.Anneal(steps=5)
    solution = rs.find_rotations(layer, x, key=jax.random.key(0), method=method, restarts=2, **options)
    new = numbered(layer, x, solution, **UNITS)
    assert new.best == solution.best and new.value == solution.value
    for space in ("in", "out"):
        before, after = np.asarray(solution.bases[space]), new.bases[space]
        np.testing.assert_allclose(np.abs(after @ before.T).max(axis=1), 1, atol=1e-5)
        if space in options.get("hold", ()):
            np.testing.assert_array_equal(after, before)
    found, known = (agreements(layer, x, s) for s in (new, solution))
    for space, of in found.items():
        np.testing.assert_allclose(np.sort(of.order), np.flatnonzero(new.free[space]))
        assert (np.diff(of.order) > 0).all(), "directions are numbered by influence"
        np.testing.assert_allclose(of.cosines, known[space].cosines, atol=1e-5)
        np.testing.assert_allclose(of.influence, known[space].influence, atol=1e-6)
