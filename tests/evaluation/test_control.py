"""Controls: which nulls a layer has, what the same fit makes of them, and when a layer is beyond them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rotsparse as rs
from planted_bases import sparse_weights
from rotsparse._core.intervals import Interval
from rotsparse._core.orthogonal import haar
from rotsparse.evaluation.control import Control, another_redraw
from rotsparse.evaluation.fit_nulls import quick_control
from rotsparse.evaluation.nulls import draw_nulls, random_weights, unpaired
from rotsparse.evaluation.verdict import structure

KEY = jax.random.key(0)


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


@pytest.fixture
def planted(rng):
    """A block of neurons with two inputs and two outputs each, hidden by rotations; and its inputs."""
    n = 8
    w_in, w_out = sparse_weights(rng, n, 3 * n)
    q_in, q_out = (np.asarray(haar(k, n)) for k in jax.random.split(KEY))
    layer = rs.MLP((w_in @ q_in).astype(np.float32), None, (q_out.T @ w_out).astype(np.float32))
    return layer, normal(rng, 300, n)


def test_every_layer_kind_has_its_nulls(rng):
    x = normal(rng, 20, 4)
    usual = ["random weights", "rates matched", "same spectrum", "weights shuffled"]
    block = rs.MLP(normal(rng, 6, 4), None, normal(rng, 4, 6))
    gated = rs.GatedMLP(normal(rng, 6, 4), normal(rng, 6, 4), normal(rng, 4, 6))
    for layer, more in (
        (rs.Dense(normal(rng, 4, 4)), []),
        (block, ["neurons re-paired"]),
        (gated, ["neurons re-paired", "gates unpaired"]),
    ):
        drawn = draw_nulls(layer, x, key=KEY, draws=2)
        assert list(drawn) == [*usual, *more]
        assert all(len(layers) == 2 for layers in drawn.values())
    assert draw_nulls(rs.FunctionLayer(jnp.sin, 4, 4), x, key=KEY, draws=2) == {}


def test_unpaired_gates_keep_every_neuron_of_every_matrix(rng):
    layer = rs.GatedMLP(normal(rng, 6, 4), normal(rng, 6, 4), normal(rng, 4, 6))
    null = unpaired(layer, key=KEY)
    np.testing.assert_array_equal(null.w_gate, layer.w_gate)
    for before, after in ((layer.w_up, null.w_up), (layer.w_down.T, null.w_down.T)):
        assert not np.array_equal(before, after)
        np.testing.assert_array_equal(np.sort(before, axis=0), np.sort(after, axis=0))


def test_what_is_planted_is_beyond_all_nulls_and_random_weights_are_not(planted):
    layer, x = planted
    options = {"key": KEY, "scale_inputs": False}
    found = quick_control(layer, x[:200], x[200:], **options)
    assert found is not None and "600 steps" in found.made
    judged = structure(found)
    # Every neuron reads two inputs and feeds two outputs: any pairing of them is as sparse.
    assert judged.learned and judged.missed == ("neurons re-paired",)
    assert "Sparse structure in the learned weights" in judged.headline()
    assert Control.from_json(json.loads(json.dumps(found.to_json()))) == found
    null = quick_control(random_weights(layer, key=KEY), x[:200], x[200:], **options)
    assert null is not None
    assert not structure(null).learned
    assert quick_control(rs.FunctionLayer(jnp.tanh, 8, 8), x[:200], x[200:], **options) is None
    own = quick_control(rs.FunctionLayer(jnp.tanh, 8, 8), x[:200], x[200:], nulls={"another": [layer]}, **options)
    assert own is not None and list(own.nulls) == ["another"] and len(own.nulls["another"]) == 1


def interval(value, reach=0.005):
    return Interval(value, value - reach, value + reach)


def control(learned, **nulls):
    def metrics(value):
        return {"fraction_below_0.1_rms": interval(value), "edges_99": interval(100, 1)}

    return Control(metrics(learned), {name: tuple(map(metrics, values)) for name, values in nulls.items()})


def test_a_verdict_names_the_nulls_that_are_beaten_and_the_strictest():
    both = structure(control(0.8, easy=(0.3, 0.31, 0.3), hard=(0.6, 0.61, 0.6)))
    assert both.beaten == ("easy", "hard") and both.strictest == "hard"
    assert both.headline().startswith("Sparse structure that was learned: 80.0%")
    one = structure(control(0.8, easy=(0.3, 0.31, 0.3), **{"same spectrum": (0.8, 0.81, 0.8)}))
    assert one.beaten == ("easy",) and one.missed == ("same spectrum",) and not one.learned
    assert "singular values of the weights may explain it" in one.headline()
    none = structure(control(0.3, easy=(0.3, 0.31, 0.3)))
    assert "No sparse basis here beyond chance" in none.headline()


def test_draws_that_differ_widely_beat_nothing():
    assert not structure(control(0.8, wide=(0.3, 0.7, 0.5))).learned


@pytest.mark.parametrize(("values", "counted"), [((0.97, 0.99, 0.999), False), ((2, 5, 60), True)])
def test_the_range_of_one_more_draw_stays_on_the_scale(values, counted):
    found = another_redraw([interval(v, 0) for v in values], counted=counted)
    assert found.low <= min(values) and found.high >= max(values)
    assert found.low > 0 and (counted or found.high < 1)
