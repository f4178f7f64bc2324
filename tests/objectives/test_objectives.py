"""Objectives: values and relative gradients against autodiff in float64, whatever the chunks; minibatches unbiased."""

import itertools
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layer_kinds import LAYERS, correlated_inputs
from rotsparse._core.orthogonal import haar
from rotsparse.data import examples, moments
from rotsparse.data.examples import chunked_sum
from rotsparse.layers.function import FunctionLayer
from rotsparse.layers.gated import GatedMLP
from rotsparse.layers.mlp import MLP, Dense
from rotsparse.layers.norms import layer_norm, rms_norm
from rotsparse.layers.subspace import Subspace
from rotsparse.objectives import ActivationSparsity, Held, JacobianSparsity, WeightedSum, measures
from rotsparse.objectives.base import sampled

D, H, N = 5, 9, 13
MEASURES = [m() if name == "l4" else m(eps=0.3) for name, m in measures.MEASURES.items()]


@pytest.fixture(autouse=True)
def no_far_rows(monkeypatch):
    """The formulas take all rows; of a dozen, some may lie far from the others."""
    monkeypatch.setattr(moments, "FAR", 1e9)


def draw(rng, *shape):
    return rng.standard_normal(shape)


def make_layers(rng):
    return {
        "dense": Dense(draw(rng, 4, D), draw(rng, 4), activation="tanh"),
        "mlp": MLP(draw(rng, H, D), draw(rng, H), draw(rng, 4, H), activation="gelu", norm=layer_norm(draw(rng, D))),
        "gated": GatedMLP(draw(rng, H, D), draw(rng, H, D), draw(rng, D, H), norm=rms_norm(draw(rng, D)), skip=True),
        "function": FunctionLayer(lambda x: jnp.outer(jnp.sin(x), x)[np.triu_indices(D)], D, D * (D + 1) // 2),
    }


def bases_for(objective, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(objective.spaces))
    return {name: haar(k, d, jnp.float64) for k, (name, d) in zip(keys, objective.spaces.items(), strict=True)}


@eqx.filter_jit
def value_and_grad(objective, bases):
    return objective.value_and_grad(bases)


def in_chunks_of(objective, size):
    object.__setattr__(objective, "chunk", size)  # static, and set here only
    return objective


def assert_gradient(objective, bases, value=None):
    """The relative gradient against autodiff through `F(expm(Ω) R)` at Ω = 0."""
    value = objective.value if value is None else value
    got, grads = value_and_grad(objective, bases)
    np.testing.assert_allclose(got, eqx.filter_jit(value)(bases), rtol=1e-12)
    zero = jax.tree.map(jnp.zeros_like, bases)

    def along(omega):  # to first order, expm(Ω) = I + Ω
        return value({name: r + (omega[name] - omega[name].T) / 2 @ r for name, r in bases.items()})

    expected = eqx.filter_jit(jax.grad(along))(zero)
    for name in bases:
        np.testing.assert_allclose(grads[name], expected[name], rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(grads[name], -grads[name].T, atol=1e-15)


def naive_value(layer, x, measure, scale, bases, space_out="out", scale_outputs=False):
    """The formula of the docstring, by `jacfwd` and with every array in memory."""
    z = jax.vmap(jax.jacfwd(layer))(x)
    z = jnp.einsum("po,noi,ji->npj", bases[space_out], z, bases["in"])

    def deviations(vectors, r):
        sigma = jnp.cov(vectors.T, bias=True)
        sigma = sigma + 1e-6 * jnp.trace(sigma) / len(sigma) * jnp.eye(len(sigma))
        return jnp.sqrt(jnp.einsum("ij,jk,ik->i", r, sigma, r))

    if scale:
        z = z * deviations(x, bases["in"])
    if scale_outputs:
        z = z / deviations(jax.vmap(layer)(x), bases[space_out])[:, None]
    return jnp.mean(measure.example_value(z / jnp.sqrt(jnp.mean(z**2))))


@pytest.mark.parametrize("scales", [(True, False), (False, False), (True, True), (False, True)], ids=str)
@pytest.mark.parametrize("kind", ["dense", "mlp", "gated", "function"])
def test_jacobian_objective_is_the_formula(x64, rng, kind, scales):
    layer, x, measure = make_layers(rng)[kind], draw(rng, N, D) * np.arange(1, D + 1), measures.Log(0.3)
    inputs, outputs = scales
    objective = in_chunks_of(JacobianSparsity(layer, x, measure, scale_inputs=inputs, scale_outputs=outputs), 4)

    def value(bases):
        return naive_value(layer, objective.x, measure, inputs, bases, scale_outputs=outputs)

    assert_gradient(objective, bases_for(objective), value)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: type(m).__name__)
def test_gradient_of_every_measure(x64, rng, measure, scale):
    layer, x = make_layers(rng)["mlp"], draw(rng, N, D) * np.arange(1, D + 1)
    objective = JacobianSparsity(layer, x, measure, scale_inputs=scale)
    assert_gradient(objective, bases_for(objective))
    activations = ActivationSparsity(x, measure)
    assert_gradient(activations, bases_for(activations))


@pytest.mark.parametrize("scale_outputs", [False, True])
def test_a_tied_space_adds_both_gradients(x64, rng, scale_outputs):
    objective = JacobianSparsity(
        make_layers(rng)["gated"], draw(rng, N, D), measures.Log(0.3), space_out="in", scale_outputs=scale_outputs
    )
    assert list(objective.spaces) == ["in"]
    assert_gradient(objective, bases_for(objective))


@pytest.mark.parametrize("scale_outputs", [False, True])
def test_chunks_do_not_matter(x64, rng, scale_outputs):
    layer, x = make_layers(rng)["mlp"], draw(rng, N, D)
    objective = JacobianSparsity(layer, x, measures.Log(0.3), scale_outputs=scale_outputs)
    bases = bases_for(objective)
    whole = objective.value_and_grad(bases)
    for size in (1, 2, 5, 12, N):
        parts = in_chunks_of(objective, size).value_and_grad(bases)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14), parts, whole)


