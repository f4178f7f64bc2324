"""Metrics against plain NumPy on the dense Jacobians, at their extremes, and as statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from helpers import SHARED
from rotsparse._core.intervals import Interval, bootstrap_counts, bootstrap_interval
from rotsparse.data import moments
from rotsparse.evaluation import baselines
from rotsparse.evaluation.concentration import without_top
from rotsparse.evaluation.curves import THRESHOLDS
from rotsparse.evaluation.metrics import evaluate, examine
from rotsparse.evaluation.names import HIGHER_IS_SPARSER
from rotsparse.layers.jacobians import jacobians
from rotsparse.layers.mlp import MLP, Dense
from rotsparse.layers.rotations import Rotations

KEY = jax.random.key(0)
NAMES = [name for name in HIGHER_IS_SPARSER if name != "gap_closed"]


@pytest.fixture
def layer(rng):
    w_in, w_out = rng.standard_normal((9, 6)), rng.standard_normal((5, 9))
    return MLP(w_in.astype(np.float32), rng.standard_normal(9).astype(np.float32), w_out.astype(np.float32))


@pytest.fixture
def x(rng):
    return (rng.standard_normal((80, 6)) * [3, 1, 1, 1, 1, 0.1]).astype(np.float32)


def linear(w):
    """A layer with the same Jacobian `w` for every example."""
    return Dense(np.asarray(w, np.float32), activation="identity")


def constant_jacobian(w, **options):
    """Values of the metrics of a single Jacobian."""
    x = np.eye(w.shape[1], dtype=np.float32)
    r = Rotations.identity(w.shape[1], w.shape[0])
    found = evaluate(linear(w), np.concatenate([x, -x]), r, scale_inputs=False, key=KEY, **options)
    return {name: m.value for name, m in found.items()}


def dense_edges(mean_square, share=0.99):
    """The fewest of these that hold a share of their sum."""
    ordered = sorted(np.ravel(mean_square), reverse=True)
    k = 1
    while sum(ordered[:k]) < share * sum(ordered):
        k += 1
    return k


def dense_small(z):
    return np.mean(z < 0.1 * np.sqrt(np.mean(z**2)))


def dense_without_top(z):
    """All but one row and one column of a matrix of up to a hundred: first the one that holds most of all, then the one
    of the other side that holds most of what is left."""
    for axis in (1, 2) if (z**2).sum((0, 1)).max() > (z**2).sum((0, 2)).max() else (2, 1):
        z = np.delete(z, np.argmax((z**2).sum((0, axis))), axis=3 - axis)
    return z


def dense_metrics(z):
    """The definitions, one example at a time, in float64."""
    z = np.abs(np.asarray(z, np.float64))
    rows, columns, rest = z.swapaxes(0, 1), z.transpose(2, 0, 1), dense_without_top(z)
    result = {
        "small_by_row": np.mean([dense_small(row) for row in rows]),
        "small_by_column": np.mean([dense_small(column) for column in columns]),
        "small_without_top": dense_small(rest),
        "edges_99_by_row": sum(dense_edges(np.mean(row**2, axis=0)) for row in rows),
        "edges_99_by_column": sum(dense_edges(np.mean(column**2, axis=0)) for column in columns),
        "edges_99_without_top": dense_edges(np.mean(rest**2, axis=0)),
    }
    z = z.reshape(len(z), -1)
    n = z.shape[1]
    result["fraction_below_0.1_rms"] = dense_small(z)
    for share in (90, 99):
        result[f"edges_{share}"] = dense_edges(np.mean(z**2, axis=0), share / 100)
    z = z[z.any(axis=1)]
    result["hoyer"] = np.mean([(n**0.5 - e.sum() / np.linalg.norm(e)) / (n**0.5 - 1) for e in z])
    result["gini"] = np.mean([np.abs(e[:, None] - e).sum() / (2 * n * e.sum()) for e in z])
    result["participation_ratio"] = np.mean([(e**2).sum() ** 2 / (e**4).sum() for e in z])
    for percent in (1, 5):
        k = int(np.ceil(percent / 100 * n))
        result[f"top_{percent}_percent_energy"] = np.mean([np.sum(sorted(e**2)[-k:]) / (e**2).sum() for e in z])
    return result


@pytest.mark.parametrize("scale_inputs", [False, True])
def test_against_dense_numpy(layer, x, scale_inputs):
    r = Rotations.haar(KEY, 6, 5)
    z = layer.jacobian(jnp.asarray(x), r.r_in, r.r_out)
    if scale_inputs:
        z = z * np.std(x @ r.r_in.T, axis=0)
    expected = dense_metrics(z)
    found = evaluate(layer, x, r, scale_inputs=scale_inputs, key=KEY)
    assert set(found) == set(expected) == set(NAMES)
    for name, m in found.items():
        assert m.value == pytest.approx(expected[name], rel=1e-5), name
        assert m.low <= m.value <= m.high, name


def test_the_covariance_of_the_training_inputs_scales_when_it_is_given(layer, x, rng):
    train = (rng.standard_normal((300, 6)) * [0.2, 1, 1, 2, 1, 1]).astype(np.float32)
    sigma = np.cov(train.T, bias=True)
    r = Rotations.haar(KEY, 6, 5)
    found = evaluate(layer, x, r, covariance=sigma, key=KEY)
    expected = dense_metrics(layer.jacobian(jnp.asarray(x), r.r_in, r.r_out) * np.std(train @ r.r_in.T, axis=0))
    assert found["hoyer"].value == pytest.approx(expected["hoyer"], rel=1e-5)
    assert found["hoyer"].value != pytest.approx(evaluate(layer, x, r, key=KEY)["hoyer"].value, 1e-3)


def test_outputs_in_units_of_their_standard_deviation(layer, x, rng, monkeypatch):
    monkeypatch.setattr(moments, "FAR", 1e9)  # all rows count
    r = Rotations.haar(KEY, 6, 5)
    train = rng.standard_normal((200, 6)).astype(np.float32)
    y = np.asarray(layer(jnp.asarray(train)), np.float64)
    floor = 1e-6 * y.var(axis=0).mean()
    deviations = np.sqrt((y @ r.r_out.T).var(axis=0) + floor)
    z = layer.jacobian(jnp.asarray(x), r.r_in, r.r_out) / deviations[:, None]
    sigma = np.cov(y.T, bias=True)
    raw = evaluate(layer, x, r, scale_inputs=False, scale_outputs=True, covariance_out=sigma, key=KEY)
    both = evaluate(layer, x, r, scale_outputs=True, covariance_out=sigma, key=KEY)
    for found, scale in ((raw, 1), (both, np.std(x @ r.r_in.T, axis=0))):
        expected = dense_metrics(z * scale)
        for name, m in found.items():
            assert m.value == pytest.approx(expected[name], rel=1e-4), name
    # The unit of the outputs does not matter, not even that of one of them.
    scales = np.array([1, 10, 1, 0.1, 1], np.float32)
    scaled = MLP(layer.w_in, layer.b_in, scales[:, None] * layer.w_out)
    neurons = [evaluate(of, x, Rotations.identity(6, 5), scale_outputs=True, key=KEY) for of in (layer, scaled)]
    for name in NAMES:
        np.testing.assert_allclose(neurons[1][name], neurons[0][name], rtol=1e-3, err_msg=name)
    constant = Dense(np.ones((5, 6), np.float32), np.full(5, -1e4, np.float32))
    with pytest.raises(ValueError, match="outputs do not vary"):
        evaluate(constant, x, r, scale_outputs=True, key=KEY)


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 54 * 7])
def test_chunks_change_nothing(layer, x, monkeypatch, chunk_bytes):
    r = Rotations.haar(KEY, 6, 5)
    whole = evaluate(layer, x, r, key=KEY)
    monkeypatch.setattr(moments, "CHUNK_BYTES", chunk_bytes)
    for name, m in evaluate(layer, x, r, key=KEY).items():
        np.testing.assert_allclose(m, whole[name], rtol=1e-5, err_msg=name)


def test_deterministic_for_a_key(layer, x):
    r = Rotations.haar(KEY, 6, 5)
    first = evaluate(layer, x, r, key=KEY)
    assert evaluate(layer, x, r, key=KEY) == first
    other = evaluate(layer, x, r, key=jax.random.key(1))
    assert [m.value for m in other.values()] == [m.value for m in first.values()]
    assert other["hoyer"] != first["hoyer"]


def test_the_sparsest_and_the_least_sparse_jacobian():
    one, flat = np.zeros((10, 20)), np.ones((10, 20))
    one[3, 4] = -7
    found = constant_jacobian(one)
    assert found["edges_90"] == found["edges_99"] == 1
    assert found["participation_ratio"] == pytest.approx(1)
    for name in ("hoyer", "top_1_percent_energy", "top_5_percent_energy"):
        assert found[name] == pytest.approx(1), name
    assert found["gini"] == pytest.approx(1 - 1 / 200)
    assert found["fraction_below_0.1_rms"] == pytest.approx(1 - 1 / 200)
    found = constant_jacobian(flat)
    assert (found["edges_90"], found["edges_99"]) == (180, 198)
    assert found["participation_ratio"] == pytest.approx(200)
    assert (found["hoyer"], found["gini"]) == pytest.approx((0, 0), abs=1e-6)
    assert (found["top_1_percent_energy"], found["top_5_percent_energy"]) == pytest.approx((0.01, 0.05))
    assert found["fraction_below_0.1_rms"] == 0


@given(w=arrays(np.float32, (4, 6), elements=st.floats(0.25, 4, width=32)), kept=st.integers(1, 23))
def test_setting_the_smallest_entries_to_zero_makes_every_metric_sparser(w, kept):
    sparser = np.where(w >= np.sort(w, axis=None)[-kept], w, 0)
    before, after = constant_jacobian(w, resamples=2), constant_jacobian(sparser, resamples=2)
    # Without the top, the rows and columns that are taken out may be others.
    for name in (name for name in NAMES if not name.endswith("without_top")):
        gain = after[name] - before[name] if HIGHER_IS_SPARSER[name] else before[name] - after[name]
        assert gain >= -1e-5, name


def test_scale_sign_and_order_do_not_matter(layer, x, rng):
    r = Rotations.haar(KEY, 6, 5)
    moved = Rotations(-r.r_in[rng.permutation(6)], r.r_out[::-1])
    scaled = MLP(layer.w_in, layer.b_in, 1e-3 * layer.w_out)
    for scale_inputs in (False, True):
        expected = evaluate(layer, x, r, scale_inputs=scale_inputs, key=KEY)
        for same in (
            evaluate(layer, x, moved, scale_inputs=scale_inputs, key=KEY),
            evaluate(scaled, x, r, scale_inputs=scale_inputs, key=KEY),
        ):
            for name in NAMES:
                np.testing.assert_allclose(same[name], expected[name], rtol=1e-4, err_msg=name)


def test_examples_whose_jacobian_is_zero_count_only_where_that_has_a_meaning():
    layer = Dense(np.array([[1.0, 2.0], [1.0, 2.0]], np.float32))  # open where x₁ + 2 x₂ > 0
    x = np.array([[1, 1], [2, 1], [-1, -1], [-2, -1]], np.float32)
    found = evaluate(layer, x, Rotations.identity(2, 2), scale_inputs=False, key=KEY)
    assert found["participation_ratio"].value == pytest.approx(10**2 / (2 * (1 + 16)))
    assert found["fraction_below_0.1_rms"].value == pytest.approx(0.5)
    assert all(np.isfinite(m).all() for m in found.values())


def test_a_layer_where_nothing_moves_is_refused(x):
    dead = Dense(np.ones((3, 6), np.float32), np.full(3, -1e4, np.float32))
    with pytest.raises(ValueError, match="zero for every example"):
        evaluate(dead, x, Rotations.identity(6, 3), key=KEY)


def test_rotations_of_another_layer_are_refused(layer, x, untyped):
    with pytest.raises(ValueError, match=r"r_in should have shape \[6, 6\]"):
        evaluate(layer, x, Rotations.identity(5, 5), key=KEY)
    with pytest.raises(ValueError, match=r"covariance should have shape \[6, 6\]"):
        evaluate(layer, x, Rotations.identity(6, 5), covariance=np.eye(5), key=KEY)


def test_bootstrap_counts_are_resamples():
    counts = bootstrap_counts(50, 400, key=KEY)
    assert counts.shape == (400, 50)
    np.testing.assert_array_equal(counts.sum(axis=1), 50)
    assert counts.var() == pytest.approx(1 - 1 / 50, rel=0.05)


def test_interval_is_about_the_value_and_as_wide_as_the_resamples():
    resampled = np.random.default_rng(0).normal(loc=7, scale=2, size=100_000)  # biased: the value is 10
    interval = bootstrap_interval(10.0, resampled)
    np.testing.assert_allclose(interval, (10, 10 - 3.92, 10 + 3.92), atol=0.05)
    assert interval.overlaps(Interval(15, 13.5, 17))
    assert not interval.overlaps(Interval(15, 14.5, 17))


def test_intervals_cover_the_truth(layer, rng):
    """About 95% of test sets should have an interval that holds the value for the population."""
    population = rng.standard_normal((20_000, 6)).astype(np.float32)
    r = Rotations.identity(6, 5)
    truth = evaluate(layer, population, r, scale_inputs=False, key=KEY, resamples=2)
    held = dict.fromkeys(NAMES, 0)
    for i in range(60):
        x = population[100 * i : 100 * (i + 1)]
        found = evaluate(layer, x, r, scale_inputs=False, key=jax.random.key(i), resamples=100)
        for name, m in found.items():
            held[name] += m.low <= truth[name].value <= m.high
    # The means; counts of edges are integers with intervals of a few entries.
    for name in (name for name in NAMES if not name.startswith("edges")):
        assert held[name] >= 50, (name, held[name])


def test_known_values_of_a_trained_network():
    """The second layer of a 784-100-100-10 network on held-out MNIST images."""
    if not SHARED.exists():
        pytest.skip("../shared/data is not there: MNIST and the trained network are needed")
    safetensors = pytest.importorskip("safetensors.numpy")
    w = safetensors.load_file(SHARED / "mlp_mnist" / "model.safetensors")
    with np.load(SHARED / "mnist" / "mnist.npz") as images:
        pixels = images["test_x"][:1000].reshape(-1, 784).astype(np.float32) / 255
    x = np.maximum(pixels @ w["layers.0.W"] + w["layers.0.b"], 0)
    layer = Dense(w["layers.1.W"].T, w["layers.1.b"])
    for basis, edges, below in ((baselines.neurons, 6713, 0.46), (baselines.svd_mean_jacobian, 4533, 0.44)):
        found = evaluate(layer, x, basis(layer, x), scale_inputs=False, key=KEY, resamples=2)
        assert found["edges_99"].value == pytest.approx(edges, rel=0.01)
        assert found["fraction_below_0.1_rms"].value == pytest.approx(below, abs=0.01)


@pytest.mark.parametrize("basis", [baselines.neurons, baselines.svd_mean_jacobian])
def test_intervals_of_edges_are_those_of_the_bootstrap(rng, basis):
    """What one number an example gives, against resampling the squares of all entries."""
    w_in, w_out = rng.standard_normal((64, 24)), rng.standard_normal((24, 64))
    x = (rng.standard_normal((40, 24)) * np.linspace(0, 3, 24)).astype(np.float32)
    b_in = 2 * rng.standard_normal(64).astype(np.float32)
    layer = MLP(w_in.astype(np.float32), b_in, w_out.astype(np.float32))
    r = basis(layer, x)
    found = evaluate(layer, x, r, scale_inputs=False, key=KEY)
    squares = np.concatenate(list(jacobians(layer, jnp.asarray(x), r.r_in, r.r_out))).reshape(40, -1) ** 2
    for name, share in (("edges_90", 0.9), ("edges_99", 0.99)):
        ordered = -np.sort(-(bootstrap_counts(40, 200, key=KEY).astype(float) @ squares), axis=1)
        cumulative = np.cumsum(ordered, axis=1)
        counts = np.count_nonzero(cumulative < share * cumulative[:, -1:], axis=1) + 1
        expected = bootstrap_interval(found[name].value, counts)
        width = expected.high - expected.low
        assert width >= 3 and np.allclose(found[name][1:], expected[1:], atol=1 + 0.1 * width)


@pytest.mark.parametrize("name", ["edges_99_by_row", "edges_99_by_column", "edges_99_without_top"])
def test_intervals_of_the_other_edges_are_those_of_the_bootstrap(rng, name):
    w_in = rng.standard_normal((64, 24)) * rng.lognormal(size=(64, 24))
    w_out = rng.standard_normal((24, 64)) * (rng.uniform(size=(24, 64)) < 0.1)
    x = (rng.standard_normal((40, 24)) * np.linspace(0.1, 3, 24)).astype(np.float32)
    layer = MLP(w_in.astype(np.float32), 2 * rng.standard_normal(64).astype(np.float32), w_out.astype(np.float32))
    found = evaluate(layer, x, Rotations.identity(24, 24), scale_inputs=False, key=KEY)[name]
    squares = np.square(np.asarray(layer.jacobian(jnp.asarray(x)), np.float64))
    rows, columns = without_top(squares.mean(axis=0))
    counts = []
    for of in bootstrap_counts(40, 200, key=KEY).astype(float):
        mean = np.einsum("n,noi->oi", of, squares)
        parts = {"row": mean, "column": mean.T}.get(name.rpartition("_")[2], [mean[np.ix_(rows, columns)]])
        counts.append(sum(map(dense_edges, parts)))
    expected = bootstrap_interval(found.value, np.array(counts))
    width = expected.high - expected.low
    assert width >= 3 and np.allclose(found[1:], expected[1:], atol=1 + 0.2 * width)  # whole edges of every row


# --- concentration ------------------------------------------------------------------------------------------------


def concentrated(rng, share=0.94):
    """A dense Jacobian, 40 by 50, whose row 7 is sparse (two entries) and holds a share of the energy."""
    w = rng.standard_normal((40, 50))
    w[7] = 0
    w[7, [3, 9]] = np.sqrt(share / (1 - share) * np.square(w).sum() / 2)
    return w


def test_a_row_with_nearly_all_the_energy_does_not_make_the_others_sparse(rng):
    """`<0.1 rms` and edges@99 fall for it. The metrics by row and without the top do not."""
    found = constant_jacobian(concentrated(rng))
    honest = constant_jacobian(np.delete(concentrated(rng), 7, axis=0))
    assert found["fraction_below_0.1_rms"] > 0.3 > 0.1 > honest["fraction_below_0.1_rms"]
    assert found["edges_99"] < 0.7 * honest["edges_99"]
    for name in ("small_by_row", "small_without_top"):
        assert found[name] < 0.11, name
    for name in ("edges_99_by_row", "edges_99_without_top"):
        assert found[name] > 0.95 * honest["edges_99"], name


def test_concentration_is_the_share_of_the_top(rng):
    w = concentrated(rng)
    x = np.eye(50, dtype=np.float32)
    found = examine(linear(w), np.concatenate([x, -x]), Rotations.identity(50, 40), scale_inputs=False, key=KEY)
    assert found.concentration.row == pytest.approx(0.94)
    assert found.concentration.entry == pytest.approx(0.47)
    assert found.concentration.column == pytest.approx(np.square(w).sum(0).max() / np.square(w).sum())
    assert found.concentration.example == pytest.approx(1 / 100)


def test_an_example_with_most_of_the_energy_is_seen(x):
    layer = MLP(np.eye(6, dtype=np.float32), None, np.eye(6, dtype=np.float32), activation="gelu")
    loud = x.copy()
    loud[5] = 0.1
    z = np.asarray(layer.jacobian(jnp.asarray(loud)), np.float64)
    expected = np.square(z).sum((1, 2))
    found = examine(layer, loud, Rotations.identity(6, 6), scale_inputs=False, key=KEY)
    assert found.concentration.example == pytest.approx(expected.max() / expected.sum(), rel=1e-5)


def test_what_stands_out_once_the_strongest_row_is_gone_goes_too():
    w = np.ones((200, 30))
    w[5] = 1e6
    w[5, 2] = 2e6  # the strongest row, and the strongest column where it crosses that
    w[6:, 8] = 1e3  # but without row 5 that is column 8
    rows, columns = without_top(w)
    assert list(np.flatnonzero(~columns)) == [8]
    assert np.count_nonzero(~rows) == 2 and not rows[5]
    for shape in ((1, 30), (30, 1)):
        assert [np.count_nonzero(~kept) for kept in without_top(np.ones(shape))] == [int(d > 1) for d in shape]


def test_rows_without_influence_are_no_evidence():
    """Two of the three rows are zero: what counts is the one row, and half of that is small."""
    w = np.zeros((3, 8))
    w[1, :4] = 1
    found = constant_jacobian(w)
    assert found["fraction_below_0.1_rms"] == pytest.approx(20 / 24)
    assert found["small_by_row"] == pytest.approx(0.5)
    assert found["edges_99_by_row"] == 4
    assert found["small_by_column"] == pytest.approx(2 / 3)
    assert found["edges_99_by_column"] == 4
    assert (found["small_without_top"], found["edges_99_without_top"]) == (1, 0)  # nothing is left


def test_curves_pass_through_the_metrics(layer, x):
    r = Rotations.haar(KEY, 6, 5)
    found = examine(layer, x, r, key=KEY)
    at = int(np.argmin(np.abs(THRESHOLDS - 0.1)))
    assert found.curves.below[at] == pytest.approx(found.metrics["fraction_below_0.1_rms"].value)
    assert found.curves.below_by_row[at] == pytest.approx(found.metrics["small_by_row"].value)
    assert found.curves.energy[0] == pytest.approx(found.concentration.entry)
    assert (found.curves.top[-1], found.curves.energy[-1]) == (30, pytest.approx(1))
    for curve in (found.curves.below, found.curves.below_by_row, found.curves.energy):
        assert np.all(np.diff(curve) >= 0)
    z = np.abs(np.asarray(layer.jacobian(jnp.asarray(x), r.r_in, r.r_out) * np.std(x @ r.r_in.T, axis=0), np.float64))
    rms = np.sqrt(np.mean(z**2))
    np.testing.assert_allclose(found.curves.below, [np.mean(z < t * rms) for t in THRESHOLDS], atol=1e-3)
    energy = np.sort(np.mean(z**2, axis=0), axis=None)[::-1].cumsum()
    np.testing.assert_allclose(found.curves.energy, energy[np.array(found.curves.top) - 1] / energy[-1], rtol=1e-4)
