"""The demo's network adds, and its directions are read as waves."""

import jax.numpy as jnp
import numpy as np
import pytest

import rotsparse as rs
from rotsparse.examples import addition
from rotsparse.report import waves


@pytest.fixture(scope="module")
def network():
    return addition.train(steps=500)


def test_it_adds_pairs_that_it_has_not_seen(network):
    assert network.accuracy > 0.98
    pairs = addition.MODULUS**2
    assert len(network.train) + len(network.test) == pairs
    assert len(network.train) == round(0.6 * pairs)
    assert isinstance(network.layer, rs.MLP)


def test_a_wave_is_pure_and_a_mixture_is_not():
    numbers = np.arange(addition.MODULUS)
    angle = 2 * np.pi * numbers / addition.MODULUS
    embedding = np.stack([np.cos(3 * angle), np.sin(7 * angle), np.ones(len(numbers))], axis=1)
    mixed = np.array([[1, 0, 0], [0, 1, 0], [0.6, 0.8, 0], [0, 0, 1.0]])
    found = addition.waves(embedding, mixed)
    np.testing.assert_allclose(found.purity, [1, 1, 0.64, 0], atol=1e-12)
    np.testing.assert_array_equal(found.frequency[:3], [3, 7, 7])
    np.testing.assert_allclose(found.coordinates.mean(axis=0), 0, atol=1e-12)
    identity = rs.Rotations(jnp.eye(3), jnp.eye(3))
    assert waves.purity(embedding, identity) == pytest.approx(1)


def test_the_picture_shows_the_bases_that_there_are(network):
    bases = {"learned": rs.Rotations.identity(64, 64), "neurons": rs.Rotations.identity(64, 64)}
    figure, caption = waves.picture(network.embedding, bases, count=3)
    assert len(figure.axes) == 6
    assert "frequency" in caption
