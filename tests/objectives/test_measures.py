"""Measures: slopes are derivatives, each is concave in z², and the table of docs/measures.md holds cell by cell."""

import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from helpers import ROOT
from rotsparse.objectives.measures import (
    L4,
    MEASURES,
    GemanMcClure,
    Hoyer,
    Log,
    SmoothedL1,
    SmoothedPower,
    Tanh,
    TopK,
    Welsch,
    by_name,
    with_eps,
)

pytestmark = pytest.mark.usefixtures("strict", "x64")

KINDS = [Log, SmoothedPower, SmoothedL1, GemanMcClure, Welsch, Tanh, L4, Hoyer]
every_kind = pytest.mark.parametrize("kind", KINDS)
# Not too sharp, so that float64 resolves every strict inequality below (tanh and Welsch saturate exponentially).
EPS = 0.5
# Away from zero, where tanh has its corner.
POINTS = np.concatenate([-np.geomspace(6, 1e-3, 40), np.geomspace(1e-3, 6, 40)])


def test_every_named_measure_is_tested_here():
    assert {*KINDS, TopK} == set(MEASURES.values())


# --- the measures as functions ----------------------------------------------------------------------------------


# At ε = 1; written out again from the definitions.
FORMULAS = {
    Log: lambda z: np.log(1 + z**2),
    SmoothedPower: lambda z: (z**2 + 1) ** 0.25 - 1,
    SmoothedL1: lambda z: np.sqrt(z**2 + 1) - 1,
    GemanMcClure: lambda z: z**2 / (1 + z**2),
    Welsch: lambda z: 1 - np.exp(-(z**2) / 2),
    Tanh: lambda z: np.tanh(abs(z)),
    L4: lambda z: -(z**4),
    Hoyer: lambda z: np.sqrt(z**2 + 1) - 1,
}


@every_kind
def test_value_is_the_formula_and_eps_its_scale(kind):
    np.testing.assert_allclose(kind(eps=1.0)(jnp.asarray(POINTS)), FORMULAS[kind](POINTS), rtol=1e-8, atol=1e-14)
    if kind is L4:
        np.testing.assert_array_equal(L4(eps=0.3)(jnp.asarray(POINTS)), L4()(jnp.asarray(POINTS)))
        return
    # All but a factor of the measure depends on z/ε only.
    factor = {SmoothedPower: 0.3**0.5, SmoothedL1: 0.3, Hoyer: 0.3}.get(kind, 1.0)
    scaled = kind(eps=0.3)(jnp.asarray(0.3 * POINTS))
    np.testing.assert_allclose(scaled, factor * FORMULAS[kind](POINTS), rtol=1e-7, atol=1e-14)


@every_kind
@pytest.mark.parametrize("eps", [0.05, 1.0])
def test_slope_is_the_derivative(kind, eps):
    measure = kind(eps=eps)
    autodiff = jax.vmap(jax.grad(lambda z: measure(z)))(jnp.asarray(POINTS))
    np.testing.assert_allclose(measure.slope(jnp.asarray(POINTS)), autodiff, rtol=1e-9, atol=1e-12)
    h = 1e-6
    difference = (measure(jnp.asarray(POINTS + h)) - measure(jnp.asarray(POINTS - h))) / (2 * h)
    np.testing.assert_allclose(measure.slope(jnp.asarray(POINTS)), difference, rtol=1e-4, atol=1e-6)


@every_kind
@pytest.mark.parametrize("eps", [0.05, 1.0])
def test_curvature_is_the_derivative_of_the_slope(kind, eps):
    measure = kind(eps=eps)
    autodiff = jax.vmap(jax.grad(lambda z: measure.slope(z)))(jnp.asarray(POINTS))
    np.testing.assert_allclose(measure.curvature(jnp.asarray(POINTS)), autodiff, rtol=1e-9, atol=1e-9)


