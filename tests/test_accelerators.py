"""The programs that a fit runs on an accelerator, read without having one: each is lowered for CUDA and TPU."""

import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rotsparse as rs
from rotsparse import models
from rotsparse._core import precision as precisions
from rotsparse._core.orthogonal import WIDE, turn
from rotsparse.engine.solution import judged_value
from rotsparse.layers.jacobians import apply, jacobian_gram
from rotsparse.models.transformer import run
from rotsparse.objectives.base import sampled
from tiny_models import RAW, inputs, tiny

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32) / np.float32(shape[-1] ** 0.5)


LAYERS = {
    "mlp": lambda d: rs.MLP(normal(2 * d, d), None, normal(d, 2 * d), None, activation="gelu"),
    "mlp behind a layer norm": lambda d: rs.MLP(
        normal(2 * d, d), None, normal(d, 2 * d), None, activation="silu", norm=rs.layer_norm(np.ones(d, np.float32))
    ),
    "gated": lambda d: rs.GatedMLP(normal(2 * d, d), normal(2 * d, d), normal(d, 2 * d)),
    "dense": lambda d: rs.Dense(normal(d, d), None, activation="relu"),
    "function": lambda d: rs.FunctionLayer(jnp.tanh, d, d),
}


def jacobians(kind="mlp", d=8, precision="highest", measure=None, **options):
    return rs.JacobianSparsity(LAYERS[kind](d), normal(6, d), measure or rs.Log(0.1), precision=precision, **options)


def activations(measure=None, d=8):
    return rs.ActivationSparsity(normal(40, d), measure or rs.TopK(0.5))


def step(method, objective):
    """One step of a method, minibatch included."""
    bases = {name: jnp.eye(d) for name, d in objective.spaces.items()}

    def program(bases, state, i):
        drawn = sampled(objective, jax.random.fold_in(KEY, i), method.batch_size, method.submatrix)
        return method.step(drawn, bases, state, i)

    return program, bases, method.init(bases), jnp.asarray(3)


def value(objective):
    bases = {name: jnp.eye(d) for name, d in objective.spaces.items()}
    return (lambda bases: objective.value_and_grad(bases)), bases


def forward(name):
    model = tiny(name)

    def program(params, x):
        return run(params, model.config, x)[0]

    return program, jax.tree.map(jnp.asarray, model.params), inputs(name)


ANNEAL = rs.Anneal(steps=10, batch_size=2)
PROGRAMS = {
    **{f"annealing, {kind}": lambda kind=kind: step(ANNEAL, jacobians(kind)) for kind in LAYERS},
    "annealing, scaled outputs": lambda: step(ANNEAL, jacobians(scale_outputs=True)),
    "annealing, submatrix": lambda: step(rs.Anneal(steps=10, submatrix=(3, 3)), jacobians()),
    "annealing, activations": lambda: step(ANNEAL, activations()),
    "the turn of a wide space": lambda: (turn, jnp.eye(WIDE), jnp.zeros((WIDE, WIDE)), jnp.asarray(0.4)),
    "riemannian": lambda: step(rs.Riemannian(optax.adam(0.1), steps=10), jacobians()),
    "quasi-newton": lambda: step(rs.QuasiNewton(steps=10), activations(rs.Log(0.1))),
    "fixed point": lambda: step(rs.FixedPoint(steps=10), activations(rs.Log(0.1))),
    **{
        f"objective, {type(m).__name__}": lambda m=m: value(jacobians(measure=m))
        for m in (rs.SmoothedPower(), rs.GemanMcClure(), rs.Welsch(), rs.Tanh(), rs.SmoothedL1(), rs.L4(), rs.Hoyer())
    },
}


def lowered(program, *arguments, platform):
    return jax.export.export(jax.jit(program), platforms=[platform])(*arguments).mlir_module()


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_hot_programs_are_for_accelerators(name, platform):
    text = lowered(*PROGRAMS[name](), platform=platform)
    called = set(re.findall(r"custom_call @([\w.]+)", text))
    assert called <= {"cu_threefry2x32_ffi", "Sharding", "mhlo.topk"}, f"{called} are slow, or run on the host"
    assert "f64" not in text
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) >= 2
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


@pytest.mark.parametrize("name", sorted(RAW))
def test_models_run_on_accelerators(name):
    program, *arguments = forward(name)
    for platform in ("cuda", "tpu"):
        text = lowered(program, *arguments, platform=platform)
        assert "callback" not in text and "f64" not in text


