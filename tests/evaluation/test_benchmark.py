"""`benchmark`: the table that decides whether a layer's basis is worth anything."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rotsparse as rs
from planted_bases import hidden_block
from rotsparse._core.orthogonal import haar
from rotsparse.evaluation import baselines
from rotsparse.evaluation.benchmark import LEARNED, benchmark, null_row
from rotsparse.evaluation.nulls import random_weights
from rotsparse.evaluation.verdict import SHARE

KEY = jax.random.key(0)
# Without pair searches, which take longer to compile than to run.
ANNEAL: dict[str, Any] = {"method": rs.Anneal(steps=600)}
NULLS = ["random weights", "rates matched", "same spectrum", "weights shuffled", "neurons re-paired"]


@pytest.fixture
def planted(rng):
    """A block of neurons with two inputs and two outputs each, hidden by rotations; and its inputs."""
    n = 8
    q_in, q_out = (np.asarray(haar(k, n)) for k in jax.random.split(KEY))
    return hidden_block(rng, q_in, q_out, hidden=3 * n), rng.standard_normal((300, n)).astype(np.float32)


def test_structure_that_is_there_is_found_and_that_of_the_control_is_not(planted):
    layer, x = planted
    found = benchmark(layer, x[:200], x[200:], key=KEY, scale_inputs=False, **ANNEAL, restarts=2)
    of = found.comparison.metrics
    assert list(of) == [LEARNED, *baselines.all_baselines(layer, x, key=KEY)]
    assert found.control is not None and list(found.control.nulls) == NULLS
    assert all(len(draws) == 3 for draws in found.control.nulls.values())
    assert found.control.learned == of[LEARNED]
    # Weights this sparse show their basis by themselves.
    assert of[LEARNED]["hoyer"].overlaps(of["sparse_weights"]["hoyer"])
    others = [m["hoyer"].high for name, m in of.items() if name not in (LEARNED, "sparse_weights")]
    assert of[LEARNED]["hoyer"].low > max(others)
    # Every neuron reads two inputs and feeds two outputs: any pairing of them is as sparse.
    assert of[LEARNED][SHARE].low > max(found.control.another(null, SHARE).high for null in NULLS[:3])
    assert found.conclusion.startswith("Sparse structure in the learned weights")
    assert found.seconds.keys() == {*of, *map(null_row, NULLS)} and all(s >= 0 for s in found.seconds.values())
    assert found.reproduced is not None and found.reproduced.keys() == {"in", "out"}
    rows = found.markdown().splitlines()
    assert len(rows) == 2 + len(of) + len(NULLS) and len({row.count("|") for row in rows}) == 1
    assert rows[-1].startswith(f"| {null_row(NULLS[-1])} |")
    json.dumps(found.to_json())


def test_random_weights_are_not_called_structure(planted):
    layer, x = planted
    null = random_weights(layer, key=KEY)
    found = benchmark(null, x[:200], x[200:], key=KEY, scale_inputs=False, **ANNEAL)
    assert not found.conclusion.startswith("Sparse structure")
    assert found.reproduced is None  # one restart cannot tell


def test_a_function_layer_has_a_control_only_where_one_is_given(planted):
    layer, x = planted
    function = rs.FunctionLayer(function=lambda v: layer(v), d_in=8, d_out=8)
    options = {"method": rs.Anneal(steps=20), "key": KEY}
    plain, controlled = (
        benchmark(function, x[:50], x[50:90], nulls=nulls, **options) for nulls in (None, {"mine": [layer]})
    )
    assert plain.control is None and not any(name.startswith(f"{LEARNED},") for name in plain.seconds)
    assert controlled.control is not None and list(controlled.control.nulls) == ["mine"]
    assert "mine" in controlled.conclusion and "null" not in plain.conclusion


def test_command_line(folder, rotsparse, planted):
    layer, x = planted
    np.savez("layer.npz", w_in=layer.w_in, w_out=layer.w_out)
    np.save("x.npy", x)
    options = ["--layer", "layer.npz", "--activations", "x.npy", "--steps", 20, "--solver", "annealing"]
    code, said = rotsparse("benchmark", *options, "--out", "run")
    assert code == 0
    assert "re-paired" in said and "Other starts" in said
    metrics = json.loads((folder / "run/metrics.json").read_text())
    assert list(metrics["control"]["nulls"]) == NULLS
    assert metrics["metrics"]["learned"].keys() == metrics["control"]["learned"].keys()
    assert metrics["seconds"]["learned"] > 0
    assert "| pca |" in (folder / "run/table.md").read_text()
    rotations = rs.Rotations.load(folder / "run/rotations.safetensors")[0]
    assert rotations.orthogonality_error() < 1e-5
    assert jnp.shape(rotations.r_in) == (8, 8)
