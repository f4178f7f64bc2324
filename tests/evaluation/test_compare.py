"""`compare`: one table for all bases, and what it says."""

import io
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from rotsparse._core.intervals import Interval
from rotsparse.evaluation import baselines
from rotsparse.evaluation.compare import Comparison, _floor_of_examples, compare, compare_with_baselines
from rotsparse.evaluation.metrics import evaluate
from rotsparse.evaluation.names import HIGHER_IS_SPARSER, LABELS
from rotsparse.evaluation.verdict import against_baselines
from rotsparse.fit.find_rotations import find_rotations
from rotsparse.layers.fold import fold
from rotsparse.layers.function import FunctionLayer
from rotsparse.layers.mlp import MLP, Dense
from rotsparse.layers.rotations import Rotations
from rotsparse.objectives.floor import floor
from rotsparse.objectives.measures import GemanMcClure
from rotsparse.solvers import Anneal

KEY = jax.random.key(0)


@pytest.fixture
def layer(rng):
    return MLP(
        *(rng.standard_normal(shape).astype(np.float32) for shape in ((9, 6), (9,), (5, 9))),
        activation="gelu",
    )


@pytest.fixture
def x(rng):
    return rng.standard_normal((60, 6)).astype(np.float32)


def test_every_basis_has_every_metric(layer, x):
    bases = baselines.all_baselines(layer, x, key=KEY)
    found = compare(layer, x, bases, scale_inputs=False, key=KEY)
    assert list(found.metrics) == list(bases)
    assert all(list(of) == list(HIGHER_IS_SPARSER) == list(LABELS) for of in found.metrics.values())
    gap_closed = {"gap_closed": found.metrics["pca"]["gap_closed"]}
    assert found.metrics["pca"] == evaluate(layer, x, bases["pca"], scale_inputs=False, key=KEY) | gap_closed
    scaled = compare(layer, x, bases, key=KEY)
    assert all("gap_closed" not in of for of in scaled.metrics.values())
    assert scaled.metrics["pca"] == evaluate(layer, x, bases["pca"], key=KEY)
    assert compare(layer, x, bases, key=KEY) == scaled


def test_outputs_are_scaled_by_those_of_the_training_inputs(layer, x):
    train, r = 2 * x[:40], Rotations.haar(KEY, 6, 5)
    keys = (KEY, jax.random.key(1))
    options: dict[str, Any] = {"scale_inputs": False, "scale_outputs": True}
    found, bases = compare_with_baselines(layer, train, x[40:], {"mine": r}, keys=keys, **options)
    sigma = np.cov(np.asarray(layer(jnp.asarray(train))).T, bias=True)
    expected = evaluate(layer, x[40:], r, **options, covariance_out=sigma, key=keys[1])
    assert "gap_closed" not in found.metrics["mine"] and found.metrics.keys() == bases.keys()
    for name, m in found.metrics["mine"].items():
        np.testing.assert_allclose(m, expected[name], rtol=1e-4, err_msg=name)
    own = compare(layer, x, {"mine": r}, **options, key=KEY).metrics["mine"]
    assert own == evaluate(layer, x, r, **options, key=KEY)


def test_gap_closed_runs_from_a_random_basis_to_the_floor(rng):
    """One Jacobian for all examples: its singular vectors reach the floor."""
    layer = Dense(rng.standard_normal((30, 40)).astype(np.float32), activation="identity")
    x = rng.standard_normal((20, 40)).astype(np.float32)
    bases = {"svd": baselines.svd_weights(layer, x), "haar": Rotations.haar(jax.random.key(9), 40, 30)}
    found = compare(layer, x, bases, scale_inputs=False, key=KEY).metrics
    assert found["svd"]["gap_closed"].value == pytest.approx(1, abs=1e-3)
    assert found["haar"]["gap_closed"].value == pytest.approx(0, abs=0.05)


def test_no_basis_gets_below_the_floor(layer, x):
    bases = baselines.all_baselines(layer, x, key=KEY)
    gaps = [of["gap_closed"] for of in compare(layer, x, bases, scale_inputs=False, key=KEY).metrics.values()]
    assert all(gap.value < 1 and gap.low <= gap.value <= gap.high for gap in gaps)


def test_the_floor_is_that_of_the_objective(layer, x):
    measure, rms = GemanMcClure(eps=0.1), float(np.sqrt(np.mean(np.square(layer.jacobian(jnp.asarray(x))))))
    examples = _floor_of_examples(layer, jnp.asarray(x), measure, rms)
    assert examples.mean() == pytest.approx(floor(layer, jnp.asarray(x), measure), rel=1e-5)


