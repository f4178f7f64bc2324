"""What a model sees, and which rows are kept: padding, special tokens, templates, images."""

import json

import numpy as np
import pytest

from rotsparse import models
from rotsparse.data.sources import ArrayRows
from rotsparse.models._capture import capture
from rotsparse.models.heavy_rows import heavy_rows
from rotsparse.models.load import HuggingFaceTokenizer
from rotsparse.models.transformer import run
from tiny_models import inputs, message, tiny

LENGTHS = (9, 4, 6, 1)


def padded(side: str, pad: int) -> np.ndarray:
    tokens = np.full((4, 9), pad)
    for i, n in enumerate(LENGTHS):
        tokens[i, slice(9 - n, None) if side == "left" else slice(n)] = np.arange(2, 2 + n)
    return tokens


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "bert", "roberta", "opt", "mpnet"])
def test_padding_is_neither_seen_nor_kept(name, side, tmp_path):
    model, tokens = tiny(name), padded(side, 1)
    np.save(tmp_path / "t.npy", tokens)
    source = models.TokenFile(tmp_path / "t.npy", pad=1)
    (store,) = capture(model, source, [(1, "input")], tmp_path / "out", length=9, batch=3)
    assert store.manifest["tokens"]["pad"] == 1
    seen = run(model.params, model.config, tokens, mask=tokens != 1, capture=((1, "input"),))[1][1, "input"]
    np.testing.assert_allclose(store.read(range(len(store))), np.asarray(seen)[tokens != 1], atol=1e-5)
    if name == "opt":  # it counts the tokens that it looks at: padding in front shifts nothing
        alone = run(model.params, model.config, np.arange(2, 6)[None], capture=((1, "input"),))[1][1, "input"][0]
        np.testing.assert_allclose(store.read(range(9, 13)), alone, atol=1e-5)


@pytest.mark.parametrize(("pad", "eos", "rows"), [(1, 2, 20), (None, None, 36), (1, 1, 36), (1, [2, 1], 36)])
def test_padding_that_the_configuration_names(pad, eos, rows, tmp_path):
    """A token that also ends texts may be meant as such."""
    model = tiny("llama", pad_token_id=pad, eos_token_id=eos)
    np.save(tmp_path / "t.npy", padded("right", 1))
    np.save(tmp_path / "line.npy", padded("right", 1).reshape(-1))
    for name, expected in (("t", rows), ("line", 36)):  # one long line has no ends to fill up
        source = models.TokenFile(tmp_path / f"{name}.npy")
        (store,) = capture(model, source, [(0, "input")], tmp_path / name, length=9)
        assert len(store) == expected


def test_a_token_inside_a_sequence_is_no_padding(tmp_path):
    np.save(tmp_path / "t.npy", np.array([[1, 3, 1, 4, 1, 1], [1, 1, 1, 1, 1, 1]]))
    source = models.TokenFile(tmp_path / "t.npy", pad=1)
    (store,) = capture(tiny("llama"), source, [(0, "input")], tmp_path / "out", length=4)
    assert len(store) == 3  # tokens 3, 1 and 4; the second sequence has none


@pytest.mark.parametrize("special", [False, True])
def test_special_tokens_inside_a_text(special, tmp_path):
    np.save(tmp_path / "t.npy", np.array([3, 2, 4, 5, 2, 2, 6]))
    source = models.TokenFile(tmp_path / "t.npy", special={2})
    model = tiny("llama")
    (store,) = capture(model, source, [(0, "input")], tmp_path / "out", length=7, special=special)
    assert store.manifest["tokens"]["special"] == ("kept" if special else "left out")
    tokens = np.array([[3, 2, 4, 5, 2, 2, 6]])
    seen = np.asarray(run(model.params, model.config, tokens, capture=((0, "input"),))[1][0, "input"][0])
    np.testing.assert_allclose(store.read(range(len(store))), seen if special else seen[tokens[0] != 2], atol=1e-5)


def test_images(tmp_path):
    model = tiny("vit")
    np.save(tmp_path / "i.npy", inputs("vit"))
    (store,) = capture(model, models.ImageFile(tmp_path / "i.npy"), [(1, "input")], tmp_path / "out", batch=3)
    seen = run(model.params, model.config, inputs("vit"), capture=((1, "input"),))[1][1, "input"]
    np.testing.assert_allclose(store.read(range(len(store))), np.asarray(seen).reshape(10, 16), atol=1e-5)

    np.save(tmp_path / "t.npy", np.ones(5, int))
    with pytest.raises(ValueError, match="a vit model sees images"):
        capture(model, models.TokenFile(tmp_path / "t.npy"), [(1, "input")], tmp_path / "no")
    with pytest.raises(ValueError, match="a llama model sees tokens"):
        capture(tiny("llama"), models.ImageFile(tmp_path / "i.npy"), [(1, "input")], tmp_path / "no")
    with pytest.raises(ValueError, match="expected floating-point images"):
        models.ImageFile(tmp_path / "t.npy")
    np.save(tmp_path / "large.npy", np.ones((1, 3, 9, 9), np.float32))
    with pytest.raises(ValueError, match=r"has images \[3, 9, 9\], the model's are \[3, 8, 8\]"):
        capture(model, models.ImageFile(tmp_path / "large.npy"), [(1, "input")], tmp_path / "no")


