"""The precision of matrix products: an option for those with the data, and never for those that keep rotations
orthogonal."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from rotsparse.fit.find_rotations import find_rotations
from rotsparse.layers.mlp import MLP
from rotsparse.objectives import JacobianSparsity
from rotsparse.objectives.measures import Log
from rotsparse.solvers import Anneal, Riemannian

KEY = jax.random.key(0)


def products(jaxpr):
    """The precision of every matrix product in a jaxpr, those of inner ones included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn.params["precision"]
        for inner in jaxprs_in_params(eqn.params):
            yield from products(inner)


def objective(precision):
    rng = np.random.default_rng(0)
    layer = MLP(*(rng.standard_normal(shape).astype(np.float32) for shape in [(8, 5), 8, (4, 8)]), activation="gelu")
    return JacobianSparsity(layer, rng.standard_normal((20, 5), np.float32), Log(0.1), precision=precision)


@pytest.mark.parametrize("method", [Anneal(steps=10), Riemannian(optax.adam(0.1), steps=10)])
def test_only_the_products_with_the_data_are_rounded(monkeypatch, method):
    monkeypatch.setattr(jax, "default_backend", lambda: "cuda")  # a CPU has one precision
    bases = {"in": jnp.eye(5), "out": jnp.eye(4)}
    full = (jax.lax.Precision.HIGHEST,) * 2
    with jax.default_matmul_precision("bfloat16"):  # a user's own setting makes no difference, either
        counts = {}
        for precision in ("highest", "bfloat16"):
            target = objective(precision)
            step = jax.make_jaxpr(lambda b, s, o=target: method.step(o, b, s, jnp.asarray(1)))
            gradient = jax.make_jaxpr(target.value_and_grad)(bases)
            of_step, of_gradient = (
                [p for p in products(j.jaxpr) if p != full] for j in (step(bases, method.init(bases)), gradient)
            )
            counts[precision] = len(of_gradient)
            assert len(of_step) == len(of_gradient)  # all of them are the objective's
    assert counts["highest"] == 0 and counts["bfloat16"] >= 4


def test_precision_reaches_the_objective_and_is_checked():
    layer, x = objective("highest").layer, objective("highest").x
    options = {"key": KEY, "method": Riemannian(optax.adam(0.1), steps=20)}
    assert find_rotations(layer, x, precision="bfloat16", **options).result.ok
    with pytest.raises(ValueError, match=r"one of highest, tensorfloat32, bfloat16, got 'low'"):
        find_rotations(layer, x, precision="low", **options)