def test_no_retracing_for_more_bases(rng):
    traces = []

    def function(x):
        traces.append(None)
        return jnp.tanh(x)

    layer, x = FunctionLayer(function=function, d_in=4, d_out=4), rng.standard_normal((30, 4)).astype(np.float32)
    bases = {str(i): Rotations.haar(jax.random.key(i), 4, 4) for i in range(5)}
    compare(layer, x, dict(list(bases.items())[:1]), key=KEY)
    before = len(traces)
    compare(layer, x, bases, key=KEY)
    assert len(traces) == before


def table_of(**bases):
    """A comparison from pairs (edges_90, hoyer), with intervals of ±1 and ±0.1."""
    return Comparison(
        {
            name: {"edges_90": Interval(e, e - 1, e + 1), "hoyer": Interval(h, h - 0.1, h + 0.1)}
            for name, (e, h) in bases.items()
        }
    )


def test_best_knows_which_way_is_sparser():
    found = table_of(pca=(10, 0.9), ica=(5, 0.3))
    assert found.best("edges_90") == "ica"
    assert found.best("hoyer") == "pca"
    with pytest.raises(ValueError, match="expected one of edges_90, hoyer"):
        found.best("edges_9")


@pytest.mark.parametrize(
    ("learned", "sentence"),
    [
        ((1, 0.9), "on all 2 metrics, beyond the 95% intervals."),
        (
            (1, 0.45),
            "on 1 of 2 metrics (edges@90); ahead of pca within the 95% intervals on Hoyer.",
        ),
        ((1, 0.4), "on 1 of 2 metrics (edges@90); not ahead of pca on Hoyer."),
        ((20, 0.1), "on 0 of 2 metrics; not ahead of ica on edges@90; not ahead of pca on Hoyer."),
    ],
)
def test_the_verdict_says_where_it_wins_and_where_not(learned, sentence):
    verdict = against_baselines(table_of(pca=(10, 0.4), learned=learned, ica=(5, 0.3)))
    assert verdict == f"On held-out examples learned is sparser than every baseline {sentence}"


def test_a_verdict_needs_something_to_judge():
    with pytest.raises(ValueError, match="expected 'learned'"):
        against_baselines(table_of(pca=(1, 0.5), ica=(1, 0.5)))
    with pytest.raises(ValueError, match="at least one other"):
        against_baselines(table_of(learned=(1, 0.5)))


def test_json(layer, x):
    found = compare(layer, x, {"neurons": Rotations.identity(6, 5)}, key=KEY)
    read = json.loads(json.dumps(found.to_json()))
    assert read["metrics"]["neurons"]["edges_99"] == found.metrics["neurons"]["edges_99"]._asdict()
    assert set(read["metrics"]["neurons"]["gini"]) == {"value", "low", "high"}
    assert read["concentration"]["neurons"] == found.concentration["neurons"]._asdict()
    assert read["curves"]["neurons"]["below"] == list(found.curves["neurons"].below)


def test_tables_show_every_basis_and_fit_a_terminal(layer, x):
    found = compare(layer, x, baselines.all_baselines(layer, x, key=KEY), scale_inputs=False, key=KEY)
    out = io.StringIO()
    Console(file=out, width=80).print(found.table("bases"))
    text = out.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert f"{found.metrics['pca']['small_by_row'].value:.3f}" in text
    assert f"{found.concentration['pca'].row:.0%}" in text
    timed = io.StringIO()
    Console(file=timed, width=80).print(found.table(seconds=dict.fromkeys(found.metrics, 1234.5)))
    assert "…" not in timed.getvalue()
    lines = found.markdown().splitlines()
    assert len(lines) == 2 + len(found.metrics)
    assert len({line.count("|") for line in lines}) == 1
    columns = range(2, 2 + len(HIGHER_IS_SPARSER))
    assert all(sum(line.split("|")[column].count("**") for line in lines) == 2 for column in columns)
    assert lines[0].endswith("| top row | top column | top entry | top example |")


def test_bad_inputs_are_named(layer, x):
    with pytest.raises(ValueError, match="at least one basis"):
        compare(layer, x, {}, key=KEY)
    with pytest.raises(ValueError, match="x_test should have shape"):
        compare(layer, x[:, :5], {"neurons": Rotations.identity(6, 5)}, key=KEY)


def test_what_is_no_pair_of_rotations_is_named(rng, untyped):
    layer = Dense(rng.standard_normal((4, 3)).astype(np.float32))
    x = rng.standard_normal((40, 3)).astype(np.float32)
    solution = find_rotations(layer, x, key=jax.random.key(0), method=Anneal(steps=2))
    with pytest.raises(ValueError, match=r"bases\['mine'\] should be Rotations, got Solution: take its .rotations"):
        compare(layer, x, {"mine": solution}, key=jax.random.key(0))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="rotations should be Rotations, got ndarray"):
        fold(layer, np.eye(3), x)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"such as rs.Log\(0.1\).*got 'log'"):
        find_rotations(layer, x, key=jax.random.key(0), measure="log")  # pyright: ignore[reportArgumentType]
