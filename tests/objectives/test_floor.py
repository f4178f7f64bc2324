"""The floor: no rotations of random layers get below it, for any measure; and it is reached where it can be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rotsparse._core.orthogonal import haar
from rotsparse.layers.function import FunctionLayer
from rotsparse.layers.gated import GatedMLP
from rotsparse.layers.mlp import Dense
from rotsparse.objectives import JacobianSparsity, measures
from rotsparse.objectives.floor import floor

MEASURES = [m() if name == "l4" else m(eps=0.2) for name, m in measures.MEASURES.items()]


@jax.jit
def values(objective, bases):
    return jax.vmap(objective.value)(bases)


@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: type(m).__name__)
@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), d_out=st.sampled_from([3, 6]))
def test_no_rotation_gets_below_the_floor(measure, seed, d_out):
    rng = np.random.default_rng(seed)
    layer = Dense(rng.standard_normal((d_out, 4)).astype(np.float32), activation="relu" if seed % 2 else "tanh")
    x = rng.standard_normal((6, 4)).astype(np.float32)
    objective = JacobianSparsity(layer, x, measure, scale_inputs=False)
    lowest = floor(layer, x, measure)
    keys = jax.random.split(jax.random.key(seed), 8)
    bases = {"in": jax.vmap(lambda k: haar(k, 4))(keys[:4]), "out": jax.vmap(lambda k: haar(k, d_out))(keys[4:])}
    assert (values(objective, bases) >= lowest - 1e-5 * (1 + abs(lowest))).all()


@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: type(m).__name__)
def test_the_floor_is_reached_by_jacobians_with_common_singular_vectors(x64, measure):
    """`J(x) = U diag(s(x)) Vᵀ`: one rotation pair is the SVD of every example."""
    u, v = haar(jax.random.key(0), 4, jnp.float64), haar(jax.random.key(1), 4, jnp.float64)
    layer = FunctionLayer(lambda x: u @ jnp.sin(v.T @ x), 4, 4)
    x = np.random.default_rng(0).standard_normal((8, 4))
    value = JacobianSparsity(layer, x, measure, scale_inputs=False).value({"in": v.T, "out": u.T})
    np.testing.assert_allclose(value, floor(layer, x, measure), rtol=1e-10, atol=1e-12)  # zero for TopK


def test_in_chunks(rng):
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    layer, x = GatedMLP(draw(9, 5), draw(9, 5), draw(4, 9)), draw(11, 5)
    whole = floor(layer, x, measures.Log(0.1))
    z = np.asarray(layer.jacobian(jnp.asarray(x)))
    s = np.linalg.svd(z, compute_uv=False) / np.sqrt(np.mean(z**2))
    np.testing.assert_allclose(whole, np.log1p((s / 0.1) ** 2).sum(1).mean() / 20, rtol=1e-4)
