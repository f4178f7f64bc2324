"""Folders that are not quite a model: the cause by name, and what to do."""

import json
import os

import pytest

from rotsparse.models.huggingface import load_huggingface
from rotsparse.models.huggingface_writer import save_huggingface
from rotsparse.models.load import load_model, load_tokenizer
from tiny_models import same_parameters, tiny


@pytest.fixture
def folder(tmp_path):
    save_huggingface(tiny("llama"), tmp_path / "m")
    return tmp_path / "m"


def refused(folder, text):
    with pytest.raises(ValueError, match=text):
        load_huggingface(folder)


def test_a_single_file_beside_an_index(folder, tmp_path):
    save_huggingface(tiny("llama", seed=1), tmp_path / "shards", shard_bytes=3000)
    for path in (tmp_path / "shards").glob("model*"):
        path.rename(folder / path.name)
    refused(folder, r"a whole model\.safetensors, and model\.safetensors\.index\.json names")
    (folder / "model.safetensors").unlink()
    assert same_parameters(load_huggingface(folder), tiny("llama", seed=1))


def test_an_index_of_the_single_file(folder):
    where = {"weight_map": {"model.norm.weight": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(where))
    assert same_parameters(load_huggingface(folder), tiny("llama"))


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b"])
def test_an_index_names_files_of_its_folder_only(folder, file):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
    refused(folder, "expected files in the folder itself")


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "{", "[" * 100_000])
def test_an_index_that_is_none(folder, content):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    refused(folder, r"index\.json")


def test_shards_without_an_index(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    assert same_parameters(load_huggingface(folder), tiny("llama"))
    (folder / "model-00001-of-00001.safetensors").rename(folder / "model-00002-of-00003.safetensors")
    refused(folder, "is a shard missing")


def test_what_is_there_instead(folder):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    refused(folder, "Git LFS pointer")
    weights.write_bytes(content)
    weights.rename(folder / "consolidated.safetensors")
    refused(folder, r"it has consolidated\.safetensors")
    (folder / "consolidated.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "it is an adapter")
    (folder / "config.json").unlink()
    refused(folder, "is an adapter: merge it")


def test_an_adapter_beside_a_model(folder):
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "a whole model and an adapter")


@pytest.mark.parametrize("file", ["tf_model.h5", "flax_model.msgpack", "model.onnx"])
def test_weights_of_other_libraries(folder, file):
    (folder / "model.safetensors").rename(folder / file)
    refused(folder, f"it has {file}")


def test_a_folder_of_the_hubs_cache(folder, tmp_path):
    (tmp_path / "cache/snapshots").mkdir(parents=True)
    folder.rename(tmp_path / "cache/snapshots/abc")
    refused(tmp_path / "cache", "snapshots/abc")
    (tmp_path / "g").mkdir()
    (tmp_path / "g/model.gguf").touch()
    refused(tmp_path / "g", r"give the GGUF file itself, .*model\.gguf")


@pytest.mark.parametrize("content", ["[]", '"llama"', "null", "{", "3", "[" * 100_000, "\x00"])
def test_a_configuration_that_is_none(folder, content):
    (folder / "config.json").write_text(content)
    refused(folder, r"config\.json")


def test_companions_are_kept_and_weights_are_not(folder, tmp_path):
    kept = ["generation_config.json", "chat_template.jinja", "tokenizer.model", "LICENSE", "1_Pooling/config.json"]
    left = ["pytorch_model.bin", "old.safetensors", "model.gguf", ".git/config", "model.safetensors.index.json"]
    for name in (*kept, *left):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (tmp_path / "secret").write_text("secret")
    os.symlink(tmp_path / "secret", folder / "notes.txt")
    save_huggingface(tiny("llama"), tmp_path / "again", tokenizer_from=folder)
    found = {str(path.relative_to(tmp_path / "again")) for path in (tmp_path / "again").rglob("*") if path.is_file()}
    assert found == {*kept, "config.json", "model.safetensors", ".rotsparse"}


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_fifo_in_the_place_of_a_file_is_not_waited_for(folder, file):
    (folder / file).unlink(missing_ok=True)
    os.mkfifo(folder / file)
    refused(folder, "it is a FIFO")


@pytest.mark.parametrize("name", ["m.gguf", "m.bin"])
def test_a_fifo_in_the_place_of_a_model_is_not_waited_for(name, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match="it is a FIFO"):
        load_model(tmp_path / name)
    with pytest.raises(ValueError, match="it is a FIFO"):
        load_tokenizer(tmp_path / name, tiny("llama"))


def test_a_fifo_in_the_place_of_a_tokenizer_is_not_waited_for(folder):
    pytest.importorskip("tokenizers", reason="needs the extra `models`")
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(ValueError, match="it is a FIFO"):
        load_tokenizer(folder, tiny("llama"))
