"""Layer and activation files: what was written is read, and everything unfit is named."""

from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from rotsparse.layers.files import load_activations, load_arrays, load_layer, save_layer
from rotsparse.layers.fold import fold
from rotsparse.layers.function import FunctionLayer
from rotsparse.layers.gated import GatedMLP
from rotsparse.layers.mlp import MLP, Dense
from rotsparse.layers.norms import Norm, layer_norm, rms_norm
from rotsparse.layers.rotations import Rotations

D, H, OUT = 5, 7, 5


def draw(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


LAYERS = {
    "dense": (lambda **o: Dense(draw(OUT, D), draw(OUT), activation="gelu", **o)),
    "no bias": (lambda **o: Dense(draw(OUT, D), activation="gelu", **o)),
    "mlp": (lambda **o: MLP(draw(H, D), draw(H), draw(OUT, H), draw(OUT), activation="gelu", **o)),
    "gated": (lambda **o: GatedMLP(draw(H, D), draw(H, D), draw(OUT, H), b_up=draw(H), activation="gelu", **o)),
}
NORMS = {
    None: lambda: None,
    "rms": lambda: rms_norm(draw(D), eps=0.3),
    "layer": lambda: layer_norm(draw(D), draw(D), eps=0.3),
    "rms with a bias": lambda: Norm(draw(D), 2 * draw(D), None, D, 0.3),  # what folding leaves of a LayerNorm
}


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_round_trip(tmp_path, kind, norm, folded):
    layer = LAYERS[kind](norm=NORMS[norm](), skip=True)
    if folded:
        layer = fold(layer, Rotations.haar(jax.random.key(0), D, OUT)).layer
    save_layer(tmp_path / "layer.safetensors", layer)
    loaded = load_layer(tmp_path / "layer.safetensors", "gelu", norm=norm and norm.split()[0])
    x = draw(4, D)
    np.testing.assert_allclose(loaded(x), layer(x), rtol=1e-6, atol=1e-6)


def test_a_layer_norm_is_not_read_as_another(tmp_path):
    """A saved LayerNorm says that it is one."""
    save_layer(tmp_path / "layer.safetensors", LAYERS["mlp"](norm=layer_norm(draw(D))))
    with pytest.raises(ValueError, match="its norm is layer"):
        load_layer(tmp_path / "layer.safetensors", "gelu", norm="rms")


def test_npz_and_activations(tmp_path):
    np.savez(tmp_path / "layer.npz", w_in=draw(H, D), b_in=draw(H), w_out=draw(OUT, H))
    assert load_layer(tmp_path / "layer.npz", "relu").d_out == OUT
    x = draw(9, D)
    np.save(tmp_path / "x.npy", x)
    np.savez_compressed(tmp_path / "x.npz", h=x)
    save_file({"h": x}, tmp_path / "x.safetensors")
    for name in ("x.npy", "x.npz", "x.safetensors"):
        np.testing.assert_array_equal(load_activations(tmp_path / name, D), x)


def test_unreadable_files(tmp_path):
    np.savez(tmp_path / "good.npz", w=draw(OUT, D))
    np.save(tmp_path / "good.npy", draw(9, D))
    save_file({"w": draw(OUT, D)}, tmp_path / "good.safetensors")
    for suffix in ("npz", "npy", "safetensors"):
        content = (tmp_path / f"good.{suffix}").read_bytes()
        for damaged in (content[: len(content) // 2], content[:5], b""):
            (tmp_path / f"bad.{suffix}").write_bytes(damaged)
            with pytest.raises(ValueError, match=f"bad.{suffix} cannot be read, it may be damaged"):
                load_arrays(tmp_path / f"bad.{suffix}")
        with pytest.raises(ValueError, match=f"missing.{suffix} does not exist"):
            load_arrays(tmp_path / f"missing.{suffix}")
    (tmp_path / "x.txt").write_text("1 2")
    with pytest.raises(ValueError, match=r"expected a \.npy, \.npz or \.safetensors file, got '\.txt'"):
        load_arrays(tmp_path / "x.txt")
    np.save(tmp_path / "objects.npy", np.array([{}, None]), allow_pickle=True)
    with pytest.raises(ValueError, match="cannot be read"):
        load_arrays(tmp_path / "objects.npy")


def layer_error(tmp_path, arrays, match, **options: Any):
    np.savez(tmp_path / "layer.npz", **arrays)
    with pytest.raises(ValueError, match=match):
        load_layer(tmp_path / "layer.npz", **{"activation": "relu", **options})


def test_unfit_layers(tmp_path):
    w = draw(OUT, D)
    layer_error(tmp_path, {"weight": w}, "holds weight: expected w, b .single layer., or w_in")
    layer_error(tmp_path, {"w": w, "w_in": w}, "holds w, w_in: expected")
    layer_error(tmp_path, {"w": w, "b": draw(OUT + 1)}, r"layer.npz: b should have shape \[5\].*got \[6\]")
    layer_error(tmp_path, {"w_in": draw(H, D), "w_out": draw(OUT, H + 1)}, r"w_out should have shape \[any, 7\]")
    layer_error(tmp_path, {"w_gate": draw(H, D)}, "w_down, w_up missing")
    layer_error(tmp_path, {"w": np.full((3, 3), np.nan, np.float32)}, "NaN or infinity")
    layer_error(tmp_path, {"w": w.astype(np.int16)}, "float32 or float64, got int16: convert it first")
    layer_error(tmp_path, {"w": w.astype(np.int32)}, "float32 or float64, got int32")
    layer_error(tmp_path, {"w": w[0]}, r"should have shape \[any, any\]")
    layer_error(tmp_path, {"w": w[:0]}, "empty")
    layer_error(tmp_path, {"w": w}, "unknown activation 'step': expected one of", activation="step")
    layer_error(tmp_path, {"w": w}, "no norm_scale", norm="rms")
    layer_error(tmp_path, {"w": w, "norm_scale": draw(D)}, "say which norm")
    layer_error(tmp_path, {"w": w, "norm_scale": draw(D + 1)}, "width", norm="rms")
    bad = {"w": w, "norm_scale": draw(D), "norm_eps": np.array(-1.0)}
    layer_error(tmp_path, bad, "norm_eps should be one number that is not negative, got -1", norm="rms")
    alone = {"w": w, "norm_bias": draw(D), "norm_eps": np.array(0.1)}
    layer_error(tmp_path, alone, "holds norm_bias, norm_eps but no norm_scale: add it")
    layer_error(tmp_path, alone, "holds no norm_scale, the scale γ of the layer norm", norm="layer")
    direction = {"w": w, "norm_scale": draw(D), "norm_mean_direction": np.full(D, D**-0.5, np.float32)}
    layer_error(tmp_path, direction, "an RMSNorm does not have: its norm is layer", norm="rms")
    layer_error(tmp_path, direction | {"norm_scale": draw(D + 1)}, r"shape \[6\].*got \[5\]", norm="layer")
    longer = direction | {"norm_mean_direction": np.ones(D, np.float32)}
    layer_error(tmp_path, longer, "a vector of length 1, got length 2.24", norm="layer")
    layer_error(tmp_path, direction, "unknown norm 'batch': expected rms or layer", norm="batch")
    layer_error(tmp_path, {"w": draw(3, D)}, "skip connection.*expected d_in = d_out, got 5 and 3", skip=True)
    layer_error(tmp_path, {"w": w, "skip": np.eye(D, dtype=np.float32)}, "already holds", skip=True)


def test_unfit_activations(tmp_path):
    def error(x, match):
        np.save(tmp_path / "x.npy", x)
        with pytest.raises(ValueError, match=match):
            load_activations(tmp_path / "x.npy", D)

    error(draw(9, D + 1), r"x.npy should have shape \[examples, 5\], the inputs of the layer, got \[9, 6\]")
    error(draw(D, 9), "transposed")
    error(draw(0, D), "holds 0 examples: at least 2")
    error(np.where(draw(9, D) > 0, np.inf, 0).astype(np.float32), "NaN or infinity")
    error(np.ones((9, D), np.float32), "zero variance")
    error(np.ones((9, D), np.int64), "got int64")
    error(draw(9, D).astype(np.int16), "got int16")
    np.savez(tmp_path / "two.npz", a=draw(9, D), b=draw(9, D))
    with pytest.raises(ValueError, match=r"holds 2 arrays \(a, b\)"):
        load_activations(tmp_path / "two.npz", D)


def test_a_function_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="FunctionLayer has no weights"):
        save_layer(tmp_path / "f.safetensors", FunctionLayer(lambda x: x, D, D))


@pytest.mark.parametrize("suffix", ["npy", "npz", "safetensors"])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_widened(suffix, dtype, tmp_path):
    x, path = draw(9, D).astype(dtype), tmp_path / f"x.{suffix}"
    writers = {"npy": np.save, "npz": lambda p, x: np.savez(p, x=x), "safetensors": lambda p, x: save_file({"x": x}, p)}
    writers[suffix](path, x)
    if dtype is np.float16 or suffix == "safetensors":
        np.testing.assert_array_equal(load_activations(path, D), x.astype(np.float32))
        return
    with pytest.raises(ValueError, match=r"view\(ml_dtypes\.bfloat16\)\.astype\('float32'\)"):
        load_activations(path, D)
    if suffix == "npy":  # the advice works
        np.testing.assert_array_equal(np.load(path).view(ml_dtypes.bfloat16).astype("float32"), x.astype(np.float32))


def test_a_layer_in_half_precision(tmp_path):
    save_file({"w_in": draw(6, D).astype(np.float16)}, tmp_path / "layer.safetensors")
    layer = load_layer(tmp_path / "layer.safetensors", "relu")
    assert isinstance(layer, Dense) and layer.w.dtype == np.float32
