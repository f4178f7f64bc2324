"""What directions are worth: against the network run with each direction held, one at a time."""

import jax
import numpy as np
import pytest

from rotsparse._core.orthogonal import haar
from rotsparse.explain.ablations import costs, divergence, logit_difference, rise
from rotsparse.models import cross_entropy, run
from rotsparse.models.transformer import run_from, stream_before
from tiny_models import tiny, tiny_llama2c

TOKENS = np.random.default_rng(0).integers(0, 31, (6, 12))
POINT = (1, "output")


@pytest.fixture(scope="module")
def model():
    return tiny_llama2c()


@pytest.fixture(scope="module")
def r():
    return np.asarray(haar(jax.random.key(0), 16))


def test_a_run_from_a_layer_on_is_the_whole_run(model):
    whole, seen = run(model.params, model.config, TOKENS, capture=(POINT,))
    stream = stream_before(model.params, model.config, TOKENS, 1)
    rest, captured = run_from(model.params, model.config, stream, 1, capture=(POINT,))
    np.testing.assert_array_equal(rest, whole)
    np.testing.assert_array_equal(captured[POINT], seen[POINT])


def logits(model, change=None):
    return run(model.params, model.config, TOKENS, intervene={POINT: change} if change else {})[0]


@pytest.mark.parametrize("metric", [rise, divergence, logit_difference(3, 5)], ids=["rise", "divergence", "logits"])
def test_a_cost_is_the_rise_of_the_score(model, r, metric):
    found = costs(model, POINT, r, TOKENS, metric, side="out", numbers=[2, 7], controls=2, key=jax.random.key(1))
    assert [of.number for of in found] == list(range(16)) and {of.side for of in found} == {"out"}
    whole = logits(model)
    y = np.asarray(run(model.params, model.config, TOKENS, capture=(POINT,))[1][POINT])
    for of in found:
        if of.number not in (2, 7):
            assert of.cost is None and of.controls == ()
            continue
        z = y @ r[of.number]
        held = logits(model, lambda x, i=of.number, z=z: x + (z.mean() - x @ r[i])[..., None] * r[i])
        scores = np.asarray(metric(held, whole, TOKENS) - metric(whole, whole, TOKENS)).mean(axis=1)
        assert of.cost == pytest.approx(scores.mean(), rel=1e-3, abs=1e-5)
        assert of.error == pytest.approx(scores.std(ddof=1) / np.sqrt(6), rel=1e-2, abs=1e-5)
        assert len(of.controls) == 2 and len(set(of.controls)) == 2


def test_a_control_takes_away_as_much(model, r):
    """Along the direction itself the control would be the cost: only the direction differs."""
    one = costs(model, POINT, r, TOKENS, side="out", numbers=[2], controls=40, key=jax.random.key(0))[2]
    y = np.asarray(run(model.params, model.config, TOKENS, capture=(POINT,))[1][POINT])
    z = y @ r[2]
    draws = np.random.default_rng(0).standard_normal((40, 16))
    before = np.asarray(cross_entropy(logits(model), TOKENS)).mean()
    by_hand = []
    for u in (draws / np.linalg.norm(draws, axis=1, keepdims=True)).astype(np.float32):
        held = logits(model, lambda x, u=u: x + (z.mean() - x @ r[2])[..., None] * u)
        by_hand.append(np.asarray(cross_entropy(held, TOKENS)).mean() - before)
    spread = np.std(by_hand) / np.sqrt(40) + np.std(one.controls) / np.sqrt(40)
    assert abs(np.mean(one.controls) - np.mean(by_hand)) < 4 * spread


def test_the_estimate_is_the_slope_of_the_cost(model, r):
    found = costs(model, POINT, r, TOKENS, side="out", key=jax.random.key(0))
    y = np.asarray(run(model.params, model.config, TOKENS, capture=(POINT,))[1][POINT])

    def score(i, share):
        change = lambda x: x + share * (z.mean() - x @ r[i])[..., None] * r[i]  # noqa: E731
        return np.asarray(cross_entropy(logits(model, change), TOKENS)).mean()

    for i in (0, 9):
        z = y @ r[i]
        slope = (score(i, 0.05) - score(i, -0.05)) / 0.1
        assert found[i].estimate == pytest.approx(slope, rel=0.05, abs=2e-4)


def test_a_model_without_a_head_has_no_score(r):
    with pytest.raises(ValueError, match="no next-token head: nothing to score"):
        costs(tiny("bert"), POINT, r, TOKENS, side="out", key=jax.random.key(0))
