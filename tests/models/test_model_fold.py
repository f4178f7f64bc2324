import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rotsparse import Rotations
from rotsparse.models.fold import fold_mlp, fold_stream, keep_mean
from rotsparse.models.huggingface import load_huggingface
from rotsparse.models.huggingface_writer import save_huggingface
from rotsparse.models.layers import mlp_layer
from rotsparse.models.llama2c import load_llama2c, save_llama2c
from rotsparse.models.stream import stream_places
from rotsparse.models.transformer import run
from tiny_models import FOLDABLE, RAW, STORIES, inputs, message, needs_stories, tiny, tiny_llama2c

TOKENS = np.random.default_rng(0).integers(0, 31, (2, 9))


def haar(d, seed=0):
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))
    return q * np.sign(np.diag(r))


def logits(model, tokens=TOKENS):
    with jax.enable_x64(model.dtype == np.float64):
        return np.asarray(run(model.params, model.config, tokens)[0])


@pytest.mark.parametrize("name", FOLDABLE)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rotated_stream_is_the_same_function(name, dtype):
    model = tiny(name).astype(dtype)
    folded = fold_stream(model, haar(16), TOKENS)
    tolerance = 1e-5 if dtype == np.float32 else 1e-12
    np.testing.assert_allclose(logits(folded.model), logits(model), atol=tolerance * folded.scale)
    assert folded.exact_error < 1e-12 * folded.scale
    assert max(folded.rounded_error, folded.error) <= tolerance * folded.scale
    assert folded.model.dtype == dtype and not folded.model.tied


@pytest.mark.parametrize("name", FOLDABLE)
def test_the_stream_really_is_in_new_coordinates(name):
    """What enters an MLP is the rotated normalised stream: nothing else would give the weights their meaning."""
    model, r = tiny(name), haar(16)
    folded = fold_stream(model, r, TOKENS).model
    seen, rotated = (run(m.params, m.config, TOKENS, capture=((1, "residual"),))[1] for m in (model, folded))
    x = np.asarray(seen[1, "residual"])
    x = x - x.mean(axis=-1, keepdims=True) if model.config.norm == "layer" else x
    np.testing.assert_allclose(rotated[1, "residual"], x @ r.T, atol=1e-4)


@pytest.mark.parametrize("name", FOLDABLE)
def test_a_rotation_for_every_place(name):
    model = tiny(name)
    places = stream_places(model.config)
    folded = fold_stream(model, [haar(16, i) for i in range(len(places))], TOKENS)
    assert folded.exact_error < 1e-12 * folded.scale
    np.testing.assert_allclose(logits(folded.model), logits(model), atol=1e-5 * folded.scale)
    with pytest.raises(ValueError, match=rf"2 rotations for a stream of {len(places)} places \(layer 0"):
        fold_stream(model, [haar(16)] * 2, TOKENS)


@pytest.mark.parametrize("name", FOLDABLE)
def test_the_block_between_two_places_is_the_rotated_layer(name):
    """A pair of rotations fitted to an MLP with norm and skip goes into the model as it is."""
    model, i = tiny(name), 1
    places = stream_places(model.config)
    rotations = [haar(16, 10 + i) for i in range(len(places))]
    at = i if model.config.parallel else 2 * i + 1
    folded = fold_stream(model, rotations, TOKENS).model
    expected = mlp_layer(model, i, norm=True, skip=True).rotate(*map(jnp.asarray, rotations[at : at + 2]))
    block = mlp_layer(folded, i, norm=True, skip=True)
    x = np.random.default_rng(1).normal(size=(5, 16))
    # A centred stream has no mean, and neither has what is written to it.
    centre = (lambda v: v - v.mean(-1, keepdims=True)) if model.config.norm == "layer" else lambda v: v
    z = centre(x) @ rotations[at].T
    y = np.asarray(expected(jnp.asarray(z))) @ rotations[at + 1]
    np.testing.assert_allclose(block(jnp.asarray(z)), centre(y) @ rotations[at + 1].T, atol=1e-4)


@pytest.mark.parametrize("name", FOLDABLE)
def test_folding_back_and_exporting(name, tmp_path):
    model = tiny(name)
    r = keep_mean(haar(16)) if model.config.norm == "layer" else haar(16)
    folded = fold_stream(model, r, TOKENS).model
    assert folded.config == model.config
    save_huggingface(folded, tmp_path / "folded")
    again = load_huggingface(tmp_path / "folded")
    np.testing.assert_allclose(logits(again), logits(model), atol=1e-4)
    undone = fold_stream(again, r.T, TOKENS).model
    np.testing.assert_allclose(logits(undone), logits(model), atol=1e-4)


def test_export_in_float64_is_exact(tmp_path):
    model = tiny("gpt2").astype(np.float64)
    save_huggingface(fold_stream(model, keep_mean(haar(16)), TOKENS).model, tmp_path / "folded")
    np.testing.assert_allclose(logits(load_huggingface(tmp_path / "folded")), logits(model), atol=1e-10)


