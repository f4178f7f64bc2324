"""What every measure does, by the names in `MEASURES`: a new one is tested as soon as it has a name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rotsparse.objectives.measures import MEASURES, by_name, with_eps

pytestmark = pytest.mark.usefixtures("strict")


@pytest.fixture(params=sorted(MEASURES))
def measure(request):
    return by_name(request.param)


def test_an_example_with_one_entry_is_sparser_than_one_of_equal_entries(measure):
    examples = jnp.stack([jnp.eye(16)[0] * 4, jnp.ones(16)])  # of one rms
    one, all_equal = measure.example_value(examples)
    assert one < all_equal


def test_its_slope_is_the_gradient_of_its_value(measure, rng, x64):
    z = jnp.asarray(rng.standard_normal((3, 4, 5)) * np.array([0.1, 1.0, 3.0])[:, None, None])
    assert measure.example_value(z).shape == (3,)
    gradient = jax.grad(lambda z: z[0].size * measure.example_value(z).sum())(z)
    np.testing.assert_allclose(measure.example_slope(z), gradient, rtol=1e-9, atol=1e-12)


def test_signs_and_the_order_of_entries_do_not_matter(measure, rng, x64):
    z = jnp.asarray(rng.standard_normal((3, 20)))
    moved = -z[:, rng.permutation(20)]
    np.testing.assert_allclose(measure.example_value(moved), measure.example_value(z), rtol=1e-12)


def test_nothing_is_worth_nothing_and_has_no_slope(measure):
    zero = jnp.zeros((2, 7), jnp.float32)
    np.testing.assert_allclose(measure.example_value(zero), 0, atol=1e-6)
    np.testing.assert_array_equal(measure.example_slope(zero), 0)


def test_float32_stays_float32_and_finite(measure):
    z = jnp.array([[0.0, 1e-38, -1e-20, 1e-7, -1.0, 1e4]], jnp.float32)
    for result in (measure.example_value(z), measure.example_slope(z), measure.example_curvature(z)):
        assert result.dtype == jnp.float32
        assert jnp.isfinite(result).all()


def test_another_scale_is_another_measure_of_the_same_kind(measure):
    other = with_eps(measure, 0.7)
    assert type(other) is type(measure)
    assert measure == by_name(next(name for name, kind in MEASURES.items() if kind is type(measure)))
    assert jax.tree.structure(other) == jax.tree.structure(measure)  # so that a schedule of scales is traced once
