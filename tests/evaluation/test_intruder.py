"""The intruder test: it finds what was planted, and chance where there is nothing."""

import jax
import numpy as np
import pytest

from rotsparse.evaluation.intruder import intruder_rates

KEY = jax.random.key(0)
TEXTS = np.repeat(np.arange(60), 10)


def test_the_top_of_a_planted_direction_is_alike(rng):
    """Direction 0 is how much an example is of one kind; direction 1 has nothing to do with kinds."""
    kinds = rng.integers(0, 6, 600)
    z = np.stack([(kinds == 2) + 0.1 * rng.standard_normal(600), rng.standard_normal(600)], axis=1)
    rates = intruder_rates(z, np.eye(6)[kinds], TEXTS, key=KEY)
    assert rates.shape == (2, 2)
    assert rates[0, 0] == 1, "no example of the middle is of the kind"
    assert rates[:, 1].mean() < 0.6


def test_chance_where_the_vectors_say_nothing(rng):
    z, v = rng.standard_normal((600, 40)), rng.standard_normal((600, 12))
    rates = intruder_rates(z, v, TEXTS, key=KEY)
    assert abs(rates.mean() - 1 / 5) < 4 * rates.std() / np.sqrt(rates.size)
    same = intruder_rates(z, np.ones((600, 3)), TEXTS, key=KEY)
    np.testing.assert_allclose(same, 1 / 5)


def test_one_trial_by_hand():
    """Four of kind 0 at the top, two of each kind at the bottom; in the middle all are of kind 1."""
    z = np.array([5.0, 4, 3, 2, *[0] * 8, -9, -9, -9, -9])[:, None]
    v = np.eye(2)[[0, 0, 0, 0, *[1] * 8, 0, 1, 0, 1]]
    rates = intruder_rates(z, v, np.arange(16), key=KEY)
    assert rates[0, 0] == 1
    # With the intruder, one of the first kind is alike to one other, one of the second to two.
    assert rates[1, 0] == 0
    # Of one text only the first counts: the next three are of the second kind.
    assert intruder_rates(z, v, np.maximum(np.arange(16), 3), key=KEY)[0, 0] == 0


def test_the_sign_and_the_scale_of_a_direction_do_not_matter(rng):
    z, v = rng.standard_normal((600, 3)), rng.standard_normal((600, 4))
    rates, turned = (intruder_rates(s * z, v, TEXTS, trials=2000, key=KEY) for s in (1, -7))
    np.testing.assert_allclose(turned[::-1], rates, atol=0.06)


def test_too_few_texts(rng):
    with pytest.raises(ValueError, match="4 top examples should be of different texts: there are 3"):
        intruder_rates(rng.standard_normal((9, 2)), np.ones((9, 1)), np.arange(9) // 3, key=KEY)
