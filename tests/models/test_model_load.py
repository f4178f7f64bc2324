import json

import numpy as np
import pytest

from rotsparse import models
from rotsparse.models.huggingface_writer import save_huggingface
from rotsparse.models.model import Model
from tiny_models import STORIES, message, needs_stories, same_parameters, tiny, tiny_llama2c

WORDS = ["[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat"]


@pytest.fixture
def folder(tmp_path):
    """An encoder with a word-level tokenizer."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra `models`")
    save_huggingface(tiny("bert"), tmp_path / "model")
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    fast.enable_truncation(4)  # as sentence-transformers store it
    fast.enable_padding(length=4, pad_token="[UNK]")
    fast.save(str(tmp_path / "model/tokenizer.json"))
    return tmp_path / "model"


def test_huggingface_tokenizer(folder):
    tokenizer = models.load_tokenizer(folder, models.load_model(folder))
    assert tokenizer.encode("the cat sat the cat sat") == [3, 4, 5, 3, 4, 5]
    assert tokenizer.encode("dog") == [0] and tokenizer.encode("") == []
    assert (list(tokenizer.prefix), list(tokenizer.suffix), tokenizer.vocab_size) == ([1], [2], 6)
    assert tokenizer.decode([3, 4]) == "the cat"


def test_tokens_that_only_the_files_beside_the_tokenizer_name(folder):
    """As transformers reads them: words become special, others are added and get the next numbers."""
    beside = {
        "eos_token": "sat",
        "pad_token": {"content": "<pad>", "lstrip": True},
        "additional_special_tokens": ["<a>", None, 3],
        "added_tokens_decoder": {"6": {"content": "<new>", "special": False}, "x": {}, "1": {"content": "[CLS]"}},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(beside))
    tokenizer = models.load_tokenizer(folder, models.load_model(folder))
    assert tokenizer.encode("the<new>cat <pad>sat<a>") == [3, 6, 4, 7, 5, 8]
    assert {5, 7, 8} <= tokenizer.special and 6 not in tokenizer.special and tokenizer.pad == 7
    beside["added_tokens_decoder"]["9"] = {"content": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(beside))
    with pytest.raises(ValueError, match=r"number 7 for the token '<pad>', and tokenizer_config\.json says 9"):
        models.load_tokenizer(folder, models.load_model(folder))


@pytest.mark.peers
@pytest.mark.parametrize(
    "beside",
    [
        {},
        {"eos_token": "sat", "pad_token": "<pad>"},
        {"additional_special_tokens": ["ca"], "bos_token": "the"},
        {
            "added_tokens_decoder": {
                "6": {"content": "<new>", "special": True},
                "7": {"content": "at", "special": False},
            }
        },
        {"model_max_length": 3, "padding_side": "left", "add_bos_token": True},
    ],
)
def test_texts_are_encoded_as_transformers_does(beside, folder):
    transformers = pytest.importorskip("transformers")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]", **beside})
    )
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = models.load_tokenizer(folder, models.load_model(folder))
    for text in ("the cat sat", "sat<pad>the", "<new>cat", "at<new> [CLS] dog", ""):
        assert [*ours.prefix, *ours.encode(text), *ours.suffix] == theirs(text)["input_ids"], text


def test_capture_puts_special_tokens_around_every_sequence(folder, tmp_path):
    model = models.load_model(folder)
    (tmp_path / "text.txt").write_text("the cat sat\n" * 3)
    text = models.TextFile(tmp_path / "text.txt", models.load_tokenizer(folder, model))
    (store,) = models.capture(model, text, [(0, "input")], tmp_path / "out", length=7, batch=2)
    assert store.shape == (9, 16)  # lines of five and of four tokens between [CLS] and [SEP]
    seen = models.run(model.params, model.config, np.array([[1, 5, 3, 4, 5, 2]]), capture=((0, "input"),))[1]
    assert abs(store.read(range(5, 9)) - seen[0, "input"][0, 1:5]).max() < 1e-5


def test_tokenizer_files_are_copied(folder, tmp_path):
    models.save_model(models.load_model(folder), tmp_path / "copy", tokenizer_from=folder)
    assert (tmp_path / "copy/tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()
    assert same_parameters(models.load_model(tmp_path / "copy"), tiny("bert"))


def test_tokenizer_and_model_that_disagree(folder):
    model = models.load_model(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["rare"] = 31
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="token number 31, but the model has embeddings for 31 only"):
        models.load_tokenizer(folder, model)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot read the tokenizer"):
        models.load_tokenizer(folder, model)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no .*tokenizer\.json"):
        models.load_tokenizer(folder, model)


@needs_stories
def test_load_by_what_is_there(folder):
    assert models.load_model(folder).config.architecture == "bert"
    stories = models.load_model(STORIES / "stories260K.bin")
    assert models.load_tokenizer(STORIES / "tok512.bin", stories).vocab_size == 512


def test_neither_folder_nor_file(tmp_path):
    with pytest.raises(ValueError, match=r"expected a Hugging Face folder, a GGUF file"):
        models.load_model(tmp_path / "model.onnx")


def test_a_file_of_a_folder_or_of_pytorch(folder, tmp_path):
    with pytest.raises(ValueError, match="give its folder"):
        models.load_model(folder / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ValueError, match="a file of PyTorch"):
        models.load_model(tmp_path / "pytorch_model.bin")


def test_save_in_the_format_it_came_in(tmp_path):
    models.save_model(tiny_llama2c(), tmp_path / "m.bin")
    assert same_parameters(models.load_model(tmp_path / "m.bin"), tiny_llama2c())
    model = tiny("llama")
    with pytest.raises(ValueError, match="came from no file format"):
        models.save_model(Model(model.config, model.params), tmp_path / "m")


def test_obstacles():
    assert models.obstacle(tiny("llama")) is None
    for name in ("bert", "gemma2"):
        with pytest.raises(ValueError) as error:
            models.fold_stream(tiny(name), np.eye(16), np.ones((1, 1), int))
        assert message(error) == models.obstacle(tiny(name))