def test_what_a_format_cannot_hold(tmp_path):
    layer_norm = fold_stream(tiny("gpt2"), haar(16), TOKENS).model
    with pytest.raises(ValueError, match=r"cannot say norm = 'rms'.*keep_mean"):
        save_huggingface(layer_norm, tmp_path / "m")
    model = tiny("llama")
    places = fold_stream(model, [haar(16, i) for i in range(5)], TOKENS).model
    with pytest.raises(ValueError, match=r"no place for layers\.0\.attn_skip, layers\.0\.mlp_skip.*stay in rotsparse"):
        save_huggingface(places, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_new_biases_are_exported(tmp_path):
    """NeoX without attention biases gets them from its LayerNorms' biases."""
    model = tiny("gpt_neox", attention_bias=False)
    folded = fold_stream(model, keep_mean(haar(16)), TOKENS).model
    assert "b_q" not in model.params["layers"][0]["attn"] and "b_q" in folded.params["layers"][0]["attn"]
    save_huggingface(folded, tmp_path / "folded")
    np.testing.assert_allclose(logits(load_huggingface(tmp_path / "folded")), logits(model), atol=1e-4)


@given(st.integers(2, 12), st.integers(0, 10**6))
def test_keep_mean(d, seed):
    r = keep_mean(haar(d, seed))
    m = np.full(d, d**-0.5)
    np.testing.assert_allclose(r @ r.T, np.eye(d), atol=1e-12)
    np.testing.assert_allclose(np.abs(r @ m), m, atol=1e-12)
    np.testing.assert_allclose(keep_mean(r), r, atol=1e-12)


@pytest.mark.parametrize("name", RAW)
def test_one_mlp_rotates_in_every_architecture(name):
    model = tiny(name)
    rotations = Rotations(haar(16, 1).astype(np.float32), haar(16, 2).astype(np.float32))
    tokens = inputs(name)
    folded = fold_mlp(model, 1, rotations, tokens)
    assert folded.exact_error < 1e-12 * folded.scale
    np.testing.assert_allclose(logits(folded.model, tokens), logits(model, tokens), atol=1e-5 * folded.scale)
    points = ((1, "input"), (1, "output"))
    seen, rotated = (run(m.params, m.config, tokens, capture=points)[1] for m in (model, folded.model))
    np.testing.assert_allclose(rotated[1, "input"], rotations.apply_in(seen[1, "input"]), atol=1e-4)
    np.testing.assert_allclose(rotated[1, "output"], rotations.apply_out(seen[1, "output"]), atol=1e-4)
    back = fold_mlp(folded.model, 1, rotations.inverse(), tokens).model
    np.testing.assert_allclose(back.params["layers"][1]["mlp"]["r_in"], np.eye(16), atol=1e-5)


def test_llama2c_round_trip(tmp_path):
    model = tiny_llama2c()
    save_llama2c(fold_stream(model, haar(16), TOKENS).model, tmp_path / "folded.bin")
    again = load_llama2c(tmp_path / "folded.bin")
    assert not again.tied
    np.testing.assert_allclose(logits(again), logits(model), atol=1e-4)


@needs_stories
def test_stories_folded(tmp_path):
    model = load_llama2c(STORIES / "stories260K.bin")
    tokens = np.random.default_rng(0).integers(3, 512, (2, 64))
    folded = fold_stream(model, haar(64), tokens)
    assert folded.exact_error < 1e-12 and folded.rounded_error < 1e-5 and folded.error < 1e-5 * folded.scale
    save_llama2c(folded.model, tmp_path / "folded.bin")
    again = load_llama2c(tmp_path / "folded.bin")
    np.testing.assert_allclose(logits(again, tokens), logits(model, tokens), atol=1e-4)


# --- what cannot be folded, and bad input ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (lambda: tiny("bert"), "its norms stand in the stream (post-LN)"),
        (lambda: tiny("gemma2"), "between each block and it stands a norm whose scale no matrix behind it"),
        (lambda: tiny("llama", architectures=["LlamaModel"]), "has no head"),
        (lambda: fold_mlp(tiny("llama"), 0, Rotations.identity(16, 16), TOKENS).model, "was folded before"),
    ],
)
def test_streams_that_cannot_rotate(model, text):
    with pytest.raises(ValueError) as error:
        fold_stream(model(), haar(16), TOKENS)
    assert text in message(error)


def test_bad_rotations():
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"expected a rotation \[16, 16\], got \[8, 8\]"):
        fold_stream(model, haar(8), TOKENS)
    with pytest.raises(ValueError, match="not orthogonal"):
        fold_stream(model, 1.1 * haar(16), TOKENS)
    with pytest.raises(ValueError, match=r"tokens should be \[batch, tokens\]"):
        fold_stream(model, haar(16), TOKENS[0])
    with pytest.raises(ValueError, match=r"like the hidden layer.*φ\(Qz\) ≠ Qφ\(z\)"):
        fold_mlp(model, 0, Rotations.identity(24, 16), TOKENS)
    with pytest.raises(ValueError, match="expected a rotation"):
        fold_mlp(model, 0, Rotations.identity(15, 16), TOKENS)


@settings(max_examples=10)
@given(st.integers(0, 10**6))
def test_small_errors_of_a_rotation_are_repaired(seed):
    """Float32 rotations after many steps are orthogonal to five digits; the function is kept to thirteen."""
    model = tiny("llama")
    drifted = (haar(16) + 1e-5 * np.random.default_rng(seed).normal(size=(16, 16))).astype(np.float32)
    folded = fold_stream(model, drifted, TOKENS)
    assert folded.exact_error < 1e-12 * folded.scale
