"""The decode step against the whole model, token by token."""

import ml_dtypes
import numpy as np
import pytest

from helpers import ROOT
from rotsparse import models
from rotsparse._core.digests import digest
from rotsparse.models.fold import outputs
from rotsparse.models.load import load_model
from rotsparse.models.transformer import READ
from rotsparse.sparse.decode import Decoder, undecodable
from rotsparse.sparse.decode_weights import restored, stored
from rotsparse.sparse.export import sparse_outputs
from rotsparse.sparse.inputs import SparseInput
from sparse_models import oblique, orthogonal, sparse_inputs
from tiny_models import RAW, STORIES, message, needs_stories, tiny, tiny_llama2c

numba = pytest.importorskip("numba", reason="needs the extra `decode`")
# A compiled step is kept until its own file changes: here, until the kernels that it calls change too.
KERNELS = ROOT / "rotsparse" / "sparse" / "kernels.py"
numba.config.CACHE_DIR = str(ROOT / ".pytest_cache" / f"numba-{digest(KERNELS.read_bytes())}")

TOKENS = np.random.default_rng(0).integers(0, 31, 12)
NAMES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "phi3"]


def decoded(model, inputs=None, **options) -> np.ndarray:
    decoder = Decoder(model, inputs, **{"rotation_dtype": np.float32, **options})
    return np.array([decoder.step(token).copy() for token in TOKENS])


def close(ours, theirs, share=1.0, tolerance=1e-4):
    moved = np.abs(ours - theirs).max(axis=-1) > tolerance * np.abs(theirs).max()
    assert 1 - moved.mean() >= share, moved


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", [*NAMES, "llama2c"])
def test_the_dense_model(name, threads):
    model = tiny_llama2c() if name == "llama2c" else tiny(name)
    close(decoded(model, threads=threads), outputs(model, TOKENS[None])[0])


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", [*NAMES, "llama2c"])
def test_sparse_inputs(name, threads):
    """Counts, thresholds, shifts, scores, rotations carried out and folded."""
    model = tiny_llama2c() if name == "llama2c" else tiny(name)
    inputs = sparse_inputs(model)
    expected = sparse_outputs(model, inputs, TOKENS[None])[0]
    assert np.abs(expected - outputs(model, TOKENS[None])[0]).max() > 0.01 * np.abs(expected).max()
    close(decoded(model, inputs, threads=threads), expected, share=0.75)  # rounding moves a coordinate here and there


def test_some_sites_of_some_layers():
    model = tiny("llama")
    inputs = {(1, "input"): sparse_inputs(model)[1, "input"], (0, "hidden"): SparseInput(count=7)}
    close(decoded(model, inputs), sparse_outputs(model, inputs, TOKENS[None])[0], share=0.75)


@pytest.mark.parametrize("count", [0, 1, 16])
def test_few_and_all_coordinates(count):
    model = tiny("llama")
    inputs = {(layer, "input"): SparseInput(count=count) for layer in range(2)}
    close(decoded(model, inputs), sparse_outputs(model, inputs, TOKENS[None])[0])


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 1e9])
def test_low_and_high_thresholds(threshold):
    model = tiny("llama")
    inputs = {(layer, site): SparseInput(threshold=threshold) for layer in range(2) for site in READ}
    close(decoded(model, inputs), sparse_outputs(model, inputs, TOKENS[None])[0])


def test_a_rotated_stream():
    """One rotation for the whole stream is in the weights; the sites have none left."""
    model = tiny("llama")
    r = orthogonal(16, np.random.default_rng(0))
    folded = models.fold_stream(model, r, TOKENS[None]).model
    inputs = {(layer, site): SparseInput(count=9) for layer in range(2) for site in READ}
    close(decoded(folded, inputs), sparse_outputs(folded, inputs, TOKENS[None])[0], share=0.75)
    close(decoded(folded), outputs(model, TOKENS[None])[0])


@pytest.mark.parametrize(("dtype", "tolerance"), [(ml_dtypes.bfloat16, 0.03), (np.int8, 0.1)])
def test_coarser_weights(dtype, tolerance):
    """As far from float32 as rounding the weights takes them, and the same as a model with the rounded weights."""
    model = tiny("llama", tie_word_embeddings=True)
    close(decoded(model, dtype=dtype), outputs(model, TOKENS[None])[0], tolerance=tolerance)
    if dtype != np.int8:
        rounded = model.astype(dtype).astype(np.float32)
        ours = decoded(model, dtype=dtype)
        for layer, exact in zip(rounded.params["layers"], model.params["layers"], strict=True):
            layer["attn_norm"], layer["mlp_norm"] = exact["attn_norm"], exact["mlp_norm"]
        rounded.params["final_norm"] = model.params["final_norm"]
        close(ours, outputs(rounded, TOKENS[None])[0], tolerance=0.01)  # the embedding of a token is not rounded
    inputs = sparse_inputs(model)
    assert not np.array_equal(decoded(model, inputs, dtype=dtype), decoded(model, dtype=dtype))


