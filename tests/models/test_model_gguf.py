"""GGUF files: the same models as Hugging Face's, whatever the names, fusions and orders of rows in the file."""

import dataclasses

import numpy as np
import pytest

from rotsparse import models
from rotsparse.models.gguf import load_gguf
from rotsparse.models.gguf_file import GgufFile
from rotsparse.models.model import named
from rotsparse.models.rotary import LongRope
from tiny_models import message, tiny

tiny_gguf = pytest.importorskip("tiny_gguf")
gguf = tiny_gguf.gguf

TOKENS = np.random.default_rng(0).integers(0, 31, (2, 9))


@pytest.mark.parametrize("name", tiny_gguf.ARCHITECTURES)
def test_every_architecture(name, tmp_path):
    model = tiny_gguf.model_of(name)
    tiny_gguf.write(model, tiny_gguf.ARCHITECTURES[name][0], tmp_path / "m.gguf")
    read = models.load_model(tmp_path / "m.gguf")
    assert read.format == "gguf"
    numbers = {"norm_eps": np.float32(model.config.norm_eps)}  # GGUF has float32 numbers
    assert dataclasses.replace(read.config, **numbers) == dataclasses.replace(model.config, **numbers)
    ours, theirs = dict(named(model.params)), dict(named(read.params))
    assert ours.keys() == theirs.keys()
    for param, array in ours.items():
        np.testing.assert_array_equal(theirs[param], array, err_msg=param)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "F16", "BF16"])
def test_quantised_matrices(kind, tmp_path):
    model = tiny("llama", hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
    tiny_gguf.write(model, "llama", tmp_path / "m.gguf", kind=gguf.GGMLQuantizationType[kind])
    read = load_gguf(tmp_path / "m.gguf")
    assert read.dtype == np.float32
    for name in ("attn.w_q", "mlp.w_down"):
        parent, last = name.split(".")
        ours, theirs = (m.params["layers"][1][parent][last] for m in (model, read))
        assert 0 < np.abs(ours - theirs).max() < (0.2 if kind.startswith("Q4") else 0.02) * np.abs(ours).max()


def test_a_fold_is_a_hugging_face_folder(tmp_path):
    tiny_gguf.write(tiny("llama"), "llama", tmp_path / "m.gguf")
    model = load_gguf(tmp_path / "m.gguf")
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(16, 16)))[0]
    folded = models.fold_stream(model, rotation, TOKENS).model
    models.save_model(folded, tmp_path / "folded")
    again = models.load_model(tmp_path / "folded")
    assert again.format == "huggingface"
    np.testing.assert_allclose(models.outputs(again, TOKENS), models.outputs(model, TOKENS), atol=1e-5)


def test_factors_of_llama_3(tmp_path):
    factors = np.array([1.0, 4.0], np.float32)
    tiny_gguf.write(
        tiny("llama"), "llama", tmp_path / "m.gguf", add=lambda w: w.add_tensor("rope_freqs.weight", factors)
    )
    scaling = load_gguf(tmp_path / "m.gguf").config.rotary.scaling
    assert isinstance(scaling, LongRope) and scaling.amplitude == 1
    np.testing.assert_allclose(scaling.frequencies(10000.0, 4, 8), np.array([1, 0.01]) / factors)


@pytest.mark.parametrize(
    ("name", "entries", "text"),
    [
        ("llama", [("logit_scale", 2.0)], "llama.logit_scale = 2.0 is not supported"),
        ("llama", [("expert_count", 2.0)], "mixtures of experts"),
        ("llama", [("rope.scaling.type", "ntk")], "expected none, linear or yarn"),
        ("qwen2", [("rope.scaling.type", "linear")], "does not say qwen2.rope.scaling.factor"),
    ],
)
def test_metadata_that_is_not_understood(name, entries, text, tmp_path):
    tiny_gguf.write(tiny_gguf.model_of(name), name, tmp_path / "m.gguf", entries=entries)
    with pytest.raises(ValueError) as error:
        models.load_model(tmp_path / "m.gguf")
    assert text in message(error)


def test_another_architecture(tmp_path):
    tiny_gguf.write(tiny("llama"), "mamba", tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="the architecture 'mamba': expected one of bert, "):
        models.load_model(tmp_path / "m.gguf")


def test_missing_and_unexpected_tensors(tmp_path):
    model = tiny("llama")
    tiny_gguf.write(model, "llama", tmp_path / "extra.gguf", add=lambda w: w.add_tensor("blk.0.x", np.ones(3, "f")))
    with pytest.raises(ValueError, match=r"has a tensor 'blk\.0\.x'"):
        models.load_model(tmp_path / "extra.gguf")
    del model.params["layers"][1]["mlp"]["w_up"]
    tiny_gguf.write(model, "llama", tmp_path / "less.gguf")
    with pytest.raises(ValueError, match=r"no tensor for layers\.1\.mlp\.w_up"):
        models.load_model(tmp_path / "less.gguf")


