"""Null models change what they should and nothing else; the verdict follows from the data."""

import jax
import numpy as np
import pytest

import rotsparse as rs
from rotsparse._core.intervals import Interval
from rotsparse.evaluation.control import Control, another_redraw
from rotsparse.evaluation.finite_effects import finite_effects
from rotsparse.evaluation.nulls import (
    random_perturbation,
    random_weights,
    rate_matched,
    re_paired,
    same_spectrum,
    shuffled_inputs,
    shuffled_weights,
)
from rotsparse.evaluation.verdict import EDGES, SHARE, Structure, structure


@pytest.mark.parametrize("kind", ["mlp", "dense", "gated"])
def test_random_weights_keep_shape_scale_and_biases(kind, rng):
    w = lambda *s: (0.3 * rng.standard_normal(s)).astype(np.float32)  # noqa: E731
    layer = {
        "mlp": lambda: rs.MLP(w(80, 40), w(80), w(40, 80), w(40), skip=True),
        "dense": lambda: rs.Dense(w(80, 40), w(80)),
        "gated": lambda: rs.GatedMLP(w(80, 40), w(80, 40), w(40, 80), b_gate=w(80)),
    }[kind]()
    null = random_weights(layer, key=jax.random.key(0))
    for name in layer.__dataclass_fields__:
        before, after = getattr(layer, name), getattr(null, name)
        if name not in layer.weights() or before.ndim == 1:
            assert before is after
            continue
        assert before.shape == after.shape and before.dtype == after.dtype
        assert np.sqrt(np.mean(np.square(after))) == pytest.approx(np.sqrt(np.mean(np.square(before))), rel=0.05)
        assert abs(np.corrcoef(before.ravel(), np.asarray(after).ravel())[0, 1]) < 0.1


def blocks(rng):
    w = lambda *s: (0.3 * rng.standard_normal(s)).astype(np.float32)  # noqa: E731
    return {
        "mlp": rs.MLP(w(30, 8), w(30), w(6, 30), w(6), norm=rs.rms_norm(np.ones(8, np.float32), 1e-6)),
        "dense": rs.Dense(w(12, 8)),
        "gated": rs.GatedMLP(w(30, 8), w(30, 8), w(6, 30)),
    }


RATED = {"rates matched": rate_matched, "weights shuffled": shuffled_weights}


@pytest.mark.parametrize("null_of", RATED.values(), ids=RATED)
@pytest.mark.parametrize("kind", ["mlp", "dense", "gated"])
def test_nulls_keep_how_often_each_neuron_is_active(kind, null_of, rng):
    layer, x = blocks(rng)[kind], rng.standard_normal((400, 8)).astype(np.float32) + 0.5
    null = null_of(layer, x, key=jax.random.key(0))
    w, b = {"mlp": ("w_in", "b_in"), "dense": ("w", "b"), "gated": ("w_gate", "b_gate")}[kind]
    normed = x if layer.norm is None else np.asarray(layer.norm(x))

    def rates(of):
        bias = 0 if getattr(of, b) is None else np.asarray(getattr(of, b))
        return (normed @ np.asarray(getattr(of, w)).T + bias > 0).mean(axis=0)

    np.testing.assert_allclose(rates(null), rates(layer), atol=1.5 / len(x))
    assert not np.allclose(rates(random_weights(layer, key=jax.random.key(0))), rates(layer), atol=0.05)
    assert getattr(null, b).dtype == np.float32


@pytest.mark.parametrize("kind", ["mlp", "dense", "gated"])
def test_shuffled_weights_keep_the_values_of_every_neuron(kind, rng):
    layer, x = blocks(rng)[kind], rng.standard_normal((100, 8)).astype(np.float32)
    null = shuffled_weights(layer, x, key=jax.random.key(0))
    for name, w in layer.weights().items():
        if w.ndim == 2:
            own, shuffled = ((m.T if name in ("w_out", "w_down") else m) for m in (w, null.weights()[name]))
            np.testing.assert_array_equal(np.sort(own, axis=1), np.sort(shuffled, axis=1))
            assert np.mean(own == shuffled) < 0.4


