"""`fold`: the function is the same, in float32 and in float64, whatever the layer."""

import itertools
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest

import rotsparse as rs
from rotsparse.layers.fold import fold
from rotsparse.layers.function import FunctionLayer
from rotsparse.layers.gated import GatedMLP
from rotsparse.layers.mlp import MLP, Dense
from rotsparse.layers.norms import layer_norm, rms_norm
from rotsparse.layers.rotations import Rotations

D, H, N = 12, 20, 30


def make_layer(kind, norm, dtype) -> Any:
    rng = np.random.default_rng(0)
    draw = lambda *shape: (rng.standard_normal(shape) / shape[-1] ** 0.5).astype(dtype)  # noqa: E731
    if kind == "function":
        w = draw(D, D)
        return FunctionLayer(lambda x: w @ jax.numpy.tanh(x), D, D)
    norm = {"none": None, "rms": rms_norm(1 + draw(D)), "layer": layer_norm(1 + draw(D), draw(D))}[norm]
    options: dict[str, Any] = {"norm": norm, "skip": kind != "dense"}
    match kind:
        case "dense":
            return Dense(draw(8, D), draw(8), activation="gelu", **options)
        case "mlp":
            return MLP(draw(H, D), draw(H), draw(D, H), draw(D), activation="silu", **options)
        case "gated":
            return GatedMLP(draw(H, D), draw(H, D), draw(D, H), **options)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-12)])
@pytest.mark.parametrize(
    ("kind", "norm"),
    [*itertools.product(["dense", "mlp", "gated"], ["none", "rms", "layer"]), ("function", "none")],
)
def test_function_is_preserved(kind, norm, dtype, tolerance):
    with jax.enable_x64(dtype == np.float64):
        layer = make_layer(kind, norm, dtype)
    x = np.random.default_rng(1).standard_normal((N, D)).astype(dtype)
    # float32 rotations: fold makes them orthogonal to float64 first
    rotations = Rotations.haar(jax.random.key(0), layer.d_in, layer.d_out)
    folded = fold(layer, rotations, x)
    assert folded.error <= tolerance
    assert folded.rotations.orthogonality_error() < 1e-14
    with jax.enable_x64(dtype == np.float64):  # and by hand, not by fold's own check
        z = (x.astype(np.float64) @ folded.rotations.r_in.T).astype(dtype)
        back = np.asarray(folded.layer(z)) @ folded.rotations.r_out
        y = np.asarray(layer(x))
    assert np.abs(back - y).max() <= tolerance
    assert y.dtype == dtype
    np.testing.assert_allclose(folded.scale, np.sqrt((y.astype(np.float64) ** 2).mean()), rtol=1e-5)


def test_folding_twice_is_folding_the_composition():
    layer = make_layer("mlp", "layer", np.float32)
    a, b = (Rotations.haar(jax.random.key(i), D, D) for i in range(2))
    twice, once = fold(fold(layer, a).layer, b).layer, fold(layer, b.compose(a)).layer
    z = np.random.default_rng(0).standard_normal((N, D)).astype(np.float32)
    np.testing.assert_allclose(twice(z), once(z), atol=1e-5)


def test_precision_is_that_of_the_weights():
    with jax.enable_x64(True):
        layer = make_layer("mlp", "none", np.float64)
    folded = fold(
        layer, Rotations.haar(jax.random.key(0), D, D), np.ones((2, D), np.float32) + np.eye(2, D, dtype=np.float32)
    )
    assert folded.layer.weights()["w_in"].dtype == np.float64
    assert folded.error < 1e-12


def test_indices_of_a_users_layer_stay_integers():
    class Shuffled(eqx.Module):
        order: np.ndarray

        def __call__(self, x):
            return jax.numpy.tanh(x)[self.order]

    layer = FunctionLayer(Shuffled(np.random.default_rng(0).permutation(D).astype(np.int32)), D, D)
    folded = fold(layer, Rotations.haar(jax.random.key(0), D, D))
    assert folded.error < 1e-5


def test_bad_input():
    layer = make_layer("mlp", "none", np.float32)
    with pytest.raises(ValueError, match="the rotations have widths 3 and 12, the layer 12 and 12"):
        fold(layer, Rotations.identity(3, D))
    with pytest.raises(ValueError, match=r"x should have shape \[any, 12\]"):
        fold(layer, Rotations.identity(D, D), np.ones((4, 3), np.float32))

    class Wrong(FunctionLayer):
        def rotate(self, r_in, r_out):
            return self

    wrong = Wrong(lambda x: jax.numpy.sin(x), D, D)  # pyright: ignore[reportCallIssue]
    with pytest.raises(rs.CheckError, match="folding changed the function"):
        fold(wrong, Rotations.haar(jax.random.key(0), D, D))
