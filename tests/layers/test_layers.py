"""Layers: every closed-form Jacobian is autodiff's, and a rotated layer is the same function in other coordinates."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from rotsparse.layers.activations import ACTIVATIONS
from rotsparse.layers.function import FunctionLayer
from rotsparse.layers.gated import GatedMLP
from rotsparse.layers.mlp import MLP, Dense
from rotsparse.layers.norms import layer_norm, rms_norm
from rotsparse.layers.subspace import Subspace

pytestmark = pytest.mark.usefixtures("strict")

D, HIDDEN, N = 5, 7, 3
KINDS = ["dense", "mlp", "gated"]
NORMS = ["none", "rms", "layer"]
SKIPS = ["none", "identity", "matrix"]


def make_layer(
    kind, norm="none", skip="none", activation="gelu", *, bias=True, dtype: type = np.float64, d_in=D, d_out=D
) -> Any:
    """A random layer. A skip matrix maps d_in to d_out; a skip of the identity needs them equal."""
    rng = np.random.default_rng([KINDS.index(kind), NORMS.index(norm), SKIPS.index(skip), bias])

    def draw(*shape):
        return rng.standard_normal(shape).astype(dtype) / np.sqrt(shape[-1])

    def maybe(d):
        return draw(d) if bias else None

    options: dict[str, Any] = {
        "activation": activation,
        "norm": {
            "none": lambda: None,
            "rms": lambda: rms_norm(1 + draw(d_in), eps=0.1),
            "layer": lambda: layer_norm(1 + draw(d_in), maybe(d_in), eps=0.1),
        }[norm](),
        "skip": {"none": False, "identity": True, "matrix": draw(d_out, d_in)}[skip],
    }
    if kind == "dense":
        return Dense(draw(d_out, d_in), maybe(d_out), **options)
    if kind == "mlp":
        return MLP(draw(HIDDEN, d_in), maybe(HIDDEN), draw(d_out, HIDDEN), maybe(d_out), **options)
    weights = draw(HIDDEN, d_in), draw(HIDDEN, d_in), draw(d_out, HIDDEN)
    return GatedMLP(*weights, b_gate=maybe(HIDDEN), b_up=maybe(HIDDEN), b_down=maybe(d_out), **options)


def orthogonal(seed, d, rows=None):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0][:rows]


def examples(n=N, d=D, dtype: type = np.float64):
    return jnp.asarray(np.random.default_rng(5).standard_normal((n, d)) + 0.3, dtype)


every_form = pytest.mark.parametrize(
    ("kind", "norm", "skip"), [(kind, norm, skip) for kind in KINDS for norm in NORMS for skip in SKIPS]
)


# --- forward ------------------------------------------------------------------------------------------------------


@every_form
def test_the_output_is_the_formula(kind, norm, skip, x64):
    """Written out again in NumPy, one example at a time."""
    layer = make_layer(kind, norm, skip)
    x = examples()

    def gelu(a):
        return a * scipy.special.ndtr(a)

    def formula(x):
        n = x
        if norm == "rms":
            n = layer.norm.scale * x / np.sqrt((x**2).mean() + 0.1)
        if norm == "layer":
            n = layer.norm.scale * (x - x.mean()) / np.sqrt(x.var() + 0.1) + layer.norm.bias
        if kind == "gated":
            hidden = gelu(layer.w_gate @ n + layer.b_gate) * (layer.w_up @ n + layer.b_up)
            y = layer.w_down @ hidden + layer.b_down
        else:
            w, b = (layer.w, layer.b) if kind == "dense" else (layer.w_in, layer.b_in)
            y = gelu(w @ n + b)
            y = y if kind == "dense" else layer.w_out @ y + layer.b_out
        return y if skip == "none" else y + x if skip == "identity" else y + layer.skip @ x

    np.testing.assert_allclose(layer(x), [formula(row) for row in np.asarray(x)], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_leading_axes_are_examples(kind, x64):
    layer = make_layer(kind, "layer", d_out=4)
    x = examples(6)
    assert layer(x[0]).shape == (4,)
    np.testing.assert_allclose(layer(x.reshape(2, 3, D)), layer(x).reshape(2, 3, 4))


# --- Jacobians ----------------------------------------------------------------------------------------------------


@every_form
def test_jacobian_is_autodiffs(kind, norm, skip, x64):
    """Of every form, and of every kind with every activation: a kind has as many forms as there are activations."""
    activations = list(ACTIVATIONS)
    assert len(activations) == len(NORMS) * len(SKIPS)
    layer = make_layer(kind, norm, skip, activations[len(SKIPS) * NORMS.index(norm) + SKIPS.index(skip)])
    x = examples()
    np.testing.assert_allclose(layer.jacobian(x), jax.vmap(jax.jacfwd(layer))(x), rtol=1e-11, atol=1e-12)


@every_form
def test_rotated_jacobian_is_the_product(kind, norm, skip, x64):
    """Square or with fewer rows (a subspace), on either side or both, with and without biases, other widths."""
    d_out = D if skip == "identity" else 4
    layer = make_layer(kind, norm, skip, "silu", bias=False, d_out=d_out)
    x = examples()
    plain = np.asarray(jax.vmap(jax.jacfwd(layer))(x))
    r_in, r_out = orthogonal(1, D), orthogonal(2, d_out)
    for rotations, expected in (
        ((r_in, None), plain @ r_in.T),
        ((None, r_out[:3]), r_out[:3] @ plain),
        ((r_in[:2], r_out[:1]), r_out[:1] @ plain @ r_in[:2].T),
    ):
        np.testing.assert_allclose(layer.jacobian(x, *rotations), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", NORMS)
def test_float32_stays_float32_and_close(kind, norm):
    exact = make_layer(kind, norm, "matrix", dtype=np.float32)
    x = examples(dtype=np.float32)
    r = jnp.asarray(orthogonal(1, D), jnp.float32)
    z = jax.jit(lambda layer, x: layer.jacobian(x, r, r))(exact, x)
    assert z.dtype == exact(x).dtype == jnp.float32
    with jax.enable_x64(True):
        wide = make_layer(kind, norm, "matrix").jacobian(
            examples(), np.asarray(r, np.float64), np.asarray(r, np.float64)
        )
    np.testing.assert_allclose(z, wide, atol=2e-5)


# --- rotating a layer ---------------------------------------------------------------------------------------------


@every_form
def test_rotate_preserves_the_function(kind, norm, skip, x64):
    """`R_out f(R_inᵀ z)`, with the rotated layer's own Jacobian that of the rotated function."""
    layer = make_layer(kind, norm, skip)
    x = examples()
    r_in, r_out = orthogonal(1, D), orthogonal(2, D)
    rotated = layer.rotate(r_in, r_out)
    np.testing.assert_allclose(rotated(x @ r_in.T), layer(x) @ r_out.T, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(rotated.jacobian(x @ r_in.T), layer.jacobian(x, r_in, r_out), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(layer.rotate(r_in, None)(x @ r_in.T), layer(x), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(layer.rotate(None, r_out)(x), layer(x) @ r_out.T, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(layer.rotate(None, None)(x), layer(x))


@every_form
def test_rotating_twice_is_the_composition_and_back_again_the_identity(kind, norm, skip, x64):
    layer = make_layer(kind, norm, skip, bias=False)
    x = examples()
    first, second = (orthogonal(1, D), orthogonal(2, D)), (orthogonal(3, D), orthogonal(4, D))
    twice = layer.rotate(*first).rotate(*second)
    r_in, r_out = second[0] @ first[0], second[1] @ first[1]
    np.testing.assert_allclose(twice(x @ r_in.T), layer(x) @ r_out.T, rtol=1e-12, atol=1e-12)
    back = twice.rotate(r_in.T, r_out.T)
    np.testing.assert_allclose(back(x), layer(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["none", "rms"])
def test_fewer_rows_restrict_the_layer_to_a_subspace(kind, norm, x64):
    layer = make_layer(kind, norm, "matrix", d_out=4)
    r_in, r_out = orthogonal(1, D, 2), orthogonal(2, 4, 3)
    small = layer.rotate(r_in, r_out)
    z = examples(d=2)
    assert small(z).shape == (N, 3)
    np.testing.assert_allclose(small(z), layer(z @ r_in) @ r_out.T, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(small.jacobian(z), layer.jacobian(z @ r_in, r_in, r_out), rtol=1e-11, atol=1e-12)


def test_layer_norm_refuses_to_lose_its_mean_direction(x64):
    with pytest.raises(ValueError, match=r"LayerNorm can only be rotated by a square matrix, got \[2, 5\].*RMSNorm"):
        make_layer("mlp", "layer").rotate(orthogonal(1, D, 2), None)


def test_a_rotated_dense_layer_still_has_its_own_gates(x64):
    """φ pins the neurons: its output rotation becomes a linear map behind φ, not a change of `w`."""
    layer = make_layer("dense")
    rotated = layer.rotate(None, orthogonal(2, D))
    assert layer.left is None
    np.testing.assert_allclose(rotated.w_out, orthogonal(2, D))
    np.testing.assert_array_equal(rotated.w_in, layer.w)


# --- functions and subspaces ---------------------------------------------------------------------------------------


GATHERABLE = {
    "mlp": lambda draw, b: MLP(draw(40, D), b, draw(4, 40), activation="relu", norm=rms_norm(1 + 0.1 * draw(D))),
    "gated": lambda draw, b: GatedMLP(draw(40, D), draw(40, D), draw(4, 40), b_gate=b, activation="relu"),
}


@pytest.mark.parametrize("kind", GATHERABLE)
def test_gathering_active_neurons_changes_nothing_but_the_work(kind, x64):
    rng = np.random.default_rng(3)
    layer, x = GATHERABLE[kind](lambda *shape: rng.standard_normal(shape), np.full(40, -2.0)), examples(30)
    gathered = layer.gathered(x)
    assert 0 < gathered.active <= 16
    r_in, r_out = orthogonal(1, D, 3), orthogonal(2, 4)
    np.testing.assert_allclose(gathered.jacobian(x, r_in, r_out), layer.jacobian(x, r_in, r_out), atol=1e-13)
    np.testing.assert_allclose(gathered.jacobian(x), layer.jacobian(x), atol=1e-13)
    # Examples that it was not made for are never silently wrong.
    others = 5 * examples(200)[100:]
    exact, got = layer.jacobian(others), gathered.jacobian(others)
    wrong = np.isnan(got).all(axis=(1, 2))
    assert wrong.any()
    np.testing.assert_allclose(got[~wrong], exact[~wrong], atol=1e-12)
    assert gathered.gathered(others[wrong]).active is None or gathered.gathered(others).active > gathered.active


def test_only_layers_with_few_active_neurons_gather():
    x = examples(30, dtype=np.float32)
    assert make_layer("mlp", activation="gelu").gathered(x).active is None
    assert make_layer("mlp", activation="relu").gathered(x).active is None  # half of them
    assert make_layer("dense", activation="relu").gathered(x).active is None


def test_gathering_saves_work():
    rng = np.random.default_rng(0)
    w_in, w_out, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((256, 64), (64, 256), (8, 64)))
    layer = MLP(w_in, np.full(256, -10, np.float32), w_out)
    flops = lambda one: jax.jit(lambda x: one.jacobian(x)).lower(x).compile().cost_analysis()["flops"]  # noqa: E731
    assert flops(layer.gathered(x)) < 0.5 * flops(layer)


@pytest.mark.parametrize(("kind", "d_out"), [("gated", 8), ("mlp", 3)])
def test_function_layer_agrees_with_the_closed_form(kind, d_out, x64):
    """In forward mode, and with fewer outputs than inputs in reverse mode."""
    closed = make_layer(kind, "layer", "matrix", d_out=d_out)
    x = examples()
    r_in, r_out = orthogonal(1, D), orthogonal(2, d_out)

    @jax.jit
    def everything(layer):
        rotated = layer.rotate(r_in, r_out)
        back = rotated.rotate(r_in.T, r_out.T)
        outputs = layer(x), layer.jacobian(x), layer.jacobian(x, r_in[:2], r_out[:1])
        return outputs, (rotated(x), rotated.jacobian(x, r_in[:2], r_out[:1])), back(x)

    for actual, expected in zip(
        jax.tree.leaves(everything(FunctionLayer(closed, D, d_out))), jax.tree.leaves(everything(closed)), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-11, atol=1e-12)


def test_function_layer_takes_any_function_and_any_leading_axes(x64):
    def f(x):
        return jnp.stack([x[0] * x[1], jnp.sin(x[2])])

    layer = FunctionLayer(f, 3, 2)
    x = examples(6, 3)
    expected = np.stack([x[:, 0] * x[:, 1], np.sin(x[:, 2])], axis=1)
    np.testing.assert_allclose(layer(x), expected)
    np.testing.assert_allclose(layer(x.reshape(2, 3, 3)), expected.reshape(2, 3, 2))
    np.testing.assert_allclose(layer(x[0]), expected[0])
    zero = np.zeros(6)
    rows = [[x[:, 1], x[:, 0], zero], [zero, zero, np.cos(x[:, 2])]]
    np.testing.assert_allclose(layer.jacobian(x), np.moveaxis(np.array(rows), -1, 0))


def test_a_rotated_function_layer_knows_its_widths(x64):
    rows = 2, 3
    layer = make_layer("mlp", d_out=4)
    rotated = FunctionLayer(layer, D, 4).rotate(orthogonal(1, D, rows[0]), orthogonal(2, 4, rows[1]))
    assert (rotated.d_in, rotated.d_out) == rows
    z = examples(d=rows[0])
    expected = layer.rotate(orthogonal(1, D, rows[0]), orthogonal(2, 4, rows[1]))
    np.testing.assert_allclose(rotated(z), expected(z), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(rotated.jacobian(z), expected.jacobian(z), rtol=1e-11, atol=1e-12)


def test_subspace_sees_the_layer_through_its_frames(x64):
    layer = make_layer("mlp", "layer", d_out=4)
    frame_in, frame_out = orthogonal(1, D, 3), orthogonal(2, 4, 2)
    view = Subspace(layer, frame_in, frame_out)
    x = examples()
    r_in, r_out = orthogonal(3, 3), orthogonal(4, 2)
    assert (view.d_in, view.d_out) == (3, 2)
    np.testing.assert_allclose(view(x), layer(x) @ frame_out.T)
    np.testing.assert_allclose(view.jacobian(x), frame_out @ np.asarray(layer.jacobian(x)) @ frame_in.T, atol=1e-12)
    np.testing.assert_allclose(view.jacobian(x, r_in, r_out), view.rotate(r_in, r_out).jacobian(x), atol=1e-12)
    np.testing.assert_allclose(
        view.jacobian(x, r_in, r_out), r_out @ np.asarray(view.jacobian(x)) @ r_in.T, rtol=1e-11, atol=1e-12
    )


@pytest.mark.parametrize("kind", ["mlp", "gated"])
def test_layers_are_pytrees_that_jit_and_vmap_take(kind):
    """Layers of equal shape can be stacked; a jitted function of one is not traced again for another."""
    traces = 0

    @jax.jit
    def jacobian(layer, x):
        nonlocal traces
        traces += 1
        return layer.jacobian(x)

    layers = [make_layer(kind, "layer", "matrix", dtype=np.float32, bias=True) for _ in range(2)]
    layers[1] = jax.tree.map(lambda w: 0.5 * w, layers[1])
    x = examples(dtype=np.float32)
    separate = [jacobian(layer, x) for layer in layers]
    assert traces == 1
    stacked = jax.tree.map(lambda *w: jnp.stack(w), *layers)
    together = jax.vmap(lambda layer: layer.jacobian(x))(stacked)
    np.testing.assert_allclose(together, np.stack(separate), atol=1e-5)


# --- what users hand in ------------------------------------------------------------------------------------------

W = np.ones((4, 3), "f4")


def weights(**changes) -> Any:
    """The weights of a small valid layer of each kind, some replaced."""
    kinds = {
        "dense": {"w": W, "b": W[:, 0]},
        "mlp": {"w_in": W, "b_in": W[:, 0], "w_out": W.T, "b_out": W[0]},
        "gated": {"w_gate": W, "w_up": W, "w_down": W.T},
    }
    kind = changes.pop("kind")
    return {"dense": Dense, "mlp": MLP, "gated": GatedMLP}[kind](**(kinds[kind] | changes))


NAN = np.where(np.eye(4, 3, dtype="f4") == 1, np.nan, W)
BAD = [
    ({"kind": "mlp", "w_in": W[0]}, "w_in should have shape [any, any] (matrices are [out, in]), got [3]"),
    ({"kind": "mlp", "w_out": W}, "w_out should have shape [any, 4] (matrices are [out, in]), got [4, 3]"),
    ({"kind": "mlp", "b_in": W[0]}, "b_in should have shape [4] (matrices are [out, in]), got [3]"),
    ({"kind": "mlp", "b_out": W[:, 0]}, "b_out should have shape [3] (matrices are [out, in]), got [4]"),
    ({"kind": "mlp", "b_in": W[:, :1]}, "b_in should have shape [4] (matrices are [out, in]), got [4, 1]"),
    ({"kind": "gated", "w_up": W.T}, "w_up should have shape [4, 3] (matrices are [out, in]), got [3, 4]"),
    ({"kind": "gated", "w_down": W}, "w_down should have shape [any, 4] (matrices are [out, in]), got [4, 3]"),
    ({"kind": "gated", "b_gate": W[0]}, "b_gate should have shape [4] (matrices are [out, in]), got [3]"),
    ({"kind": "gated", "b_up": W[0]}, "b_up should have shape [4] (matrices are [out, in]), got [3]"),
    ({"kind": "gated", "b_down": W[:, 0]}, "b_down should have shape [3] (matrices are [out, in]), got [4]"),
    ({"kind": "dense", "w": NAN}, "w contains NaN or infinity (3 of 12 entries, the first at [0, 0])"),
    ({"kind": "dense", "b": np.array([0, np.inf, 0, 0], "f4")}, "b contains NaN or infinity"),
    ({"kind": "dense", "w": W.astype(int)}, "w should be float32 or float64, got int64: convert it first"),
    ({"kind": "dense", "w": W.astype("f2")}, "w should be float32 or float64, got float16: convert it first"),
    ({"kind": "dense", "w": jnp.asarray(W, jnp.bfloat16)}, "w should be float32 or float64, got bfloat16"),
    ({"kind": "dense", "w": np.zeros((0, 3), "f4"), "b": None}, "w is empty: its shape is [0, 3]"),
    ({"kind": "dense", "w": "weights"}, "w should have shape"),
    ({"kind": "dense", "skip": True}, "expected d_in = d_out, got 3 and 4"),
    ({"kind": "dense", "skip": W.T}, "skip should have shape [4, 3] (matrices are [out, in]), got [3, 4]"),
    ({"kind": "gated", "norm": rms_norm(W[:, 0])}, "the norm has width 4, but the layer's input has width 3"),
    ({"kind": "mlp", "activation": "swish"}, "unknown activation 'swish': expected one of identity, relu"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message[:45] for _, message in BAD])
def test_bad_weights_are_refused_with_what_was_expected_and_what_came(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        weights(**changes)


def test_bad_norms_are_refused():
    with pytest.raises(ValueError, match=r"scale should have shape \[any\].*got \[4, 3\]"):
        rms_norm(W)
    with pytest.raises(ValueError, match="scale has 4 entries and its bias 3"):
        layer_norm(W[:, 0], W[0])
    with pytest.raises(ValueError, match="bias contains NaN"):
        layer_norm(W[0], np.array([np.nan, 0, 0], "f4"))


def test_valid_weights_are_taken():
    for kind in KINDS:
        assert weights(kind=kind)(jnp.ones((2, 3))).shape[0] == 2
