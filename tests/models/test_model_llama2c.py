import struct

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotsparse.models.language import cross_entropy, generate
from rotsparse.models.llama2c import Llama2cTokenizer, load_llama2c, save_llama2c
from rotsparse.models.transformer import run
from tiny_models import STORIES, needs_stories, same_parameters, tiny, tiny_llama2c


@pytest.fixture(scope="module")
def stories():
    return load_llama2c(STORIES / "stories260K.bin")


@pytest.fixture(scope="module")
def tokenizer():
    return Llama2cTokenizer(STORIES / "tok512.bin", 512)


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(tied, tmp_path):
    model = tiny_llama2c(tied=tied)
    save_llama2c(model, tmp_path / "m.bin")
    again = load_llama2c(tmp_path / "m.bin")
    assert again.tied == tied
    assert same_parameters(model, again)


@needs_stories
def test_stories_is_written_back_as_it_was(stories, tmp_path):
    save_llama2c(stories, tmp_path / "again.bin")
    ours, theirs = (tmp_path / "again.bin").read_bytes(), (STORIES / "stories260K.bin").read_bytes()
    tables = 2 * 512 * 4 * 4  # the file ends with cos and sin, which we compute in float64 and round
    assert ours[:-tables] == theirs[:-tables]
    np.testing.assert_allclose(np.frombuffer(ours[-tables:], "<f4"), np.frombuffer(theirs[-tables:], "<f4"), atol=1e-4)


@needs_stories
def test_stories_tells_a_story(stories, tokenizer):
    text = tokenizer.decode(generate(stories, np.array([[1]]), 64)[0])
    # What llama2.c itself writes at temperature 0.
    assert text.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw "
        "a big, red ball. She wanted to play with it, but it was too high."
    )


@needs_stories
def test_stories_cross_entropy(stories, tokenizer):
    samples = generate(stories, np.full((8, 1), 1), 64, key=jax.random.key(0))
    loss = cross_entropy(run(stories.params, stories.config, samples)[0], samples)
    # Samples at temperature 1 cost their model its own entropy; 1.3 nats a token over long ones.
    assert 1.1 < float(loss.mean()) < 1.6
    # Text of the same kind costs about as much, and the order of the words matters.
    ids = np.array([[1, *tokenizer.encode("Once upon a time, there was a little boy named Tim. He liked to play.")]])
    story = float(cross_entropy(run(stories.params, stories.config, ids)[0], ids).mean())
    shuffled = np.concatenate([ids[:, :1], np.random.default_rng(0).permuted(ids[:, 1:], axis=1)], axis=1)
    noise = float(cross_entropy(run(stories.params, stories.config, shuffled)[0], shuffled).mean())
    assert story < 1.6 < 4 < noise


@needs_stories
@given(st.text(max_size=60))
def test_any_text_survives_the_tokenizer(text):
    tokenizer = Llama2cTokenizer(STORIES / "tok512.bin", 512)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@needs_stories
def test_encoding_is_the_models_own(stories, tokenizer):
    """The model was trained on this encoding, so it writes the very tokens that its text encodes to."""
    ids = generate(stories, np.array([[1]]), 64)[0]
    assert tokenizer.encode(tokenizer.decode(ids)) == list(ids[1:])


def test_generate_refuses_an_encoder():
    with pytest.raises(ValueError, match="bert model has no next-token head"):
        generate(tiny("bert"), np.array([[1]]), 4)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda b: b[:-100], "truncated"),
        (lambda b: b + b"\0" * 8, "another version"),
        (lambda b: b[:10], "header of 28"),
        (lambda b: struct.pack("<7i", *[-7] * 7) + b[28:], "does not look like"),
    ],
)
def test_damaged_checkpoint(change, text, tmp_path):
    save_llama2c(tiny_llama2c(), tmp_path / "m.bin")
    (tmp_path / "bad.bin").write_bytes(change((tmp_path / "m.bin").read_bytes()))
    with pytest.raises(ValueError, match=text):
        load_llama2c(tmp_path / "bad.bin")


def test_missing_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="cannot read"):
        load_llama2c(tmp_path / "absent.bin")


def test_only_what_the_format_holds(tmp_path):
    with pytest.raises(ValueError, match=r"gated is False but can only be True"):
        save_llama2c(tiny("gpt2"), tmp_path / "m.bin")
    model = tiny_llama2c()
    model.params["layers"][1]["mlp"]["b_up"] = np.zeros(24, np.float32)
    with pytest.raises(ValueError, match=r"no place for layers\.\*\.mlp\.b_up"):
        save_llama2c(model, tmp_path / "m.bin")
    assert not list(tmp_path.iterdir())


@needs_stories
def test_damaged_or_foreign_tokenizer(tmp_path):
    whole = (STORIES / "tok512.bin").read_bytes()
    (tmp_path / "cut.bin").write_bytes(whole[:-3])
    with pytest.raises(ValueError, match="ends inside token 511"):
        Llama2cTokenizer(tmp_path / "cut.bin", 512)
    with pytest.raises(ValueError, match="holds 512 tokens, but the model has a vocabulary of 32000"):
        Llama2cTokenizer(STORIES / "tok512.bin", 32000)