def test_chunked_sum_counts_every_example_once():
    x = jnp.arange(14.0).reshape(7, 2)
    for size in range(1, 9):
        total = chunked_sum(lambda c, w: (jnp.sum(w), w @ c), x, size)
        np.testing.assert_allclose(total[0], 7)
        np.testing.assert_allclose(total[1], x.sum(0))


@pytest.mark.parametrize("chunk", [1, 3])
def test_what_is_prepared_of_many_examples_reaches_the_sum_of_each(monkeypatch, chunk):
    monkeypatch.setattr(examples, "PREPARED_AT_ONCE", 4)  # a chunk of four, and one of three with a copy
    x, seen = jnp.arange(14.0).reshape(7, 2), []

    def prepare(rows):
        seen.append(len(rows))
        return rows**2, {"sum": rows.sum(axis=1)}

    def function(rows, weights, prepared):
        square, of = prepared
        assert len(rows) == len(square) == len(of["sum"]) == chunk
        return weights @ square, weights @ (of["sum"] - rows.sum(axis=1))

    squares, nothing = chunked_sum(function, x, chunk, prepare=prepare)
    np.testing.assert_allclose(squares, (x**2).sum(axis=0))
    assert nothing == 0 and set(seen) == {4 if chunk == 1 else 3}


@pytest.mark.parametrize("name", ["mlp", "gated", "residual", "function"])
def test_examples_one_at_a_time_do_not_matter(x64, rng, monkeypatch, name):
    monkeypatch.setattr(examples, "PREPARED_AT_ONCE", 5)
    layer, x = LAYERS[name](rng), correlated_inputs(rng, N).astype(np.float64)
    layer = jax.tree.map(lambda w: np.asarray(w, np.float64) if eqx.is_array_like(w) else w, layer)
    objective = JacobianSparsity(layer, x, measures.Log(0.3))
    bases = bases_for(objective)
    together = objective.value(bases), objective.value_and_grad(bases)
    objective = in_chunks_of(objective, 1)
    alone = objective.value(bases), objective.value_and_grad(bases)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13), alone, together)


def test_scaled_outputs_have_no_unit(x64, rng):
    """Outputs of another size change nothing where the rotation does not mix them."""
    x, w, size = draw(rng, N, D), draw(rng, 4, D), np.array([1.0, 3.0, 0.3, 10.0])
    bases = {"in": jnp.eye(D), "out": jnp.eye(4)}
    plain, sized = (
        JacobianSparsity(Dense(matrix, activation="identity"), x, measures.Log(0.3), scale_outputs=True).value(bases)
        for matrix in (w, w * size[:, None])
    )
    np.testing.assert_allclose(plain, sized, rtol=1e-3)  # the floor of the variance is that of all outputs


def test_scaled_outputs_have_to_vary(rng):
    x = draw(rng, N, D).astype(np.float32)
    layer = FunctionLayer(lambda x: jnp.zeros(3) * x[:3], D, 3)
    with pytest.raises(ValueError, match="zero for every example"):
        JacobianSparsity(layer, x, measures.Log(0.3), scale_outputs=True)
    with pytest.raises(ValueError, match="needs all entries: leave submatrix out"):
        whole = JacobianSparsity(Dense(draw(rng, 4, D).astype(np.float32)), x, measures.Log(0.3), scale_outputs=True)
        whole.subsampled(jax.random.key(0), (2, 2))


