import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layer_kinds import LAYERS, correlated_inputs, random_weights
from rotsparse._core.alignment import mean_max_cosine
from rotsparse.fit.find_rotations import find_rotations
from rotsparse.fit.weight_bases import most_exact_zeros, sparse_weights, triangular
from rotsparse.layers.jacobians import LayerStatistics
from rotsparse.layers.mlp import MLP, Dense
from rotsparse.layers.rotations import Rotations
from rotsparse.solvers.anneal import Anneal


def orthogonal(rng, d):
    return np.linalg.qr(rng.standard_normal((d, d)))[0]


def exact_zeros(layer, x, r):
    z = np.abs(layer.jacobian(jnp.asarray(x), r.r_in, r.r_out))
    return float(np.mean(z < 1e-6 * z.max()))


@pytest.mark.parametrize(("d_out", "d_in"), [(16, 16), (10, 16), (16, 10)])
def test_the_triangular_basis_has_as_many_exact_zeros_as_there_can_be(d_out, d_in, rng):
    layer = Dense(random_weights(rng, d_out, d_in), random_weights(rng, d_out))
    x = rng.standard_normal((400, d_in)).astype(np.float32)
    most = most_exact_zeros(layer, x)
    rates = np.sort((x @ layer.w.T + layer.b > 0).mean(axis=0))[::-1]
    filled = sum(min(k + 1, d_in) * p for k, p in enumerate(rates))
    assert most == pytest.approx(1 - filled / (d_out * d_in))
    assert exact_zeros(layer, x, triangular(layer, x)) == pytest.approx(most, abs=1e-6)

    by_chance = Rotations(Rotations.haar(jax.random.key(0), d_in, d_out).r_in, np.eye(d_out, dtype=np.float32))
    held = find_rotations(layer, x, key=jax.random.key(0), method=Anneal(steps=200), hold=("out",)).rotations
    for other in (by_chance, held, sparse_weights(layer, x)):
        assert exact_zeros(layer, x, other) <= most + 1e-6


def test_structure_in_the_weights_passes_the_bound(rng):
    layer = Dense(np.eye(8, dtype=np.float32))
    x = rng.standard_normal((100, 8)).astype(np.float32)
    assert exact_zeros(layer, x, sparse_weights(layer, x)) > most_exact_zeros(layer, x) + 0.1


def test_the_bound_is_for_single_layers(rng):
    for kind in LAYERS.keys() - {"dense"}:
        with pytest.raises(ValueError, match="single Dense layer"):
            most_exact_zeros(LAYERS[kind](rng), correlated_inputs(rng))


@pytest.mark.parametrize("kind", LAYERS)
def test_the_mean_jacobian_is_triangular(kind, rng):
    layer, x = LAYERS[kind](rng), correlated_inputs(rng)
    r = triangular(layer, x)
    mean = np.mean(layer.jacobian(jnp.asarray(x), r.r_in, r.r_out), axis=0)
    held, lower = (r.r_in, mean.T) if kind == "gated" else (r.r_out, mean)  # gated: more outputs than inputs
    assert np.count_nonzero(held) == len(held)
    assert np.abs(np.triu(lower, 1)).max() < 1e-5 * np.abs(mean).max()


def test_the_most_active_neuron_comes_first(rng):
    layer, x = LAYERS["dense"](rng), correlated_inputs(rng)
    active = (x @ layer.w.T + layer.b > 0).mean(axis=0)
    sorted_ = np.asarray(triangular(layer, x).r_out) @ active
    assert (np.diff(sorted_) <= 0).all()


def sparse(rng, *shape):
    """A fifth of the entries, and the diagonal so that no row is empty."""
    return rng.standard_normal(shape) * (rng.random(shape) < 0.15) + np.eye(*shape)


def test_a_planted_basis_of_a_single_layer_is_found(rng):
    d, neurons = 24, 96
    planted = orthogonal(rng, d)
    layer = Dense((sparse(rng, neurons, d) @ planted).astype(np.float32))
    r = sparse_weights(layer, rng.standard_normal((300, d)).astype(np.float32))
    assert mean_max_cosine(r.r_in, planted) > 0.99
    np.testing.assert_array_equal(r.r_out, np.eye(neurons))


def test_planted_bases_of_a_block_are_found(rng):
    d, hidden = 24, 96
    p_in, p_out = orthogonal(rng, d), orthogonal(rng, d)
    w_in, w_out = sparse(rng, hidden, d) @ p_in, p_out.T @ sparse(rng, hidden, d).T
    layer = MLP(w_in.astype(np.float32), None, w_out.astype(np.float32))
    r = sparse_weights(layer, rng.standard_normal((300, d)).astype(np.float32))
    assert mean_max_cosine(r.r_in, p_in) > 0.99
    assert mean_max_cosine(r.r_out, p_out) > 0.99


def test_sparse_weights_needs_weights(rng):
    with pytest.raises(ValueError, match="triangular works for every layer"):
        sparse_weights(LAYERS["function"](rng), correlated_inputs(rng))


@pytest.mark.parametrize("kind", ["mlp", "dense", "gated", "residual"])
def test_gates_are_those_of_the_jacobian(kind, rng):
    layer, x = LAYERS[kind](rng), correlated_inputs(rng)
    s = LayerStatistics(layer, x)
    scale = 1 if layer.norm is None else np.asarray(layer.norm.direction(x)[1])
    for gate, power, rate in zip(layer.gates(x), s.gate_powers, s.gate_rates, strict=True):
        np.testing.assert_allclose(power, np.square(gate * scale).mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(rate, np.mean(np.asarray(gate) != 0, axis=0), rtol=1e-6)
