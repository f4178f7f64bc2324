"""Numbers whose squares leave the range of the type: refused with what to do, not computed with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rotsparse._core import checks
from rotsparse.layers.mlp import MLP
from rotsparse.objectives.activation import ActivationSparsity
from rotsparse.objectives.jacobian import JacobianSparsity
from rotsparse.objectives.measures import L4, Log


@pytest.mark.parametrize(
    ("unit", "what"), [(1e-20, "vanish"), (1e-25, "vanish"), (1e19, "overflow"), (1e30, "overflow")]
)
def test_units_whose_squares_leave_float32(unit, what, rng):
    x = (rng.normal(size=(30, 4)) * unit).astype(np.float32)
    with pytest.raises(ValueError, match=f"squares {what} in float32: give it in another unit"):
        checks.activations("x", x, 4)


@pytest.mark.parametrize("unit", [1e-15, 1e-8, 1e8, 1e16])
def test_results_do_not_depend_on_the_unit(unit, rng):
    x = rng.normal(size=(30, 4)).astype(np.float32)
    w_in, w_out = rng.normal(size=(6, 4)).astype(np.float32), rng.normal(size=(4, 6)).astype(np.float32)
    scaled = (x * unit).astype(np.float32)
    bases = {"in": jnp.eye(4), "out": jnp.eye(4)}

    def values(x, w_in):
        return [
            JacobianSparsity(MLP(w_in, None, w_out), x, Log(0.1)).value(bases),
            ActivationSparsity(x, L4()).value(bases),
        ]

    np.testing.assert_allclose(values(scaled, (w_in / unit).astype(np.float32)), values(x, w_in), rtol=1e-5)


def test_sums_of_squares_that_overflow(rng):
    """Each square is in range, their sum is not."""
    x = (np.sign(rng.normal(size=(400, 5))) * 1e18).astype(np.float32)
    with pytest.raises(ValueError, match="squares overflow"):
        ActivationSparsity(x, L4())


def test_zero_is_exact():
    checks.activations("x", np.zeros((3, 2), np.float32), 2, at_least=1)
    jax.jit(lambda x: checks.squares("x", x.sum(), x.dtype))(jnp.ones(3))