@pytest.mark.parametrize("kind", ["mlp", "dense", "gated"])
def test_same_spectrum_keeps_singular_values_and_loses_the_vectors(kind, rng):
    layer = blocks(rng)[kind]
    null = same_spectrum(layer, key=jax.random.key(0))
    for name, w in layer.weights().items():
        after = null.weights()[name]
        if w.ndim == 1:
            assert after is w
            continue
        singular = [np.linalg.svd(of, compute_uv=False) for of in (w, after)]
        np.testing.assert_allclose(*singular, rtol=1e-4)
        assert abs(np.corrcoef(np.ravel(w), np.ravel(after))[0, 1]) < 0.3


def test_re_paired_changes_only_which_neuron_feeds_which_output(rng):
    for kind, name in (("mlp", "w_out"), ("gated", "w_down")):
        layer = blocks(rng)[kind]
        null = re_paired(layer, key=jax.random.key(0))
        assert all(null.weights()[k] is w for k, w in layer.weights().items() if k != name)
        before, after = layer.weights()[name], null.weights()[name]
        assert not np.array_equal(before, after)
        np.testing.assert_array_equal(np.sort(np.asarray(before), axis=1), np.sort(np.asarray(after), axis=1))
        assert {tuple(column) for column in np.asarray(before).T} == {tuple(column) for column in np.asarray(after).T}
    with pytest.raises(ValueError, match="Dense has no output matrix"):
        re_paired(blocks(rng)["dense"], key=jax.random.key(0))


@pytest.mark.parametrize("null", [random_weights, same_spectrum])
def test_layers_without_weights_have_no_null(null):
    with pytest.raises(ValueError, match="got FunctionLayer"):
        null(rs.FunctionLayer(lambda x: x, 3, 3), key=jax.random.key(0))


def test_shuffled_inputs_keep_marginals_and_lose_correlation(rng):
    x = (rng.standard_normal((2000, 1)) + 0.1 * rng.standard_normal((2000, 5))).astype(np.float32)
    shuffled = np.asarray(shuffled_inputs(x, key=jax.random.key(0)))
    np.testing.assert_array_equal(np.sort(shuffled, axis=0), np.sort(x, axis=0))
    correlation = np.corrcoef(shuffled.T) - np.eye(5)
    assert np.corrcoef(x.T).min() > 0.9
    assert np.abs(correlation).max() < 0.1


def test_random_perturbation_has_the_same_size_and_another_direction(rng):
    x, replaced = rng.standard_normal((2, 500, 20)).astype(np.float32)
    moved = np.asarray(random_perturbation(x, replaced, key=jax.random.key(0))) - x
    asked = replaced - x
    np.testing.assert_allclose(np.linalg.norm(moved, axis=1), np.linalg.norm(asked, axis=1), rtol=1e-4)
    cosine = (moved * asked).sum(axis=1) / np.square(asked).sum(axis=1)
    assert abs(cosine.mean()) < 0.05


def test_finite_effects_of_a_diagonal_layer_are_diagonal(rng):
    truth = rs.Rotations.haar(jax.random.key(1), 5, 5)
    layer = rs.MLP(np.asarray(truth.r_in), None, np.asarray(truth.r_out).T, activation="tanh")
    x = rng.standard_normal((1500, 5)).astype(np.float32)  # more than one chunk
    effects = finite_effects(layer, x, truth)
    np.testing.assert_array_equal(effects[~np.eye(5, dtype=bool)], 0)
    assert np.diagonal(effects).min() > 0.9
    mixed = finite_effects(layer, x, rs.Rotations.haar(jax.random.key(2), 5, 5))
    assert mixed.sum(axis=0).mean() > 3