# --- rows that hold nearly everything -----------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "expected"), [(0, None), (4, None), (300, 16), (3000, 16)])
def test_heavy_rows_are_counted(size, expected):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 16)).astype(np.float32) + 1000  # far from the origin, which must not matter
    x[::128, 3] += size
    found = heavy_rows(ArrayRows(x))
    assert (found and found.rows) == expected
    if expected:
        assert found.of == 2000 and found.variance > 0.9
        assert str(found).startswith("16 of 2,000 rows (0.80%) hold 9") or size == 3000


def test_capture_says_so(tmp_path):
    """One token in a hundred, whose embedding is a thousand times as large."""
    model = tiny("llama")
    model.params["embed"][7] *= 1000
    tokens = np.random.default_rng(0).integers(8, 31, (4, 100))
    tokens[:, 50] = 7
    np.save(tmp_path / "t.npy", tokens.reshape(-1))
    source, points = models.TokenFile(tmp_path / "t.npy"), [(0, "residual"), (0, "input")]
    stores = capture(model, source, points, tmp_path / "out", length=25)
    heavy = stores[0].manifest["heavy_rows"]
    assert heavy["rows"] == 4 and heavy["token"] == "number 7" and heavy["share"] == 1
    assert stores[1].manifest["heavy_rows"] is None  # the norm has taken the size away
    again = capture(model, source, points[:1], tmp_path / "out", length=25)
    assert again[0].manifest == stores[0].manifest


# --- tokenizers ---------------------------------------------------------------------------------------------------


def byte_level(path, template=None, *, extra=()):
    tk = pytest.importorskip("tokenizers", reason="needs the extra `models`")
    vocabulary = {"<end>": 0, "<s>": 1} | {c: i + 2 for i, c in enumerate("abcdefghijklmnopqrstuvwxyzĠ")}
    fast = tk.Tokenizer(tk.models.BPE(vocabulary, []))
    fast.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.add_special_tokens(["<end>", "<s>", *extra])
    if template:
        fast.post_processor = tk.processors.TemplateProcessing(
            single=template, pair="$A <end> $B", special_tokens=[("<end>", 0), ("<s>", 1)]
        )
    fast.save(str(path))
    return fast


@pytest.mark.parametrize(
    "template", ["$A", "$A <end>", "$A <end> <end>", "<s> <end> $A", "<s> $A", "<s> $A <end>", "<s> <s> $A <end> <s>"]
)
def test_any_template(template, tmp_path):
    fast = byte_level(tmp_path / "tokenizer.json", template)
    tokenizer = HuggingFaceTokenizer(tmp_path / "tokenizer.json", 29)
    assert [*tokenizer.prefix, *tokenizer.encode("cab"), *tokenizer.suffix] == fast.encode("cab").ids
    assert tokenizer.special == {0, 1}


def test_a_template_that_repeats_the_text(tmp_path):
    byte_level(tmp_path / "tokenizer.json", "<s> $A <end> $A")
    with pytest.raises(ValueError, match="does not keep a text together"):
        HuggingFaceTokenizer(tmp_path / "tokenizer.json", 29)


def test_an_added_token_beyond_the_embeddings(tmp_path):
    """No text needs it; where it occurs all the same it is refused."""
    byte_level(tmp_path / "tokenizer.json", extra=["<pad>"])
    tokenizer = HuggingFaceTokenizer(tmp_path / "tokenizer.json", 29)
    assert tokenizer.encode("cab") == [4, 2, 3] and tokenizer.encode("<pad>") == [29]
    (tmp_path / "text.txt").write_text("ab<pad>c")
    source = models.TextFile(tmp_path / "text.txt", tokenizer)
    with pytest.raises(ValueError) as error:
        capture(tiny("llama", vocab_size=29), source, [(0, "input")], tmp_path / "out", length=8)
    assert "the model's are 0 to 28" in message(error)
    with pytest.raises(ValueError, match="token number 28, but the model has embeddings for 20"):
        HuggingFaceTokenizer(tmp_path / "tokenizer.json", 20)


def test_the_padding_token_is_known(tmp_path):
    byte_level(tmp_path / "tokenizer.json", extra=["<pad>"])
    assert HuggingFaceTokenizer(tmp_path / "tokenizer.json", 30).pad is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "<pad>"}}))
    assert HuggingFaceTokenizer(tmp_path / "tokenizer.json", 30).pad == 29
