"""Interventions on named directions, against the arithmetic by hand; and generation with them against `run`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rotsparse._core.orthogonal import haar
from rotsparse.models import Ablate, Clamp, Resample, Steer, Swap, generate, run
from tiny_models import tiny, tiny_llama2c

TOKENS = np.random.default_rng(0).integers(0, 31, (4, 7))


@pytest.fixture(scope="module")
def model():
    return tiny_llama2c()


@pytest.fixture(scope="module")
def r():
    return np.asarray(haar(jax.random.key(0), 16))


def values(model, intervene=None, point=(0, "output")):
    return np.asarray(run(model.params, model.config, TOKENS, capture=(point,), intervene=intervene)[1][point])


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda d: Ablate(d), lambda z: np.zeros_like(z)),
        (lambda d: Ablate(d, np.array([1.0, -2.0])), lambda z: np.broadcast_to([1.0, -2.0], z.shape)),
        (lambda d: Clamp(d, high=0.1), lambda z: np.minimum(z, 0.1)),
        (lambda d: Clamp(d, np.array([-0.1, 0.0]), np.array([0.1, 0.2])), lambda z: np.clip(z, [-0.1, 0], [0.1, 0.2])),
        (lambda d: Steer(d, np.array([3.0, 0.0])), lambda z: z + np.array([3.0, 0.0])),
        (lambda d: Swap(d), lambda z: z[[2, 3, 0, 1]]),
    ],
    ids=["zero", "value", "clamp", "clamp each", "steer", "swap"],
)
def test_the_coordinates_change_and_nothing_across_them(make, expected, model, r):
    before, after = values(model), values(model, {(0, "output"): make(r[[3, 5]])})
    z = before @ r.T
    z[..., [3, 5]] = expected(z[..., [3, 5]])
    np.testing.assert_allclose(after @ r.T, z, atol=1e-5)


def test_resampled_coordinates_are_those_of_other_tokens(model, r):
    change = Resample(r[[3, 5]], key=jax.random.key(1))
    before, after = (values(model, i) @ r.T for i in (None, {(0, "output"): change}))
    rows, drawn = before[..., [3, 5]].reshape(-1, 2), after[..., [3, 5]].reshape(-1, 2)
    np.testing.assert_allclose(np.sort(rows, axis=0), np.sort(drawn, axis=0), atol=1e-5)
    assert np.abs(rows - drawn).max() > 1e-2
    others = np.delete(np.arange(16), [3, 5])
    np.testing.assert_allclose(after[..., others], before[..., others], atol=1e-5)


def test_bad_directions_are_refused(r):
    with pytest.raises(ValueError, match=r"rows \[k, d\], got \[16\]: of one take r\[\[17\]\]"):
        Ablate(r[3])
    with pytest.raises(ValueError, match="should be orthonormal"):
        Ablate(2 * r[[3]])
    with pytest.raises(ValueError, match="got 3 prompts"):
        Swap(r[[3]])(jnp.zeros((3, 2, 16)))


def test_an_intervention_is_a_pytree_that_compiles_once(model, r):
    traces = []

    @jax.jit
    def logits(change):
        traces.append(1)
        return run(model.params, model.config, TOKENS, intervene={(0, "output"): change})[0]

    for number in range(3):
        logits(Ablate(jnp.asarray(r[[number]]), jnp.asarray([float(number)])))
    assert len(traces) == 1


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generated_text_is_that_of_the_changed_network(name, r):
    model = tiny(name)
    change = {(0, "output"): Steer(r[[3]], 4.0), (1, "input"): Ablate(r[[1]])}
    text = generate(model, TOKENS, 14, intervene=change)
    for n in range(7, 14):
        logits = run(model.params, model.config, text[:, :n], intervene=change)[0]
        np.testing.assert_array_equal(text[:, n], np.argmax(logits[:, -1], axis=-1))
    assert (text != generate(model, TOKENS, 14)).any(), "steering changes something"
    with pytest.raises(ValueError, match=r"no point 7\.output"):
        generate(model, TOKENS, 14, intervene={(7, "output"): change[0, "output"]})


def test_nothing_changes_without_an_intervention(model):
    key = jax.random.key(0)
    first = generate(model, TOKENS, 12, key=key, temperature=0.8)
    np.testing.assert_array_equal(first, generate(model, TOKENS, 12, key=key, temperature=0.8, intervene={}))