def test_damaged_files(tmp_path):
    tiny_gguf.write(tiny("llama"), "llama", tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    damaged = {
        "no GGUF file": b"GGML" + whole[4:],
        "version 1": whole[:4] + b"\x01\0\0\0" + whole[8:],
        "ends inside the tensor": whole[:-40],
        "ends inside its header": whole[:200],
        "entries follow, which": whole[:16] + b"\xff" * 7 + b"\0" + whole[24:],
        "tensors follow, which": whole[:8] + b"\xff" * 7 + b"\0" + whole[16:],
    }
    for text, content in damaged.items():
        (tmp_path / "bad.gguf").write_bytes(content)
        with pytest.raises(ValueError, match=text):
            models.load_model(tmp_path / "bad.gguf")


# --- tokenizers ---------------------------------------------------------------------------------------------------

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def with_tokenizer(folder, kind, tokens, **entries):
    """A GGUF file with these tokens, and its tokenizer."""

    def add(w):
        w.add_tokenizer_model(kind)
        w.add_token_list(tokens)
        if "merges" in entries:
            w.add_token_merges(entries.pop("merges"))
        if "scores" in entries:
            w.add_token_scores(entries.pop("scores"))
        if "types" in entries:
            w.add_token_types(entries.pop("types"))
        for name, value in entries.items():
            {bool: w.add_bool, str: w.add_string, int: w.add_uint32}[type(value)](f"tokenizer.ggml.{name}", value)

    model = tiny("llama", vocab_size=len(tokens))
    tiny_gguf.write(model, "llama", folder / "m.gguf", add=add)
    return models.load_tokenizer(folder / "m.gguf", model)


def test_byte_pairs(tmp_path):
    tokens = ["<|end|>", *LETTERS, "Ġ", "1", "2", "ab", "Ġab"]
    tokenizer = with_tokenizer(
        tmp_path,
        "gpt2",
        tokens,
        merges=["a b", "Ġ ab"],
        types=[3, *[1] * (len(tokens) - 1)],
        pre="smollm",
        bos_token_id=0,
        add_bos_token=True,
    )
    assert tokenizer.encode("ab ab12") == [30, 31, 28, 29]
    assert tokenizer.decode([30, 31]) == "ab ab"
    assert (tokenizer.prefix, tokenizer.suffix, tokenizer.special) == ([0], [], {0})
    assert tokenizer.encode("c<|end|>") == [3, 0]


def test_sentence_pieces(tmp_path):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *LETTERS, "ab", "▁ab", "▁a", "bc"]
    scores = [0.0] * 286 + [-1.0, -2.0, -3.0, -4.0]
    kinds = [2, 3, 3, *[6] * 256, *[1] * 31]
    tokenizer = with_tokenizer(tmp_path, "llama", tokens, scores=scores, types=kinds, bos_token_id=1, eos_token_id=2)
    assert [tokens[i] for i in tokenizer.encode("ab abc")] == ["▁ab", "▁ab", "c"]
    assert [tokens[i] for i in tokenizer.encode("é")] == ["▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("ab é")) == "ab é"
    assert (tokenizer.prefix, tokenizer.suffix) == ([1], [])


def test_word_pieces(tmp_path):
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "▁play", "ing", "▁the"]
    tokenizer = with_tokenizer(
        tmp_path, "bert", tokens, types=[3, 3, 3, 3, 1, 1, 1], cls_token_id=2, seperator_token_id=3
    )
    assert tokenizer.encode("The playing x") == [6, 4, 5, 1]
    assert (tokenizer.prefix, tokenizer.suffix) == ([2], [3])


def test_unknown_tokenizers(tmp_path):
    with pytest.raises(ValueError, match="of kind 't5': expected gpt2, llama, bert"):
        with_tokenizer(tmp_path, "t5", ["a", "b"])
    with pytest.raises(ValueError, match="cut into words as 'hunyuan' does, which is not known here"):
        with_tokenizer(tmp_path, "gpt2", ["a", "b"], merges=["a b"], pre="hunyuan")
    with pytest.raises(ValueError, match="its merges are not of its tokens"):
        with_tokenizer(tmp_path, "gpt2", ["a", "b"], merges=["a b"])


def test_the_header_alone(tmp_path):
    tiny_gguf.write(tiny("llama"), "llama", tmp_path / "m.gguf")
    file = GgufFile(tmp_path / "m.gguf")
    reference = gguf.GGUFReader(tmp_path / "m.gguf")
    assert {t.name: tuple(int(n) for n in t.shape[::-1]) for t in reference.tensors} == {
        name: tensor.shape for name, tensor in file.tensors.items()
    }
    assert file.metadata["llama.block_count"] == reference.fields["llama.block_count"].contents()
