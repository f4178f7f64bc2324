"""What the tensors of a folder say counts, whatever their names and the flags beside them."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rotsparse.models.huggingface import load_huggingface
from rotsparse.models.huggingface_writer import save_huggingface
from tiny_models import message, same_parameters, tiny


def stored(model, folder, change=lambda tensors: tensors, **entries):
    """Save a model, change its tensors and its config.json, and read it again."""
    save_huggingface(model, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | entries))
    return load_huggingface(folder)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_a_head_that_was_trained_by_itself_is_kept(name, tmp_path):
    head = np.random.default_rng(1).normal(size=(31, 16)).astype(np.float32)
    word = "embed_out.weight" if name == "gpt_neox" else "lm_head.weight"
    model = stored(tiny(name), tmp_path / "m", lambda t: t | {word: head}, tie_word_embeddings=True)
    assert not model.tied
    np.testing.assert_array_equal(model.params["unembed"], head)
    save_huggingface(model, tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_array_equal(load_huggingface(tmp_path / "again").params["unembed"], head)


def test_no_head_where_none_is_said(tmp_path):
    def without(tensors):
        return {name: a for name, a in tensors.items() if name != "lm_head.weight"}

    with pytest.raises(ValueError, match=r"no tensor 'lm_head\.weight'.*tie_word_embeddings"):
        stored(tiny("llama"), tmp_path / "m", without)
    assert stored(tiny("llama"), tmp_path / "tied", without, tie_word_embeddings=True).tied


def test_biases_that_are_not_there_are_none(tmp_path):
    assert same_parameters(stored(tiny("llama"), tmp_path / "m", attention_bias=True), tiny("llama"))
    biased = tiny("llama", attention_bias=True)
    with pytest.raises(ValueError, match=r"no tensor 'model\.layers\.1\.self_attn\.q_proj\.bias'"):
        stored(
            biased,
            tmp_path / "some",
            lambda t: {n: a for n, a in t.items() if n != "model.layers.1.self_attn.q_proj.bias"},
        )
    # A file that has biases which config.json switches off is read with them.
    assert same_parameters(stored(biased, tmp_path / "on", attention_bias=False), biased)


@pytest.mark.parametrize(
    "wrapper",
    [
        "module.",
        "_orig_mod.",
        "base_model.model.",
        "module._orig_mod.",
        "_forward_module.module.",
        "model.",
        "a.b.",
        "transformer.",
    ],
)
def test_names_in_wrappers(wrapper, tmp_path):
    def wrapped(tensors):
        body = {wrapper + n.removeprefix("model."): a for n, a in tensors.items() if n.startswith("model.")}
        whole = {wrapper + n: a for n, a in tensors.items()}
        return body | {"lm_head.weight": tensors["lm_head.weight"]} if wrapper == "transformer." else whole

    assert same_parameters(stored(tiny("llama"), tmp_path / "m", wrapped), tiny("llama"))


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "_fsdp_wrapped_module._checkpoint_wrapped_module."])
def test_wrapped_modules_in_the_middle_of_a_name(wrapper, tmp_path):
    def compiled(tensors):
        return {n.replace("layers.0.", f"layers.0.{wrapper}"): a for n, a in tensors.items()}

    assert same_parameters(stored(tiny("llama"), tmp_path / "m", compiled), tiny("llama"))


def test_old_names_of_norms(tmp_path):
    def renamed(tensors):
        names = {n: n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta") for n in tensors}
        return {names[n]: a for n, a in tensors.items()}

    assert same_parameters(stored(tiny("bert"), tmp_path / "m", renamed), tiny("bert"))


def test_two_names_of_one_tensor(tmp_path):
    with pytest.raises(ValueError, match="names of the same tensor: keep one"):
        stored(tiny("llama"), tmp_path / "m", lambda t: t | {"module.model.norm.weight": t["model.norm.weight"]})

    def two_heads(tensors):
        return {f"model.{n}": a for n, a in tensors.items()} | {"lm_head.weight": tensors["lm_head.weight"]}

    with pytest.raises(ValueError, match=r"'model\.lm_head\.weight' and 'lm_head\.weight' are names of the same"):
        stored(tiny("llama"), tmp_path / "two", two_heads)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_a_model_with_another_head_is_a_body(name, tmp_path):
    score = np.ones((2, 16), np.float32)

    def another(tensors):
        return {n: a for n, a in tensors.items() if n != "lm_head.weight"} | {"score.weight": score}

    model = stored(tiny(name), tmp_path / "m", another, architectures=["XForSequenceClassification"])
    assert not model.config.head and "unembed" not in model.params
    save_huggingface(model, tmp_path / "again")  # with the head that it came with
    np.testing.assert_array_equal(load_file(tmp_path / "again/model.safetensors")["score.weight"], score)
    assert load_huggingface(tmp_path / "again").fingerprint() == model.fingerprint()


def test_an_adapter_that_was_not_merged(tmp_path):
    lora = {"model.layers.0.self_attn.q_proj.lora_A.weight": np.ones((4, 16), np.float32)}
    with pytest.raises(ValueError, match="An adapter was not merged"):
        stored(tiny("llama"), tmp_path / "m", lambda t: t | lora)


def test_float8_weights_are_named(tmp_path):
    import ml_dtypes

    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(ValueError) as error:
        stored(tiny("llama"), tmp_path / "m", lambda t: t | {name: t[name].astype(ml_dtypes.float8_e4m3fn)})
    assert f"tensor '{name}' is float8_e4m3fn: expected a float16" in message(error)


def test_quantised_weights_are_named_without_their_configuration(tmp_path):
    name = "model.layers.0.mlp.up_proj."

    def packed(tensors):
        return {n: a for n, a in tensors.items() if n != f"{name}weight"} | {
            f"{name}qweight": np.ones((4, 4), np.int32)
        }

    with pytest.raises(ValueError, match=r"no tensor .*up_proj\.weight.*Its weights are quantised"):
        stored(tiny("llama"), tmp_path / "m", packed)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_quantised_models_are_named(method, tmp_path):
    with pytest.raises(ValueError, match=rf"the model is quantised \({method}\)"):
        stored(tiny("llama"), tmp_path / "m", quantization_config={"quant_method": method, "bits": 4})