def test_no_array_of_all_jacobians_is_made(rng):
    """Memory does not grow with the number of examples: no intermediate has as many entries as all Jacobians."""
    n, d = 4000, 16
    layer, x = Dense(draw(rng, d, d).astype(np.float32)), draw(rng, n, d).astype(np.float32)
    objective = in_chunks_of(JacobianSparsity(layer, x, measures.Log(0.1)), 20)
    bases = {"in": jnp.eye(d), "out": jnp.eye(d)}
    memory = jax.jit(lambda o, b: o.value_and_grad(b)).lower(objective, bases).compile().memory_analysis()
    assert memory.temp_size_in_bytes < n * d * d * 4 / 8


def test_minibatches_are_unbiased(x64, rng):
    layer, x = make_layers(rng)["dense"], draw(rng, 40, D)
    for full in (JacobianSparsity(layer, x, measures.Log(0.3)), ActivationSparsity(x, measures.Log(0.3))):
        bases = bases_for(full)
        value, grads = full.value_and_grad(bases)
        keys = jax.random.split(jax.random.key(0), 4000)
        assert sampled(full, keys[0], 8).examples[0].x.shape == (8, D)
        values, sampled_grads = jax.lax.map(lambda k, o=full, b=bases: sampled(o, k, 8).value_and_grad(b), keys)
        standard_error = jnp.std(values) / np.sqrt(len(keys))
        assert standard_error > 0
        assert abs(values.mean() - value) < 5 * standard_error
        for name, g in grads.items():
            error = jnp.std(sampled_grads[name], axis=0) / np.sqrt(len(keys))
            assert (jnp.abs(sampled_grads[name].mean(0) - g) <= 5 * error + 1e-12).all()


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_submatrices_are_unbiased(x64, rng, scale, tied):
    """Exactly: the mean over all choices of rows and columns is the whole."""
    layer, x = make_layers(rng)["gated" if tied else "mlp"], draw(rng, N, D) * np.arange(1, D + 1)
    space_out = "in" if tied else "out"
    whole = JacobianSparsity(layer, x, measures.Log(0.3), scale_inputs=scale, space_out=space_out)
    bases = bases_for(whole)
    columns = jnp.asarray(list(itertools.combinations(range(D), 3)))
    rows = jnp.asarray(list(itertools.combinations(range(layer.d_out), 2)))
    sample: Any = sampled(whole, jax.random.key(0), None, (2, 3))

    def on(drawn):
        part = eqx.tree_at(lambda o: (o.drawn.rows, o.drawn.columns), sample, drawn)
        return part.value(bases), part.value_and_grad(bases)

    value, both = jax.vmap(lambda r: jax.vmap(lambda c: on((r, c)))(columns))(rows)
    np.testing.assert_allclose(value.mean(), whole.value(bases), rtol=1e-12)
    means = jax.tree.map(lambda a: a.mean(axis=(0, 1)), both)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), means, whole.value_and_grad(bases)
    )
    assert float(value.std()) > 0


def test_submatrices_are_drawn_uniformly(rng):
    layer = make_layers(rng)["dense"]
    objective = JacobianSparsity(layer, draw(rng, N, D).astype(np.float32), measures.Log(0.3))
    draw_one: Any = lambda k: sampled(objective, k, None, (2, 3))  # noqa: E731
    draws = jax.vmap(lambda k: draw_one(k).drawn)(jax.random.split(jax.random.key(0), 3000))
    for drawn, d in ((draws.rows, 4), (draws.columns, D)):
        ordered = np.sort(np.asarray(drawn), axis=1)
        assert (ordered[:, 1:] > ordered[:, :-1]).all()  # without replacement
        share = np.bincount(np.ravel(drawn), minlength=d) / drawn.size
        np.testing.assert_allclose(share, 1 / d, atol=0.03)


def test_weighted_sum_shares_spaces(x64, rng):
    layer, x = make_layers(rng)["dense"], draw(rng, N, D)
    jacobian = JacobianSparsity(layer, x, measures.Log(0.3))
    total = WeightedSum([jacobian, ActivationSparsity(x, measures.Log(0.5))], [1.0, 0.25])
    assert total.spaces == {"in": D, "out": 4}
    assert_gradient(total, bases_for(total))
    with pytest.raises(ValueError, match="dimension"):
        WeightedSum([jacobian, ActivationSparsity(draw(rng, N, 3), measures.Log(0.5))])
    with pytest.raises(ValueError, match="one weight for each term"):
        WeightedSum([jacobian], [1.0, 2.0])


