"""Several layers at once: what is shared, what is held, and whether neighbours' sparse directions are the same."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import rotsparse as rs
from helpers import SHARED, random_orthogonal
from planted_bases import hidden_block
from rotsparse.data import sources
from rotsparse.fit.chain import _connected
from rotsparse.objectives import JacobianSparsity
from signals import send

D = 8
KEY = jax.random.key(0)


def sparse_block(rng, turn_in, turn_out):
    return hidden_block(rng, turn_in, turn_out, hidden=3 * D, bias=lambda: rng.standard_normal(3 * D))


@pytest.fixture
def rng():
    """A draw whose planted directions every start finds: with others, rounding decides which optimum a fit ends in."""
    return np.random.default_rng(2)


def planted(rng, *, same: bool):
    """Two blocks, whose sparse directions between them are the same, or independent."""
    turns = [random_orthogonal(rng, D) for _ in range(4)]
    layers = sparse_block(rng, turns[0], turns[1]), sparse_block(rng, turns[1 if same else 2], turns[3])
    return layers, rng.normal(size=(400, D)).astype(np.float32), turns


def fit(layers, x, *, steps=60, scale_inputs=False, **options):
    """The solution, the rotations of each layer, and the evidence on the first hundred examples."""
    options = {"joint": False, "scale_inputs": scale_inputs, "method": rs.Anneal(steps=steps)} | options
    solution = rs.fit_chain(layers, x[100:], key=KEY, **options)
    evidence = rs.evaluate_chain(layers, x[:100], solution, key=KEY, scale_inputs=scale_inputs)
    return solution, rs.layer_rotations(solution), evidence


def test_separate_fits_find_the_directions_that_two_layers_share(rng):
    layers, x, turns = planted(rng, same=True)
    _, rotations, evidence = fit(layers, x, steps=1000, restarts=2)
    (boundary,) = evidence.matches
    assert (boundary.outputs, boundary.inputs, boundary.shared) == (D, D, False)
    assert (
        boundary.cosine.value > 0.8
        and boundary.cosine.low > boundary.chance.high
        and "more than chance gives" in str(boundary)
    )
    # ... and they are the planted ones
    assert rs.mean_max_cosine(rotations[0].r_out, turns[1]) > 0.95
    assert all(value < neurons for value, neurons in zip(evidence.values, evidence.neuron_values, strict=True))

    layers, x, _ = planted(rng, same=False)
    (boundary,) = fit(layers, x, steps=1000, restarts=2)[2].matches
    assert boundary.cosine.low <= boundary.chance.high and "than chance gives" in str(boundary)


def test_a_joint_fit_has_one_rotation_at_each_boundary(rng):
    layers, x, turns = planted(rng, same=True)
    solution, (first, second), evidence = fit(layers, x, joint=True, steps=1000, restarts=2)
    np.testing.assert_array_equal(first.r_out, second.r_in)
    assert evidence.matches[0].shared and "share a rotation" in evidence.summary()
    assert evidence.matches[0].cosine.value == pytest.approx(1, abs=1e-5)
    assert list(solution.bases) == ["0", "1", "2"] and len(solution.stages) == 1
    assert rs.mean_max_cosine(first.r_out, turns[1]) > 0.95  # sharing costs nothing where the truth is shared


def test_values_are_those_of_the_layers_on_held_out_examples(rng):
    layers, x, _ = planted(rng, same=False)
    solution, rotations, evidence = fit(layers, x, scale_inputs=True)
    test = x[:100]
    for layer, pair, value in zip(layers, rotations, evidence.values, strict=True):
        bases = {"in": jnp.asarray(pair.r_in), "out": jnp.asarray(pair.r_out)}
        assert value == pytest.approx(float(JacobianSparsity(layer, test, rs.Log(0.1)).value(bases)), rel=1e-5)
        test = np.asarray(layer(test))
    assert list(solution.bases) == ["0 in", "0 out", "1 in", "1 out"] and len(solution.stages) == 2


def test_separate_solutions_are_joined_best_with_best(rng):
    layers, x, _ = planted(rng, same=False)
    solution, _, _ = fit(layers, x, restarts=3)
    assert len(solution.candidates) == 3 and np.argmin(solution.candidate_values) == 0
    for name, r in solution.bases.items():
        np.testing.assert_array_equal(r, solution.candidates[0][name])
    assert solution.value == pytest.approx(solution.candidate_values[0], rel=1e-5)
    assert solution.history.objective.shape == (3, 60) and all(free.all() for free in solution.free.values())


def test_an_interrupted_chain_has_no_rotations_that_were_not_fitted(rng, monkeypatch):
    layers, x, _ = planted(rng, same=True)
    monkeypatch.setattr("rotsparse.engine._progress.Progress.update", lambda *a, **k: send(signal.SIGINT))
    solution = rs.fit_chain(layers, x, key=KEY, joint=False, method=rs.Anneal(steps=60))
    assert solution.result is rs.Result.INTERRUPTED and set(solution.bases) == {"0 in", "0 out"}
    with pytest.raises(KeyboardInterrupt):
        rs.layer_rotations(solution)


def test_a_chain_of_one_layer_is_the_same_problem_either_way(rng):
    layers, x, _ = planted(rng, same=True)
    separate, joint = (fit(layers[:1], x, joint=joint) for joint in (False, True))
    np.testing.assert_array_equal(separate[1][0].r_out, joint[1][0].r_out)
    assert separate[2].values == joint[2].values and separate[2].matches == ()


@pytest.mark.parametrize("joint", [pytest.param(False, marks=pytest.mark.slow), True], ids=["separate", "joint"])
def test_sources(rng, monkeypatch, tmp_path, joint):
    """What enters the second layer is computed as it is read, and its statistics are those of all rows."""
    layers, x, _ = planted(rng, same=True)
    train, test = sources.ArrayRows(x[100:]), sources.ArrayRows(x[:100])

    def values(x, **options):
        solution = rs.fit_chain(layers, x, key=KEY, joint=joint, method=rs.Anneal(steps=100), **options)
        return rs.evaluate_chain(layers, test, solution, key=KEY)

    in_memory = values(x[100:])
    # Of a source that fits into memory nothing stays on disk ...
    assert values(train).values == in_memory.values
    # ... and of another a third is in memory; a mesh of one device is one device.
    monkeypatch.setattr(sources, "RESIDENT_EXAMPLES", 100)
    on_disk = values(train, run=rs.Run(tmp_path, mesh=rs.device_mesh()))
    assert all(a < b for a, b in zip(on_disk.values, on_disk.neuron_values, strict=True))
    np.testing.assert_allclose(on_disk.values, in_memory.values, rtol=0.2)
    with np.load(tmp_path / "checkpoints" / "moments-1.npz") as moments:
        expected = np.cov(np.asarray(layers[0](x[100:])).T, bias=True)
        np.testing.assert_allclose(moments["scatter"] / moments["count"], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("joint", [False, True])
def test_held_boundaries_stay_and_those_between_fall_apart(rng, joint):
    layers, x, _ = planted(rng, same=True)
    solution, (first, second), _ = fit(layers, x, joint=joint, hold_boundaries=(0, 1))
    for held in (first.r_in, first.r_out, second.r_in):
        np.testing.assert_array_equal(held, np.eye(D))
    assert [name for name, free in solution.free.items() if free.any()] == ["2" if joint else "1 out"]
    assert len(fit(layers, x, joint=joint, hold_boundaries=(1,))[0].stages) == 2


def test_terms_are_grouped_by_the_free_spaces_they_share(rng):
    layers, x, _ = planted(rng, same=True)

    def term(a, b):
        return JacobianSparsity(layers[0], x[:8], rs.Log(0.1), space_in=a, space_out=b)

    terms = [term("0", "1"), term("2", "3"), term("1", "2"), term("4", "5"), term("6", "6")]
    groups = _connected(terms, {"6": jnp.eye(D)})
    assert {frozenset().union(*(t.spaces for t in group)) for group in groups} == {
        frozenset("0123"),
        frozenset("45"),
    }


def test_directions_that_a_layer_does_not_use_are_not_compared(rng):
    layers, x, _ = planted(rng, same=True)
    narrow = rs.Dense(rng.normal(size=(3, D)).astype(np.float32), activation="identity")
    (boundary,) = fit([layers[0], narrow], x, steps=1000)[2].matches
    assert (boundary.outputs, boundary.inputs, len(boundary.cosines)) == (D, 3, 3)


def test_bad_input_is_explained(rng):
    layers, x, _ = planted(rng, same=True)
    narrow = rs.Dense(np.ones((3, D), np.float32))
    with pytest.raises(ValueError, match="layer 0 has 3 outputs and layer 1 8 inputs"):
        fit([narrow, layers[0]], x)
    with pytest.raises(ValueError, match=r"hold_boundaries has \[3\]: expected numbers from 0 to 2"):
        fit(layers, x, hold_boundaries=(3,))
    with pytest.raises(ValueError, match="every boundary is held"):
        fit(layers, x, hold_boundaries=(0, 1, 2))
    with pytest.raises(ValueError, match="at least one layer"):
        fit([], x)
    with pytest.raises(ValueError, match=r"x should have shape \[examples, 8\]"):
        fit(layers, x[:, 1:])


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "mlp_mnist").exists(), reason="the MNIST network is not at ../shared/data/mlp_mnist")
def test_the_mnist_network_joint_and_separate():
    tensors = load_file(SHARED / "mlp_mnist/model.safetensors")  # row vectors: h = x @ W + b
    kinds = ("relu", "relu", "identity")
    layers = [
        rs.Dense(np.ascontiguousarray(tensors[f"layers.{i}.W"].T), tensors[f"layers.{i}.b"], activation=kind)
        for i, kind in enumerate(kinds)
    ]
    with np.load(SHARED / "mnist/mnist.npz") as images:
        x, test = (images[name].reshape(-1, 784)[:500].astype(np.float32) / 255 for name in ("train_x", "test_x"))
    options = {"key": KEY, "hold_boundaries": (0,), "scale_inputs": False, "method": rs.Anneal(steps=1000)}
    fits = (rs.fit_chain(layers, x, joint=joint, **options) for joint in (False, True))
    separate, joint = (rs.evaluate_chain(layers, test, fit, key=KEY, scale_inputs=False) for fit in fits)
    for evidence in (separate, joint):
        print(evidence.summary())
        found = zip(evidence.values[1:], evidence.neuron_values[1:], strict=True)
        assert all(value < neurons for value, neurons in found)
    # Held inputs and ReLU outputs: the first layer's pair is the neurons, or as good.
    assert separate.values[0] <= separate.neuron_values[0] + 0.02
    assert sum(separate.values) <= sum(joint.values)
    assert [m.boundary for m in separate.matches] == [1, 2] and separate.matches[1].inputs <= 11
