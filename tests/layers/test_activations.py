"""Activations: the named functions are the ones of the papers, and their derivatives are derivatives."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf, expit

from rotsparse.layers.activations import ACTIVATIONS, as_activation, derivative, value_and_derivative

pytestmark = pytest.mark.usefixtures("strict")

# Written out again in NumPy, from the papers.
FORMULAS = {
    "identity": lambda a: a,
    "relu": lambda a: np.maximum(a, 0),
    "gelu": lambda a: a * (1 + erf(a / np.sqrt(2))) / 2,
    "gelu_tanh": lambda a: a / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3))),
    "silu": lambda a: a * expit(a),
    "tanh": np.tanh,
    "sigmoid": expit,
    "quick_gelu": lambda a: a * expit(1.702 * a),
    "squared_relu": lambda a: np.maximum(a, 0) ** 2,
}
# Off the grid of kinks: no point is 0.
POINTS = np.linspace(-4.03, 4.0, 90)


def test_every_named_activation_has_a_formula_here():
    assert FORMULAS.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_value_is_the_formula(name, x64):
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(POINTS)), FORMULAS[name](POINTS), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivative_is_the_central_difference(name, x64):
    h = 1e-5
    slope = (FORMULAS[name](POINTS + h) - FORMULAS[name](POINTS - h)) / (2 * h)
    value, actual = value_and_derivative(ACTIVATIONS[name], jnp.asarray(POINTS))
    np.testing.assert_allclose(actual, slope, atol=1e-8)
    np.testing.assert_array_equal(actual, derivative(ACTIVATIONS[name], jnp.asarray(POINTS)))
    np.testing.assert_allclose(value, FORMULAS[name](POINTS), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_float32_stays_float32_and_finite_far_out(name):
    a = jnp.array([-1e4, -30.0, 0.0, 30.0, 1e4], jnp.float32)
    value, slope = value_and_derivative(ACTIVATIONS[name], a)
    assert value.dtype == slope.dtype == jnp.float32
    assert jnp.isfinite(value).all() and jnp.isfinite(slope).all()


def test_relu_is_flat_at_zero():
    assert derivative(ACTIVATIONS["relu"], jnp.zeros(())) == 0


def test_any_function_serves_as_it_is(x64):
    def softplus(a):
        return jnp.log1p(jnp.exp(a))

    assert as_activation(softplus) is softplus
    np.testing.assert_allclose(derivative(softplus, jnp.asarray(POINTS)), expit(POINTS), rtol=1e-12)
    assert as_activation("relu") is ACTIVATIONS["relu"]
    assert as_activation(jax.nn.elu) is jax.nn.elu


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown activation 'swiglu'.*relu, gelu, gelu_tanh.*any elementwise"):
        as_activation("swiglu")


class _Slopes(eqx.Module):
    """A slope for every neuron, as eqx.nn.PReLU in an eqx.nn.MLP has it."""

    slope: jax.Array

    def __call__(self, a):
        return jnp.where(a > 0, a, self.slope * a)


@pytest.mark.parametrize(
    ("activation", "text"),
    [
        (jax.nn.softmax, "softmax gives the same numbers other values"),
        (lambda a: a - a.mean(), "gives the same numbers other values"),
        (lambda a: jnp.sort(a, axis=-1), "gives the same numbers other values"),
        (lambda a: a * jnp.arange(11.0), "gives the same numbers other values in another order|fails on"),
        (jnp.sum, r"makes \[\] of shape \[7, 11\]"),
        (jax.nn.glu, "fails on an array of shape"),
        (_Slopes(jnp.ones(12)), r"_Slopes carries parameters of its own, of shape \[12\]"),
        (_Slopes(jnp.ones((2, 12))), r"carries parameters of its own, of shape \[2, 12\]"),
        (eqx.nn.PReLU(0.3), "carries parameters of its own"),
    ],
)
def test_what_is_not_elementwise(activation, text):
    with pytest.raises(ValueError, match=text) as error:
        as_activation(activation)
    assert "FunctionLayer" in str(error.value)


def test_an_activation_that_closes_over_a_traced_value():
    doubled = jax.jit(lambda x: as_activation(lambda a: a * x[0])(x))(jnp.full(3, 2.0))
    assert (doubled == 4).all()