@every_kind
def test_example_slope_is_the_gradient_of_the_example_value(kind, rng):
    measure = kind(eps=EPS)
    z = jnp.asarray(rng.standard_normal((3, 4, 5)) * np.array([0.1, 1.0, 3.0])[:, None, None])
    gradient = jax.grad(lambda z: z[0].size * measure.example_value(z).sum())(z)
    np.testing.assert_allclose(measure.example_slope(z), gradient, rtol=1e-9, atol=1e-12)
    assert measure.example_value(z).shape == (3,)


@every_kind
def test_even_and_zero_at_zero(kind):
    measure = kind()
    np.testing.assert_array_equal(measure(jnp.asarray(POINTS)), measure(jnp.asarray(-POINTS)))
    np.testing.assert_array_equal(measure.slope(jnp.asarray(POINTS)), -measure.slope(jnp.asarray(-POINTS)))
    assert measure(jnp.zeros(())) == pytest.approx(0, abs=1e-15)
    assert measure.slope(jnp.zeros(())) == 0


@every_kind
@given(a=st.floats(0, 100), b=st.floats(0, 100), t=st.floats(0.01, 0.99), eps=st.floats(0.01, 3))
def test_concave_in_the_square(kind, a, b, t, eps):
    """h(ta + (1-t)b) ≥ t h(a) + (1-t) h(b) for S(z) = h(z²): the floor, and half of the criteria, rest on it."""
    measure = kind(eps=jnp.asarray(eps))
    middle, left, right = np.asarray(_call(measure, jnp.asarray(np.sqrt([t * a + (1 - t) * b, a, b]))))
    rounding = 1e-13 * (1 + abs(left) + abs(right))
    assert middle >= t * left + (1 - t) * right - rounding


@every_kind
def test_strictly_concave_in_the_square(kind):
    """Also in numbers: the slope per z, 2h'(z²), falls."""
    z = np.linspace(0.01, 5, 200)
    assert (np.diff(kind(eps=EPS).slope(jnp.asarray(z)) / z) < 0).all()


@every_kind
def test_float32_stays_float32_and_finite(kind):
    """From nothing to the largest possible entry of a 10,000 x 10,000 matrix in units of its rms."""
    measure = kind()
    z = jnp.array([[0.0, 1e-38, -1e-20, 1e-7, -1.0, 1e4]], jnp.float32)
    for function in (measure, measure.slope, measure.curvature, measure.example_value, measure.example_slope):
        result = function(z)
        assert result.dtype == jnp.float32
        assert jnp.isfinite(result).all()


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-25, 1e-9])
def test_hoyer_of_a_dead_example_is_finite(size):
    """A sigmoid's Jacobian can underflow: no infinite gradient, and a descent step of it moves nothing."""
    z = jnp.full((1, 3, 3), size, jnp.float32).at[0, 0, 0].mul(0.5)
    slope = Hoyer().example_slope(z)
    assert jnp.isfinite(slope).all()
    assert jnp.abs(slope * z).max() <= 10  # what enters the relative gradient
    assert jnp.isfinite(Hoyer().example_value(z)).all()


def test_hoyer_is_the_ratio_of_norms(rng):
    z = rng.standard_normal((4, 30))
    ratio = np.abs(z).sum(1) / np.linalg.norm(z, axis=1) / np.sqrt(30)
    np.testing.assert_allclose(Hoyer(eps=1e-9).example_value(jnp.asarray(z)), ratio, rtol=1e-6)
    one_hot = Hoyer(eps=1e-9).example_value(jnp.eye(30)[:1])
    np.testing.assert_allclose(one_hot, 1 / np.sqrt(30), rtol=1e-6)
    np.testing.assert_allclose(Hoyer(eps=1e-9).example_value(jnp.ones((1, 30))), 1, rtol=1e-6)


