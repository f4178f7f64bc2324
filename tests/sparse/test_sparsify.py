"""From a model and tokens to sparse inputs: calibration, bases, budgets, costs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rotsparse import models
from rotsparse._core.modules import replace_fields
from rotsparse.models.transformer import Point, site_width
from rotsparse.runs import sparse_run
from rotsparse.sparse import bases, budget, plans
from rotsparse.sparse.calibration import activations, fisher_information, sequences
from rotsparse.sparse.inputs import SparseInput
from rotsparse.sparse.perplexity import costs
from rotsparse.sparse.shifts import trained_shifts
from sparse_models import sparse_inputs
from tiny_models import inputs, tiny

SITES = ("attention", "heads", "input", "hidden")


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2", "qwen3", "olmo2"])
def test_activations_come_a_layer_at_a_time_as_the_whole_model_has_them(name, tmp_path):
    model, tokens = tiny(name), inputs(name)
    points = tuple((layer, site) for layer in range(2) for site in SITES)
    whole = models.run(model.params, model.config, tokens, capture=points)[1]
    for layer, values in activations(model, tokens, SITES, tmp_path, layers=range(2), batch=1):
        for site in SITES:
            expected = np.asarray(whole[Point(layer, site)]).reshape(-1, values[site].shape[1])
            np.testing.assert_allclose(values[site], expected, atol=1e-5)
    assert not list(tmp_path.iterdir())


def test_fisher_information_is_the_mean_of_gradients_squared():
    model, tokens = tiny("llama"), inputs("llama")[:1]
    point, key = Point(1, "input"), jax.random.key(3)
    found = fisher_information(model, tokens, [point], key=key)[point]
    logits = models.run(model.params, model.config, tokens)[0]
    drawn = jax.random.categorical(jax.random.fold_in(key, 0), logits)

    def loss(added):
        out = models.run(model.params, model.config, tokens, intervene={point: lambda v: v + added})[0]
        return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(out), drawn[..., None], axis=-1))

    g = np.asarray(jax.grad(loss)(jnp.zeros((1, tokens.shape[1], 16)))).reshape(-1, 16)
    np.testing.assert_allclose(found, g.T @ g / len(g), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("name", "batch"), [("llama", 1), ("gpt2", 1), ("llama", 3)])
def test_costs_are_those_of_interventions_in_the_whole_model(name, batch):
    model, tokens = tiny(name), np.concatenate([inputs(name), inputs(name)[::-1] // 2])
    trials = [sparse_inputs(model), {(1, "hidden"): SparseInput(threshold=0.1)}, {}]
    shown: list[float] = []
    found = costs(model, tokens, trials, batch=batch, progress=shown.append)
    assert shown == sorted(shown) and shown[-1] == 1
    whole = jax.nn.log_softmax(models.run(model.params, model.config, tokens)[0])
    at = tokens[:, 1:, None]
    for trial, rise, divergence in zip(trials, found.rise, found.divergence, strict=True):
        logits = models.run(model.params, model.config, tokens, intervene=trial)[0] if trial else whole
        other = jax.nn.log_softmax(logits)
        lost = -np.take_along_axis(np.asarray(other - whole)[:, :-1], at, axis=-1)[..., 0].mean(axis=1)
        np.testing.assert_allclose(rise, lost, atol=1e-4)
        np.testing.assert_allclose(divergence, (np.exp(whole) * (whole - other)).sum(-1).mean(1), atol=1e-4)
    assert np.abs(found.rise[2]).max() < 1e-5 < found.divergence[0].min()


@pytest.mark.parametrize("name", bases.BASELINES)
def test_baselines_are_rotations_of_their_kind(name, rng):
    x, w = rng.standard_normal((500, 12)) * np.linspace(1, 3, 12), rng.standard_normal((7, 12))
    basis = bases.baseline(name, x.T @ x / 500, w)
    if name in ("none", "wina"):
        assert basis.rotation is None
    else:
        back = basis.rotation.T if basis.inverse is None else basis.inverse
        np.testing.assert_allclose(basis.rotation @ back, np.eye(12), atol=1e-4)
        assert (basis.inverse is None) == (name != "weighted")
    if name == "pca":
        powers = np.square(x @ basis.rotation.T).sum(0)
        assert (np.diff(powers) < 0).all()
    if name == "wina":
        np.testing.assert_allclose(np.asarray(basis.scores), np.linalg.norm(w, axis=0), rtol=1e-5)
    kept = bases.baseline(name, x.T @ x / 500, w, rotate=False)
    assert kept.rotation is None


def test_components_in_a_metric_lose_least_of_what_it_measures(rng):
    """Of all ways to drop half of the coordinates, the same ones of each example: no basis does better than those of
    Eckart and Young."""
    x, a = rng.standard_normal((2000, 8)) * np.geomspace(3, 0.3, 8), rng.standard_normal((8, 8))
    metric = a.T @ a + 0.1 * np.eye(8)

    def error(basis):
        back = basis.rotation.T if basis.inverse is None else basis.inverse
        e = (x @ basis.rotation[4:].T) @ back[:, 4:].T
        return np.einsum("ni,ij,nj->", e, metric, e)

    moment = x.T @ x / len(x)
    ours, pca = bases.components(moment, metric), bases.components(moment)
    root = np.linalg.cholesky(metric).T
    least = len(x) * np.linalg.eigvalsh(root @ moment @ root.T)[:4].sum()
    np.testing.assert_allclose(error(ours), least, rtol=1e-4)
    assert error(pca) > 1.2 * least


def test_learned_bases_lose_less_of_what_the_metric_measures(rng):
    """Sources that are mixed by no rotation."""
    sources = rng.laplace(size=(4000, 6)).astype(np.float32)
    x, metric = sources @ rng.standard_normal((6, 6)).astype(np.float32), np.diag(np.geomspace(0.1, 10, 6))

    def error(basis):
        z = x @ basis.rotation.T
        kept = np.abs(z) >= np.sort(np.abs(z), axis=1)[:, [3]]
        e = np.where(kept, 0, z) @ (basis.rotation.T if basis.inverse is None else basis.inverse).T
        return np.einsum("ni,ij,nj->", e, metric, e)

    found = bases.learned(x, metric, keep=0.5, key=jax.random.key(0), steps=200)
    assert found.rotation is not None and found.inverse is not None
    np.testing.assert_allclose(found.rotation @ found.inverse, np.eye(6), atol=1e-4)
    moment = x.T @ x / len(x)
    start = bases.components(moment, bases.damped(metric))
    assert error(found) < 0.97 * error(start) and error(start) < error(bases.components(moment))


def test_heads_that_share_values_share_a_rotation(rng):
    x = rng.standard_normal((500, 12))
    r = bases.baseline("pca", x.T @ x / 500, np.eye(12), heads=(4, 2)).rotation
    blocks = r.reshape(4, 3, 4, 3)
    assert np.abs(blocks[0, :, 1]).max() == 0
    np.testing.assert_array_equal(blocks[0, :, 0], blocks[1, :, 1])
    assert np.abs(blocks[1, :, 1] - blocks[2, :, 2]).max() > 0.01
    metric = bases.damped(np.cov(rng.standard_normal((12, 50))))
    basis = bases.weighed(bases.components(x.T @ x / 500, metric, heads=(4, 2)), metric)
    assert basis.rotation is not None and basis.inverse is not None and basis.scores is not None
    np.testing.assert_allclose(basis.rotation @ basis.inverse, np.eye(12), atol=1e-5)
    np.testing.assert_array_equal(basis.rotation[:3, :3], basis.rotation[3:6, 3:6])
    unit = np.einsum("ji,jk,ki->i", basis.inverse, bases.damped(metric), basis.inverse)
    np.testing.assert_allclose(basis.scores**2, unit / unit.mean(), rtol=1e-4)


def test_budgets_are_the_cheapest(rng):
    shares = budget.SHARES
    curves = {name: scale * np.maximum(0, 1 - shares) ** power for name, scale, power in
              (("a", 1.0, 2), ("b", 0.1, 3), ("c", 5.0, 2.5))}  # fmt: skip
    weights = {"a": 100, "b": 300, "c": 50}
    kept = budget.allotted(curves, weights, 0.5)
    read = sum(weights[name] * share for name, share in kept.items())
    assert 0.47 * 450 <= read <= 0.5 * 450 + 1e-6

    def cost(plan):
        return sum(curves[name][np.argmin(abs(shares - share))] for name, share in plan.items())

    affordable = (dict(zip("abc", plan, strict=True)) for plan in itertools.product(shares[::5], repeat=3)
                  if sum(weights[n] * k for n, k in zip("abc", plan, strict=True)) <= 225)  # fmt: skip
    assert cost(kept) <= 1.03 * min(map(cost, affordable))


def test_a_curve_passes_its_measurements_and_falls():
    found = budget.curve([0.8, 0.05])
    at = [int(np.argmin(abs(budget.SHARES - share))) for share in budget.MEASURED]
    np.testing.assert_allclose(found[at], [0.8, 0.05])
    assert (np.diff(found) < 0).all() and found[-1] == 0


def test_each_choice_keeps_the_share_it_says(rng):
    z = rng.standard_normal((4000, 10)).astype(np.float32)
    point = Point(0, "input")
    sites = {point: plans.Measured(bases.Basis(None, None), None, budget.thresholds(z), 10)}
    for choice in (plans.LARGEST, plans.THRESHOLDS):
        (made,) = plans.sparse_inputs(sites, {point: 0.4}, choice).values()
        kept = np.count_nonzero(np.asarray(made.coordinates(jnp.asarray(z)))) / z.size
        assert kept == pytest.approx(0.4, abs=0.01)


def test_a_model_without_a_next_token_is_refused(tmp_path):
    np.save(tmp_path / "tokens.npy", np.zeros(100, np.int64))
    with pytest.raises(ValueError, match="predicts no next token"):
        sequences(tiny("bert"), models.TokenFile(tmp_path / "tokens.npy"), 16)


def test_coordinates_that_are_dropped_can_take_their_mean(rng):
    x = (rng.standard_normal((4000, 6)) * np.linspace(0.2, 2, 6) + np.linspace(0.5, 0, 6)).astype(np.float32)
    lost = []
    for absorb in (False, True):
        of = sparse_run.measured(x, bases.Basis(None, None), absorb=absorb, keep=0.5)
        (made,) = plans.sparse_inputs({Point(0, "input"): of}, {Point(0, "input"): 0.5}, plans.THRESHOLDS).values()
        lost.append(float(np.square(np.asarray(made(jnp.asarray(x))) - x).mean()))
        assert np.count_nonzero(np.asarray(made.coordinates(jnp.asarray(x)))) == pytest.approx(0.5 * x.size, rel=0.02)
    assert lost[1] < 0.8 * lost[0]


def test_trained_shifts_bring_the_predictions_nearer():
    model, tokens = tiny("llama"), inputs("llama")
    given = {point: replace_fields(of, count=None, threshold=0.5) for point, of in sparse_inputs(model).items()}
    shares = []
    found = trained_shifts(model, tokens, given, steps=100, key=jax.random.key(0), progress=shares.append)
    assert list(found) == list(given) and shares[-1] == 1 and len(shares) == 100
    for point, of in found.items():
        assert of.threshold == 0.5 and of.rotation is given[point].rotation
        assert np.abs(np.asarray(of.shift)).max() > 0.01
    before, after = costs(model, tokens, [given, found]).divergence.mean(axis=1)
    assert after < 0.9 * before


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_the_first_step_of_shifts_goes_down_the_gradient(name):
    """That of the whole model, written down at once."""
    model, tokens = tiny(name), inputs(name)[:1]
    given: dict = {(1, site): SparseInput(threshold=0.3) for site in SITES}

    def loss(shifts):
        change = {point: replace_fields(of, shift=shifts[point]) for point, of in given.items()}
        logits = (models.run(model.params, model.config, tokens, intervene=at)[0] for at in ({}, change))
        whole, sparse = map(jax.nn.log_softmax, logits)
        return jnp.mean(jnp.sum(jnp.exp(whole) * (whole - sparse), axis=-1))

    gradients = jax.grad(loss)({point: jnp.zeros(site_width(model.config, point[1])) for point in given})
    found = trained_shifts(model, tokens, given, steps=1, key=jax.random.key(0))
    for point, g in gradients.items():
        clear = np.abs(g) > 1e-4  # Adam's first step has the size of the rate, whatever the gradient's
        assert clear.any()
        np.testing.assert_allclose(found[point].shift[clear], -0.01 * 0.3 * np.sign(g)[clear], rtol=0.01)


def test_shifts_need_thresholds():
    model = tiny("llama")
    with pytest.raises(ValueError, match="has a count instead"):
        trained_shifts(model, inputs("llama"), {(0, "input"): SparseInput(count=3)}, steps=1, key=jax.random.key(0))
