"""The covariance that standard deviations are taken from: a few far rows do not move it."""

import numpy as np
import pytest

from rotsparse.data import moments
from rotsparse.data.moments import covariance, far_rows, scale_covariance


@pytest.fixture
def x(rng):
    return rng.standard_normal((2000, 8)).astype(np.float32)


def test_without_far_rows_it_is_the_covariance_to_the_bit(x):
    assert far_rows(x) == 0
    np.testing.assert_array_equal(scale_covariance(x), covariance(x)[1])


@pytest.mark.parametrize("size", [30, 3e4])
def test_far_rows_are_left_out_however_far(x, size, monkeypatch):
    monkeypatch.setattr(moments, "CHUNK_BYTES", 8 * 8 * 300)  # several blocks
    far = np.arange(0, len(x), 100)
    outlying = x.copy()
    outlying[far] = size
    assert far_rows(outlying) == len(far)
    near = np.delete(x, far, axis=0)
    np.testing.assert_allclose(scale_covariance(outlying), covariance(near)[1], rtol=1e-9, atol=1e-12)


def test_rows_that_are_all_alike_are_not_far():
    assert far_rows(np.ones((50, 3), np.float32)) == 0