@pytest.mark.parametrize(
    ("precision", "platform", "found"),
    [
        ("bfloat16", "cuda", "bf16, rhs_precision_type = bf16, accumulation_type = f32, lhs_component_count = 1"),
        ("bfloat16", "tpu", "bf16, rhs_precision_type = bf16, accumulation_type = f32, lhs_component_count = 1"),
        ("tensorfloat32", "cuda", "tf32, rhs_precision_type = tf32, accumulation_type = f32, lhs_component_count = 1"),
        ("tensorfloat32", "tpu", "bf16, rhs_precision_type = bf16, accumulation_type = f32, lhs_component_count = 1"),
    ],
)
def test_a_precision_names_its_algorithm(monkeypatch, precision, platform, found):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    objective = jacobians(precision=precision)
    text = lowered(*value(objective), platform=platform)
    assert text.count(f"lhs_precision_type = {found}") >= 4
    assert ("num_primitive_operations = 3" in text) == (platform == "tpu" and precision == "tensorfloat32")
    assert precisions.lacking(precision) == (
        "tensorfloat32 does not exist on tpu: BF16_BF16_F32_X3 was used" if "= 3" in text else ""
    )


def test_what_a_device_lacks_is_said():
    solution = rs.find_rotations(
        LAYERS["mlp"](6), normal(20, 6), key=KEY, precision="tensorfloat32", method=rs.Anneal(steps=3)
    )
    assert "tensorfloat32 does not exist on cpu: highest was used" in solution.detail


# --- outside the steps, everything is in full precision


@pytest.fixture
def recorded(monkeypatch):
    """The precision of every product that is traced."""
    primitive, found = jax.lax.dot_general_p, []
    original = primitive.bind

    def bind(*arguments, **params):
        found.append(params["precision"])
        return original(*arguments, **params)

    monkeypatch.setattr(primitive, "bind", bind)
    jax.clear_caches()
    yield found
    jax.clear_caches()


FULL = (jax.lax.Precision.HIGHEST,) * 2
LAYER = LAYERS["mlp behind a layer norm"](6)
X = normal(40, 6)
SHORT = rs.Then(rs.Anneal(steps=3, batch_size=4), rs.Refine(rs.Anneal(steps=2)))


def rotations():
    return rs.baselines.pca(LAYER, X)


def captured():
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.npy"
        np.save(tokens, np.arange(24) % 31)
        models.capture(tiny("llama"), models.TokenFile(tokens), [(0, "input")], Path(folder) / "out", length=8)


PUBLIC = {
    "find_rotations": lambda: rs.find_rotations(LAYER, X, key=KEY, method=SHORT),
    "find_rotations, scaled outputs": lambda: rs.find_rotations(LAYER, X, key=KEY, method=SHORT, scale_outputs=True),
    "find_rotations, active subspace": lambda: rs.find_rotations(LAYER, X, key=KEY, method=SHORT, active_subspace=0.9),
    "find_basis": lambda: rs.find_basis(X, key=KEY, method=rs.default_basis_method(rs.TopK(0.5), steps=4)),
    "find_basis, log": lambda: rs.find_basis(
        X, key=KEY, measure=rs.Log(0.1), method=rs.default_basis_method(rs.Log(0.1), steps=4)
    ),
    "compare": lambda: rs.compare(LAYER, X, {"pca": rotations()}, key=KEY),
    "evaluate": lambda: rs.evaluate(LAYER, X, rotations(), key=KEY),
    "fold": lambda: rs.fold(LAYER, rotations(), x=X),
    "floor": lambda: rs.floor(LAYER, X, rs.Log(0.1)),
    "baselines": lambda: [make(LAYER, X) for make in (rs.baselines.pca, rs.baselines.sparse_weights)],
    "capture": captured,
    "layers": lambda: (apply(LAYER, jnp.asarray(X)), jacobian_gram(LAYER, X)),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_are_in_full_precision(recorded, name):
    with jax.default_matmul_precision("bfloat16"):  # what an accelerator does by default
        PUBLIC[name]()
    assert recorded and set(recorded) == {FULL}


def test_reduced_precision_decides_nothing(recorded):
    objective = jacobians("mlp behind a layer norm", precision="bfloat16")
    bases = {"in": jnp.eye(8), "out": jnp.eye(8)}
    judged_value(objective, bases)
    rs.certify(objective, bases)
    assert recorded and set(recorded) == {FULL}
