"""Alignment of bases: invariance to sign and order, known values, chance."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import random_orthogonal
from rotsparse._core.alignment import amari_distance, chance_cosine, match, mean_max_cosine


def signed_permutation(rng, d):
    return rng.choice([-1.0, 1.0], d)[:, None] * np.eye(d)[rng.permutation(d)]


dimensions_and_seeds = given(d=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))


@dimensions_and_seeds
def test_match_undoes_a_signed_permutation(d, seed):
    rng = np.random.default_rng(seed)
    b = random_orthogonal(rng, d)
    a = signed_permutation(rng, d) @ b
    found = match(a, b)
    np.testing.assert_allclose(found.signs[:, None] * b[found.permutation], a, atol=1e-12)
    np.testing.assert_allclose(found.cosines, 1, atol=1e-12)
    assert amari_distance(a, b) < 1e-12


@dimensions_and_seeds
def test_distances_ignore_sign_and_order_and_are_symmetric(d, seed):
    rng = np.random.default_rng(seed)
    a, b = random_orthogonal(rng, d), random_orthogonal(rng, d)
    moved = signed_permutation(rng, d) @ a
    for distance in (amari_distance, mean_max_cosine):
        assert distance(moved, b) == pytest.approx(distance(a, b), abs=1e-12)
        assert distance(a, b) == pytest.approx(distance(b, a), abs=1e-12)
        assert 0 <= distance(a, b) <= 1


@dimensions_and_seeds
def test_distances_see_only_the_relative_rotation(d, seed):
    rng = np.random.default_rng(seed)
    a, b, both = random_orthogonal(rng, d), random_orthogonal(rng, d), random_orthogonal(rng, d)
    assert amari_distance(a @ both, b @ both) == pytest.approx(amari_distance(a, b), abs=1e-9)
    assert mean_max_cosine(a @ both, b @ both) == pytest.approx(mean_max_cosine(a, b), abs=1e-9)


def test_known_values():
    hadamard = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    assert amari_distance(hadamard, np.eye(4)) == pytest.approx(1)  # every entry alike: as far as it goes
    assert mean_max_cosine(hadamard, np.eye(4)) == pytest.approx(0.5)
    angle = 0.3
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    assert amari_distance(turn, np.eye(2)) == pytest.approx(np.tan(angle))
    assert mean_max_cosine(turn, np.eye(2)) == pytest.approx(np.cos(angle))


def test_the_match_is_one_to_one_and_globally_best():
    # Both rows of a are nearest to row 0 of b: a greedy match of row 0 would leave row 1 with nothing.
    a = np.array([[1.0, 0.9, 0.0], [1.0, 0.0, 0.1]])
    found = match(a, np.eye(3))
    np.testing.assert_array_equal(found.permutation, [1, 0])


def test_fewer_directions_find_themselves_in_a_larger_basis(rng):
    b = random_orthogonal(rng, 6)
    found = match(-3 * b[[4, 1]], b)
    np.testing.assert_array_equal(found.permutation, [4, 1])
    np.testing.assert_array_equal(found.signs, [-1, -1])
    np.testing.assert_allclose(found.cosines, 1)


def test_chance_is_what_random_bases_reach_and_falls_with_dimension(rng):
    small, large = (chance_cosine(d, key=jax.random.key(0)) for d in (8, 64))
    assert small.low <= small.value <= small.high
    assert large.high < small.low
    unrelated = mean_max_cosine(random_orthogonal(rng, 64), random_orthogonal(rng, 64))
    assert large.low - 0.02 < unrelated < large.high + 0.02
    assert chance_cosine(8, key=jax.random.key(0)) == small


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.eye(3), np.eye(4), "same width"),
        (np.eye(3), np.eye(3)[:2], "at least as many"),
        (np.zeros((2, 2)), np.eye(2), "zero row"),
        (np.eye(2), np.full((2, 2), np.nan), "NaN"),
    ],
)
def test_what_cannot_be_matched_is_refused(a, b, message, untyped):
    with pytest.raises(ValueError, match=message):
        match(a, b)


@pytest.mark.parametrize("b", [np.array([[1.0, 0.0], [0.6, 0.8]]), np.eye(3), np.eye(2)[:1]])
def test_amari_distance_needs_orthogonal_matrices_of_one_size(b, untyped):
    with pytest.raises(ValueError, match="orthogonal"):
        amari_distance(np.eye(2), b)