# --- top-k, which looks at an example's entries together -----------------------------------------------------------


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_top_k_is_the_energy_outside_the_largest_entries(rng, keep, dtype):
    z = rng.standard_normal((6, 4, 10)).astype(dtype)
    z[5] = 0
    rest = np.sort(np.square(z).reshape(6, -1), axis=1)[:, : 40 - round(40 * keep)]
    value = TopK(keep).example_value(jnp.asarray(z))
    assert value.dtype == dtype
    np.testing.assert_allclose(value, rest.sum(axis=1) / 40, rtol=1e-5)
    gradient = jax.grad(lambda z: z[0].size * TopK(keep=keep).example_value(z).sum())(jnp.asarray(z))
    np.testing.assert_allclose(TopK(keep=keep).example_slope(jnp.asarray(z)), gradient)


def test_top_k_keeps_as_many_of_equal_entries_as_it_says():
    z = jnp.asarray([[[1.0, -1.0, 1.0, 1.0]], [[2.0, 1.0, 1.0, 0.0]], [[0.0, 0.0, 0.0, 0.0]]])
    np.testing.assert_allclose(TopK(0.5).example_value(z), [0.5, 0.25, 0], rtol=1e-6)


def test_top_k_is_concave_in_the_squares(rng):
    a, b = np.square(rng.standard_normal((2, 50, 12)))
    value = lambda square: np.asarray(TopK().example_value(jnp.sqrt(square)))  # noqa: E731
    assert (value((a + b) / 2) >= (value(a) + value(b)) / 2 - 1e-12).all()


@pytest.mark.parametrize("keep", [0, 1, -0.5, math.nan])
def test_top_k_refuses_what_is_no_share(keep):
    with pytest.raises(ValueError, match="between 0 and 1"):
        TopK(keep=keep)


# --- the criteria of Hurley and Rickard --------------------------------------------------------------------------

vectors = st.sampled_from([2, 3, 7]).flatmap(lambda n: st.lists(st.integers(0, 9), min_size=n, max_size=n))
varied = vectors.map(np.array).filter(lambda c: c.min() < c.max())
_call = eqx.filter_jit(lambda measure, z: measure(z))


def cost(measure, c):
    """The normalised measure M(c) of docs/measures.md. (Padded to one shape, so that each measure compiles once.)"""
    c = np.asarray(c, float)
    z = np.zeros(16)
    z[: len(c)] = c / np.sqrt(np.mean(c**2))
    return float(np.mean(_call(measure, jnp.asarray(z))[: len(c)]))


@st.composite
def robin_hood(draw):
    """A vector, and the same after a larger entry gave to a smaller one."""
    c = draw(varied)
    i, j = draw(st.permutations(range(len(c))))[:2]
    assume(c[i] != c[j])
    i, j = (i, j) if c[i] > c[j] else (j, i)
    share = draw(st.sampled_from([0.1, 0.25, 0.49]))
    after = c.astype(float)
    after[i], after[j] = c[i] - share * (c[i] - c[j]), c[j] + share * (c[i] - c[j])
    return c, after


@given(robin_hood())
def test_d1_robin_hood_holds_for_tanh_at_any_scale(pair):
    for eps in (0.5, 1.0, 5.0):
        assert cost(Tanh(eps=eps), pair[1]) > cost(Tanh(eps=eps), pair[0])


@pytest.mark.parametrize("kind", [k for k in KINDS if k is not L4])
@given(robin_hood())
def test_d1_robin_hood_holds_once_eps_is_small_enough(kind, pair):
    """Entries and gifts are at least ten times ε. Bounded measures saturate there, to equality in float64."""
    before, after = (cost(kind(eps=1e-3), c) for c in pair)
    assert after > before or (kind in (Welsch, Tanh) and after == pytest.approx(before, abs=1e-14))


@pytest.mark.parametrize("measure", [k(eps=e) for k in KINDS if k not in (L4, Tanh) for e in (0.05, 0.5)] + [L4()])
def test_d1_robin_hood_fails_for_smooth_measures_where_the_gift_is_below_eps(measure):
    assert cost(measure, [10, 0.6e-3, 0.4e-3]) < cost(measure, [10, 1e-3, 0])


