"""Edge ablation: exact where nothing is cut, and it counts what was planted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rotsparse as rs
from rotsparse.evaluation.ablation import EdgeAblation, accuracy, fewest, log_likelihood


@pytest.fixture
def block(rng):
    """An MLP block 6-12-5 with inputs, and rotations of both sides."""
    w_in, w_out = rng.standard_normal((12, 6)), rng.standard_normal((5, 12))
    layer = rs.MLP(w_in.astype(np.float32), None, w_out.astype(np.float32), activation="gelu")
    x = rng.standard_normal((300, 6)).astype(np.float32)
    return layer, x, rs.Rotations.haar(jax.random.key(0), 6, 5)


def planted(rng, d=6):
    """A stage that is diagonal in a hidden basis, and the basis: `y = R_outᵀ tanh(S R_in x)`, S diagonal."""
    truth = rs.Rotations.haar(jax.random.key(1), d, d)
    scale = np.linspace(1, 2, d, dtype=np.float32)[:, None]
    layer = rs.MLP(scale * np.asarray(truth.r_in), None, np.asarray(truth.r_out).T, activation="tanh")
    return layer, rng.standard_normal((1000, d)).astype(np.float32), truth


def test_all_edges_leave_the_function_as_it_is(block):
    layer, x, rotations = block
    ablation = EdgeAblation(layer, x, rotations)
    np.testing.assert_allclose(ablation.outputs(x, ablation.edges), layer(x), atol=2e-5)


def test_one_example_is_enough_to_ablate(block):
    layer, x, rotations = block
    ablation = EdgeAblation(layer, x, rotations)
    np.testing.assert_allclose(ablation.outputs(x[:1], 20), ablation.outputs(x, 20)[:1], atol=2e-5)


def test_no_edges_leave_the_output_at_the_mean_input(block):
    layer, x, rotations = block
    expected = np.broadcast_to(layer(x.mean(axis=0)[None]), (len(x), 5))
    np.testing.assert_allclose(EdgeAblation(layer, x, rotations).outputs(x, 0), expected, atol=2e-5)


@given(seed=st.integers(0, 2**31), kept=st.integers(0, 30))
def test_outputs_are_those_of_the_definition(seed, kept):
    """One output and one example at a time, in plain NumPy."""
    rng = np.random.default_rng(seed)
    w, b = rng.standard_normal((5, 6)).astype(np.float32), rng.standard_normal(5).astype(np.float32)
    layer, x = rs.Dense(w, b, activation="tanh"), rng.standard_normal((9, 6)).astype(np.float32)
    rotations = rs.Rotations.haar(jax.random.key(seed % 1000), 6, 5)
    ablation = EdgeAblation(layer, x, rotations)
    mask = ablation.mask(kept)
    r_in, r_out = (np.asarray(r, np.float64) for r in (rotations.r_in, rotations.r_out))
    z = x @ r_in.T
    seen = [np.where(m, z, z.mean(0)) @ r_in for m in mask]
    expected = np.stack([np.tanh(s @ w.T + b) @ r for s, r in zip(seen, r_out, strict=True)], 1)
    np.testing.assert_allclose(ablation.outputs(x, kept), expected @ r_out, atol=2e-5)
    assert mask.sum() == kept
    assert kept in (0, 30) or ablation.importance[mask].min() >= ablation.importance[~mask].max()


def test_importance_is_the_mean_squared_jacobian_times_the_variance(block):
    layer, x, rotations = block
    z = np.asarray(layer.jacobian(x, rotations.r_in, rotations.r_out), np.float64)
    expected = np.square(z).mean(axis=0) * (x @ np.asarray(rotations.r_in).T).var(axis=0)
    np.testing.assert_allclose(EdgeAblation(layer, x, rotations).importance, expected, rtol=1e-4)


def test_a_reader_discounts_outputs_that_it_does_not_read(block):
    layer, x, rotations = block
    reader = 3 * np.asarray(rotations.r_out)[1:2]  # reads rotated output 1, and nothing else
    weighted = EdgeAblation(layer, x, rotations, reader=reader).importance
    plain = EdgeAblation(layer, x, rotations).importance
    np.testing.assert_allclose(weighted[1], 9 * plain[1], rtol=1e-4)
    np.testing.assert_allclose(np.delete(weighted, 1, axis=0), 0, atol=1e-8)


def test_a_diagonal_network_needs_as_many_edges_as_it_has_directions(rng):
    layer, x, truth = planted(rng)
    outputs = layer(x) @ truth.r_out.T
    score = accuracy(lambda y: y @ truth.r_out.T, np.argmax(outputs, axis=1))
    assert EdgeAblation(layer, x, truth).fewest(x, score, tolerance=0.001) == 6
    assert EdgeAblation(layer, x, rs.Rotations.haar(jax.random.key(5), 6, 6)).fewest(x, score, 0.001) > 20


def test_copies_share_one_rotation_and_one_mask(rng):
    """Two copies of an input, each seen through the same planted diagonal: still d edges, not 2d."""
    layer, _, truth = planted(rng)
    w = np.asarray(layer.w_in)
    double = rs.MLP(np.concatenate([w, 2 * w], axis=1), None, layer.w_out, activation="tanh")
    x = rng.standard_normal((500, 12)).astype(np.float32)
    ablation = EdgeAblation(double, x, truth, copies=2)
    assert ablation.edges == 36
    np.testing.assert_allclose(ablation.outputs(x, 6), double(x), atol=2e-5)
    np.testing.assert_array_equal(ablation.mask(6), np.eye(6, dtype=bool))


@given(threshold=st.integers(0, 500), most=st.integers(500, 2000))
def test_bisection_equals_brute_force(threshold, most):
    calls = []
    assert fewest(lambda k: calls.append(k) or k >= threshold, most) == threshold
    assert len(calls) <= 25
    assert len(set(calls)) == len(calls)


@given(st.integers(0, 300), st.integers(1, 300), st.integers(0, 400))
def test_fewest_finds_the_same_from_any_guess(threshold, most, guess):
    threshold = min(threshold, most)
    assert fewest(lambda k: k >= threshold, most, near=guess) == threshold


def test_fewest_equals_brute_force_on_a_small_layer(block):
    layer, x, rotations = block
    ablation = EdgeAblation(layer, x, rotations)
    score = log_likelihood(lambda y: y, np.argmax(layer(x), axis=1))
    curve = ablation.curve(x, score, range(ablation.edges + 1))
    enough = curve >= curve[-1] - 0.2
    # The definition of bisection's answer: enough here, not enough one below, and right where the curve is monotone.
    found = ablation.fewest(x, score, 0.2)
    assert enough[found] and not enough[found - 1]
    if np.all(np.diff(enough.astype(int)) >= 0):
        assert found == int(np.argmax(enough))


def test_scores():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]))
    assert accuracy(lambda y: y, np.array([0, 2]))(logits) == 0.5
    expected = (np.log(0.5) + np.log(0.1)) / 2
    assert log_likelihood(lambda y: y, np.array([0, 2]))(logits) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="2 outputs for 3 labels"):
        accuracy(lambda y: y, np.array([0, 1, 2]))(logits)


def test_bad_input(block, untyped):
    layer, x, rotations = block
    with pytest.raises(ValueError, match="widths 6 and 5, expected 6/2"):
        EdgeAblation(layer, x, rotations, copies=2)
    with pytest.raises(ValueError, match="reader should have shape"):
        EdgeAblation(layer, x, rotations, reader=np.ones((3, 4), np.float32))
    ablation = EdgeAblation(layer, x, rotations)
    with pytest.raises(ValueError, match="from 0 to 30, got 31"):
        ablation.outputs(x, 31)
    with pytest.raises(ValueError, match="tolerance"):
        ablation.fewest(x, lambda y: 0.0, -0.1)