def test_rounding_errors_are_no_effects(rng):
    """Two of six outputs never vary: nothing moves them, in their own basis."""
    w_out = rng.standard_normal((6, 4)) @ rng.standard_normal((4, 10))
    layer = rs.MLP(rng.standard_normal((10, 5)).astype(np.float32), None, w_out.astype(np.float32))
    x = rng.standard_normal((200, 5)).astype(np.float32)
    directions = np.linalg.svd(w_out)[0].T.astype(np.float32)
    effects = finite_effects(layer, x, rs.Rotations(np.eye(5, dtype=np.float32), directions))
    assert effects[:4].max() > 0.5
    np.testing.assert_array_equal(effects[4:], 0)


def test_finite_effects_count_by_the_definition(rng):
    layer = rs.Dense(rng.standard_normal((3, 4)).astype(np.float32), activation="relu")
    x = rng.standard_normal((50, 4)).astype(np.float32)
    rotations = rs.Rotations.haar(jax.random.key(3), 4, 3)
    r_in, r_out = np.asarray(rotations.r_in), np.asarray(rotations.r_out)
    y = np.asarray(layer(x)) @ r_out.T
    expected = np.zeros((3, 4))
    for i, sd in enumerate((x @ r_in.T).std(axis=0)):
        for sign in (1, -1):
            moved = np.asarray(layer(x + sign * 0.5 * sd * r_in[i])) @ r_out.T
            expected[:, i] += (np.abs(moved - y) > 0.2 * y.std(axis=0)).mean(axis=0) / 2
    np.testing.assert_allclose(finite_effects(layer, x, rotations, size=0.5, threshold=0.2), expected, atol=0.011)


def against(learned, *draws) -> Structure:
    """A share of small entries against those of draws of one null."""
    metrics = [{SHARE: Interval(*of), EDGES: Interval(100, 99, 101)} for of in (learned, *draws)]
    return structure(Control(metrics[0], {"random weights": tuple(metrics[1:])}))


@pytest.mark.parametrize(
    ("learned", "control", "is_structure"),
    [
        ((0.20, 0.19, 0.21), (0.16, 0.15, 0.17), True),
        ((0.20, 0.16, 0.24), (0.16, 0.15, 0.17), False),  # not sure
        ((0.150, 0.149, 0.151), (0.145, 0.144, 0.146), False),  # sure, but next to nothing
        ((0.98, 0.979, 0.981), (0.95, 0.949, 0.951), True),  # near one, where factors of shares say nothing
        ((0.76, 0.75, 0.77), (0.88, 0.87, 0.89), False),
    ],
)
def test_structure_is_more_than_the_control_and_worth_the_name(learned, control, is_structure):
    found = against(learned, control)
    assert found.learned == is_structure
    assert ("the only one tried" if is_structure else "No sparse basis here beyond chance") in found.headline()


def test_redraws_that_differ_say_less_than_their_examples():
    """Three controls with narrow intervals around 0.17, 0.21 and 0.18: a fourth at 0.24 would be no surprise."""
    controls = [Interval(v, v - 0.003, v + 0.003) for v in (0.17, 0.21, 0.18)]
    null = another_redraw(controls)
    values = np.array([0.17, 0.21, 0.18])
    assert null.value == pytest.approx(values.mean())
    logits = np.log(values / (1 - values))
    high = logits.mean() + 4.3027 * logits.std(ddof=1) * np.sqrt(4 / 3)
    assert null.high == pytest.approx(1 / (1 + np.exp(-high)), rel=1e-4)
    assert not against((0.24, 0.237, 0.243), *controls).learned
    assert against((0.24, 0.237, 0.243), controls[0]).learned  # one redraw cannot know
    assert another_redraw(controls[:1]) == controls[0]
    same = [Interval(0.2, 0.15, 0.25)] * 3
    assert another_redraw(same) == pytest.approx(same[0])