def test_held_spaces_are_out_of_sight(x64, rng):
    objective = JacobianSparsity(make_layers(rng)["dense"], draw(rng, N, D), measures.Log(0.3))
    bases = bases_for(objective)
    held = Held(objective, {"out": bases["out"]})
    assert held.spaces == {"in": D}
    value, grads = held.value_and_grad({"in": bases["in"]})
    expected, expected_grads = objective.value_and_grad(bases)
    np.testing.assert_allclose(value, expected)
    np.testing.assert_allclose(grads["in"], expected_grads["in"])
    assert list(grads) == ["in"]


def test_objective_within_a_subspace(x64, rng):
    layer, x = make_layers(rng)["mlp"], draw(rng, N, D)
    objective = JacobianSparsity(layer, x, measures.Log(0.3))
    subspace = Subspace(layer, jnp.asarray(np.eye(D)[:3]), jnp.asarray(np.eye(4)[:2]))
    small = objective.within(subspace)
    assert small.spaces == {"in": 3, "out": 2}
    assert_gradient(small, bases_for(small))


def test_bad_input(rng):
    layer, x = make_layers(rng)["dense"], draw(rng, N, D).astype(np.float32)
    log = measures.Log()
    with pytest.raises(ValueError, match=r"should have shape \[examples, 5\].*got \[5, 13\].*transposed"):
        JacobianSparsity(layer, x.T, log)
    with pytest.raises(ValueError, match="at least 2 are needed"):
        JacobianSparsity(layer, x[:1], log)
    with pytest.raises(ValueError, match="NaN or infinity"):
        JacobianSparsity(layer, np.where(x > 1, np.nan, x), log)
    with pytest.raises(ValueError, match="zero variance"):
        JacobianSparsity(layer, np.ones_like(x), log)
    with pytest.raises(ValueError, match=r"beyond the range of float32"):
        JacobianSparsity(layer, 1e39 * x.astype(np.float64), log)
    with pytest.raises(ValueError, match="zero variance"):  # ... in the precision that is computed with
        JacobianSparsity(layer, 1e9 + x.astype(np.float64), log)
    dead = Dense(np.ones((4, D), np.float32), np.full(4, -1e3, np.float32))
    with pytest.raises(ValueError, match="Jacobian is zero for every example"):
        JacobianSparsity(dead, x, log)
    far = Dense(np.full((4, D), 1e30, np.float32))
    with pytest.raises(ValueError, match="overflows float32"):
        JacobianSparsity(far, x, log)
    with pytest.raises(ValueError, match="float32 or float64, got float16"):
        ActivationSparsity(x.astype(np.float16), log)
    with pytest.raises(ValueError, match="float32 or float64, got int64"):
        ActivationSparsity(x.astype(np.int64), log)
    with pytest.raises(ValueError, match="tied fit needs d_in = d_out"):
        JacobianSparsity(layer, x, log, space_out="in")


def test_submatrices_that_cannot_be_drawn(rng, untyped):
    layer, x, key = make_layers(rng)["dense"], draw(rng, N, D).astype(np.float32), jax.random.key(0)
    objective = JacobianSparsity(layer, x, measures.Log())
    for size in [(1, 3), (2, 0), (2,), (2, 2, 2)]:
        with pytest.raises(ValueError, match=rf"at least two of each, got {re.escape(str(size))}"):
            sampled(objective, key, None, size)
    with pytest.raises(ValueError, match="elementwise measure, and Hoyer is not"):
        sampled(JacobianSparsity(layer, x, measures.Hoyer()), key, None, (2, 2))
    with pytest.raises(ValueError, match="drawn from Jacobians, and ActivationSparsity has none"):
        sampled(ActivationSparsity(x, measures.Log()), key, None, (2, 2))


@pytest.mark.parametrize("size", [(5, 3), (2, 6), (100, 100)])
def test_a_submatrix_has_no_more_rows_and_columns_than_the_layer(x64, rng, size):
    layer, x = make_layers(rng)["dense"], draw(rng, N, D)
    objective = JacobianSparsity(layer, x, measures.Log(0.3))
    part = sampled(objective, jax.random.key(0), None, size)
    assert isinstance(part, JacobianSparsity) and part.drawn is not None
    assert (len(set(part.drawn.rows.tolist())), len(set(part.drawn.columns.tolist()))) == (
        min(size[0], 4),
        min(size[1], D),
    )
    if size == (100, 100):
        bases = bases_for(objective)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-14),
            part.value_and_grad(bases),
            objective.value_and_grad(bases),
        )