@pytest.mark.parametrize("of", [orthogonal, oblique])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int8])
def test_coarser_rotations(dtype, of):
    """With everything kept a rounded rotation makes no difference: what stands behind it undoes the rounding."""
    model = tiny("llama")
    r = of(16, np.random.default_rng(0)).astype(np.float32)
    inverse = None if of is orthogonal else np.linalg.inv(r)
    shift = np.linspace(-1, 1, 16, dtype=np.float32)
    kept = SparseInput(r, shift, threshold=-1.0, inverse=inverse)
    inputs = {(layer, site): kept for layer in range(2) for site in ("attention", "input")}
    close(decoded(model, inputs, rotation_dtype=dtype), outputs(model, TOKENS[None])[0])
    assert (dtype == np.float32) == np.array_equal(
        decoded(model, inputs, rotation_dtype=dtype), decoded(model, inputs, rotation_dtype=np.float32)
    )
    with pytest.raises(ValueError, match="not as float16"):
        Decoder(model, inputs, rotation_dtype=np.float16)


def test_an_interrupted_step_leaves_no_thread_behind(monkeypatch):
    decoder = Decoder(tiny("llama"), threads=2)
    expected = decoder.step(3).copy()
    run = decoder._run

    def interrupted(*arguments):
        if arguments[-2] == 0:  # the rank
            raise KeyboardInterrupt
        return run(*arguments)

    decoder.reset()
    monkeypatch.setattr(decoder, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decoder.step(3)
    monkeypatch.setattr(decoder, "_run", run)
    np.testing.assert_array_equal(decoder.step(3), expected)


def test_stored_rows():
    rows = np.random.default_rng(0).normal(size=(5, 70)).astype(np.float32)
    rows[3] = 0
    flat, scales = stored(rows, np.dtype(np.int8))
    assert flat.shape == (5 * 128,) and flat.dtype == np.int8
    again = flat.reshape(5, 128)[:, :70] * scales[:, None]
    assert np.abs(again - rows).max() <= scales.max() / 2 + 1e-6
    assert not flat.reshape(5, 128)[:, 70:].any()


def test_generate_and_what_is_read():
    model = tiny("llama")
    decoder = Decoder(model, {(0, "input"): SparseInput(count=4)}, length=20)
    with pytest.raises(ValueError, match="nothing was read yet"):
        decoder.bytes_read()
    dense = Decoder(model, length=20)
    assert dense.generate(TOKENS[:3], 12) == models.generate(model, TOKENS[None, :3], 12)[0].tolist()
    decoder.generate(TOKENS[:3], 12)
    read, whole = decoder.bytes_read(), dense.bytes_read()
    assert whole["input"] - read["input"] == 12 * 48 * 4  # 12 of 16 rows of 48 numbers, in one of two layers
    assert {k: v for k, v in read.items() if k != "input"} == {k: v for k, v in whole.items() if k != "input"}
    with pytest.raises(ValueError, match="length counts the prompt"):
        dense.generate(TOKENS[:3], 21)
    with pytest.raises(ValueError, match="tokens are from 0 to 30, got -1"):
        dense.step(-1)
    dense.reset()
    for _ in range(20):
        dense.step(0)
    with pytest.raises(ValueError, match="20 tokens fit"):
        dense.step(0)


@pytest.mark.parametrize("name", sorted(set(RAW) - set(NAMES)))
def test_other_families_are_refused(name):
    with pytest.raises(ValueError, match="cannot be decoded here") as error:
        Decoder(tiny(name))
    assert "because it has" in message(error)


def test_skip_matrices_are_refused():
    model = tiny("llama")
    rotations = [orthogonal(16, np.random.default_rng(i)) for i in range(5)]
    assert "attn_skip" in str(undecodable(models.fold_stream(model, rotations, TOKENS[None]).model))


@needs_stories
def test_stories260k():
    model = load_model(STORIES / "stories260K.bin")
    tokens = np.random.default_rng(0).integers(3, 512, (1, 40))
    decoder = Decoder(model)
    ours = np.array([decoder.step(token).copy() for token in tokens[0]])
    close(ours, outputs(model, tokens)[0])


def test_exp_in_a_loop_that_may_be_reordered():
    from rotsparse.sparse.kernels import FAST, exp

    @numba.njit(fastmath=FAST)
    def each(x, y):
        for i in range(len(x)):
            y[i] = exp(x[i])

    x = np.linspace(-87, 88, 20_001).astype(np.float32)
    y = np.zeros_like(x)
    each(x, y)
    exact = np.exp(x.astype(np.float64))
    assert np.all(np.abs(y - exact) <= (1 + np.abs(x)) * 2e-7 * exact)
    assert exp(np.float32(-1e30)) < 1e-37 and exp(np.float32(1e30)) > 1e38  # neither infinite nor negative


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int8])
def test_rows_are_whole_cache_lines(dtype):
    for rows in (np.ones((3, 5)), np.ones((2, 64)), np.ones((1, 65))):
        flat, scales = stored(rows, np.dtype(dtype))
        assert flat.ctypes.data % 64 == 0 and flat.nbytes // len(rows) % 64 == 0
        np.testing.assert_allclose(restored(flat, scales, rows.shape[1], np.dtype(dtype)), rows)
