"""Sparse probes: a planted direction is found, and a random basis needs many."""

import jax
import numpy as np
import pytest

from rotsparse._core.orthogonal import haar
from rotsparse.evaluation.probing import probe_table, sparse_probes


@pytest.fixture
def case(rng):
    """Labels that are the sign of one coordinate, and of the sum of two others."""
    z = rng.standard_normal((2000, 12))
    return z, {"one": z[:, 3] > 1, "two": z[:, 5] + z[:, 7] > 1, "rare": np.arange(2000) < 3}


def halves(of):
    return of[:1000], of[1000:]


def test_a_label_that_is_a_direction_needs_one_of_them(case):
    z, labels = case
    one = sparse_probes(*halves_of(z, labels["one"]))
    assert one[0] > 0.99
    two = sparse_probes(*halves_of(z, labels["two"]))
    assert two[0] < 0.9 and two[1] > 0.99
    turned = z @ np.asarray(haar(jax.random.key(0), 12)).T
    spread = sparse_probes(*halves_of(turned, labels["one"]), (1, 2, 5, 12))
    assert spread[0] < 0.95 and spread[-1] > 0.99, "the space knows, its single directions do not"


def halves_of(z, labels):
    (z, z_test), (labels, labels_test) = halves(z), halves(labels)
    return z, labels, z_test, labels_test


def test_what_is_held_out_decides(rng):
    noise = rng.standard_normal((200, 60))
    labels = rng.random(200) < 0.5
    area = sparse_probes(noise[:100], labels[:100], noise[100:], labels[100:])
    assert all(abs(of - 0.5) < 0.2 for of in area)


def test_the_table_leaves_out_rare_labels(case):
    z, labels = case
    bases = {"neurons": halves(z), "scaled": halves(100 * z)}
    table = probe_table(bases, {name: halves(of) for name, of in labels.items()}, (1,))
    assert table["neurons"].keys() == {"one", "two"}
    assert table["neurons"]["one"] == pytest.approx(table["scaled"]["one"], abs=1e-3)
    with pytest.raises(ValueError, match="needs 10 examples in each group"):
        sparse_probes(*halves_of(z, labels["rare"]))