def test_d1_robin_hood_fails_for_powers_above_one_at_any_scale():
    for eps in (1e-9, 1e-3, 1.0):
        measure = SmoothedPower(eps=eps, p=1.5)
        assert cost(measure, [10, 0.6e-3, 0.4e-3]) < cost(measure, [10, 1e-3, 0])
        assert cost(measure, [10, 0.51, 0.49]) < cost(measure, [10, 1, 0])


def test_d1_robin_hood_fails_for_l4_even_for_large_gifts():
    assert cost(L4(), [9, 3, 3]) < cost(L4(), [9, 6, 0])


@every_kind
@given(c=varied, a=st.sampled_from([1e-6, 0.3, 7.0, 1e6]))
def test_d2_scaling(kind, c, a):
    assert cost(kind(eps=EPS), a * c) == pytest.approx(cost(kind(eps=EPS), c), rel=1e-12)


@every_kind
@given(c=varied, tide=st.sampled_from([0.5, 1.0, 20.0]))
def test_d3_rising_tide(kind, c, tide):
    assert cost(kind(eps=EPS), c + tide) > cost(kind(eps=EPS), c)


@every_kind
@given(c=varied)
def test_d4_cloning(kind, c):
    assert cost(kind(eps=EPS), np.concatenate([c, c])) == pytest.approx(cost(kind(eps=EPS), c), rel=1e-12)


@every_kind
@given(c=varied, i=st.integers(0, 6), growth=st.sampled_from([0.5, 3.0, 100.0]))
def test_p1_bill_gates(kind, c, i, growth):
    """From the largest entry on, every further growth is sparser, if anybody else has anything."""
    i = i % len(c)
    assume(np.delete(c, i).any())
    rich = c.astype(float)
    rich[i] = c.max() + 1
    richer = rich.copy()
    richer[i] += growth
    assert cost(kind(eps=EPS), richer) < cost(kind(eps=EPS), rich)


@every_kind
@given(c=varied)
def test_p2_babies(kind, c):
    assert cost(kind(eps=EPS), np.append(c, 0)) < cost(kind(eps=EPS), c)


def test_the_documented_table_says_what_is_tested():
    text = (ROOT / "docs" / "measures.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)`[^|]*\|(.*)\|$", text.replace(r"\|", "/"), re.MULTILINE)
    table = {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}
    assert set(table) == {kind.__name__ for kind in KINDS}
    for name, cells in table.items():
        assert cells[2] == "yes", name  # concave in z²
        assert cells[5:] == ["yes"] * 5, name
        assert cells[4].startswith({"Tanh": "yes", "L4": "no"}.get(name, "as ε → 0")), name


# --- choosing one ------------------------------------------------------------------------------------------------


def test_by_name():
    assert by_name("log") == Log()
    assert by_name("welsch", 0.3) == Welsch(eps=0.3)
    with pytest.raises(ValueError, match=r"unknown measure 'gini': expected one of .*geman-mcclure.*log"):
        by_name("gini")


@pytest.mark.parametrize("eps", [0, -0.1, math.nan, math.inf])
def test_a_scale_that_is_no_scale_is_refused(eps):
    with pytest.raises(ValueError, match="positive number, got"):
        Log(eps=eps)


@pytest.mark.parametrize("p", [0, 2, -1, math.nan])
def test_a_power_that_rewards_equality_is_refused(p):
    with pytest.raises(ValueError, match="between 0 and 2"):
        SmoothedPower(p=p)


def test_with_eps_changes_the_scale_and_nothing_else_without_retracing():
    traces = 0

    @jax.jit
    def value(measure, z):
        nonlocal traces
        traces += 1
        return measure(z)

    power = SmoothedPower(p=0.3)
    z = jnp.asarray(POINTS)
    for eps in (0.1, 0.7, 2.0):
        measure = with_eps(power, eps)
        assert isinstance(measure, SmoothedPower) and measure.p == 0.3
        np.testing.assert_allclose(value(measure, z), SmoothedPower(eps=eps, p=0.3)(z), rtol=1e-12)
    assert traces == 1
