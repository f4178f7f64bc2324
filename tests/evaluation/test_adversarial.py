"""Adversarial ablation against brute force, and where the answer is known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rotsparse as rs
from rotsparse.evaluation.ablation import EdgeAblation
from rotsparse.evaluation.adversarial import adversarial_ablation

KEY = jax.random.key(0)


@pytest.fixture
def block(rng):
    """A linear layer with four large entries and sixteen small ones, inputs, and its edges in the basis of neurons."""
    w = 0.02 * rng.standard_normal((4, 5)).astype(np.float32)
    w[np.arange(4), np.arange(4)] = 1
    layer = rs.Dense(w, activation="identity")
    x = (rng.standard_normal((80, 2)) @ rng.standard_normal((2, 5)) + rng.standard_normal((80, 5))).astype(np.float32)
    return layer, x, EdgeAblation(layer, x, rs.Rotations.identity(5, 4))


def test_relaxed_masks_pass_through_the_real_ones(rng):
    layer = rs.MLP(*(rng.standard_normal(s).astype(np.float32) for s in ((9, 6), (9,), (5, 9))), activation="gelu")
    x = rng.standard_normal((30, 6)).astype(np.float32)
    ablation = EdgeAblation(layer, x, rs.Rotations.haar(KEY, 6, 5))
    for kept in (0, 11, 30):
        relaxed = ablation.relaxed(jnp.asarray(x), jnp.asarray(ablation.mask(kept), jnp.float32))
        np.testing.assert_allclose(relaxed, ablation.outputs(x, kept), atol=1e-5)


def test_relaxed_masks_share_copies(rng):
    layer = rs.Dense(rng.standard_normal((3, 8)).astype(np.float32), activation="tanh")
    x = rng.standard_normal((30, 8)).astype(np.float32)
    ablation = EdgeAblation(layer, x, rs.Rotations.haar(KEY, 4, 3), copies=2)
    relaxed = ablation.relaxed(jnp.asarray(x), jnp.asarray(ablation.mask(7), jnp.float32))
    np.testing.assert_allclose(relaxed, ablation.outputs(x, 7), atol=1e-5)


def test_the_worst_combination_is_nearly_that_of_brute_force(block):
    """Of all ways to cut five of the small entries."""
    layer, x, ablation = block
    found = adversarial_ablation(ablation, x, share=5 / 16, key=KEY)
    small = np.flatnonzero(np.sqrt(ablation.importance) < 0.1 * np.sqrt(ablation.importance.mean()))
    assert (found.small, found.cut) == (len(small), round(5 / 16 * len(small))) and len(small) >= 12
    centred = np.asarray(x - x.mean(axis=0), np.float64)
    w, variance = np.asarray(layer.weights()["w"], np.float64), np.var(np.asarray(layer(jnp.asarray(x))), axis=0).sum()

    def loss(cut):
        missing = np.zeros(20)
        missing[list(cut)] = w.ravel()[list(cut)]
        return np.square(centred @ missing.reshape(4, 5).T).sum() / (len(x) * variance)

    worst = max(map(loss, itertools.combinations(small, found.cut)))
    assert 0.9 * worst < found.worst < 1.001 * worst
    assert found.worst == pytest.approx(loss(np.flatnonzero(found.mask)), rel=1e-3)
    assert found.every == pytest.approx(loss(small), rel=1e-3)
    assert found.whole == pytest.approx(0, abs=1e-9)
    assert max(found.random) <= found.worst and len(found.random) == 8
    assert set(np.flatnonzero(found.mask)) <= set(small)
    assert adversarial_ablation(ablation, x, share=5 / 16, key=KEY).worst == found.worst
    assert f"Cutting {found.cut} of the {len(small)} entries called practically zero" in found.sentence()


def test_small_entries_that_conspire_are_found_out(rng):
    """An output that adds and subtracts inputs that move together: the adversary cuts those that it adds."""
    w = np.zeros((2, 41), np.float32)
    w[0, 0], w[1, 1:] = 10, 0.05 * np.repeat([1, -1], 20)
    x = rng.standard_normal((200, 41)).astype(np.float32)
    x[:, 1:] = x[:, 1:2] + 0.01 * x[:, 1:]
    layer = rs.Dense(w, activation="identity")
    ablation = EdgeAblation(layer, x, rs.Rotations.identity(41, 2))

    def loss(outputs):
        return jnp.mean(jnp.square(outputs[:, 1] - layer(jnp.asarray(x))[:, 1]))

    found = adversarial_ablation(ablation, x, loss=loss, share=20 / 80, key=KEY)
    assert found.worst > 5 * np.mean(found.random)
    assert found.every < 0.1 * found.worst  # all at once cancel


def test_a_loss_of_the_network(rng):
    """Cross-entropy: the rise is measured from that of the whole layer."""
    layer = rs.MLP(*(rng.standard_normal(s).astype(np.float32) for s in ((12, 6), (12,), (5, 12))))
    x = rng.standard_normal((100, 6)).astype(np.float32)
    labels = jnp.argmax(layer(jnp.asarray(x)), axis=1)

    def loss(outputs):
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(outputs), labels[:, None], axis=1))

    ablation = EdgeAblation(layer, x, rs.baselines.svd_mean_jacobian(layer, x))
    found = adversarial_ablation(ablation, x, loss=loss, threshold=0.5, draws=3, key=KEY)
    assert found.whole == pytest.approx(float(loss(layer(jnp.asarray(x)))), rel=1e-5)
    assert found.worst >= max(found.random) and found.worst > found.whole
    kept = float(loss(jnp.asarray(ablation.outputs(x, ~found.mask))))
    assert found.worst == pytest.approx(kept, rel=1e-4)


def test_what_cannot_be_done_is_refused(block):
    _, x, ablation = block
    with pytest.raises(ValueError, match="between 0 and 1"):
        adversarial_ablation(ablation, x, share=1.0, key=KEY)
    with pytest.raises(ValueError, match="nothing to cut"):
        adversarial_ablation(ablation, x, threshold=0.0, key=KEY)
    gated = rs.Dense(np.eye(5, dtype=np.float32), np.full(5, -9, np.float32))
    opened = np.concatenate([x, np.full((1, 5), 20, np.float32)])
    with pytest.raises(ValueError, match="give a loss"):
        adversarial_ablation(EdgeAblation(gated, opened, rs.Rotations.identity(5, 5)), x, key=KEY)
