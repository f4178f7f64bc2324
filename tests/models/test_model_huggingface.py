import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rotsparse.models.huggingface import load_huggingface
from rotsparse.models.huggingface_writer import save_huggingface
from tiny_models import RAW, message, same_parameters, tiny


@pytest.mark.parametrize("name", RAW)
@pytest.mark.parametrize("shard_bytes", [10**9, 3000])
def test_round_trip(name, shard_bytes, tmp_path):
    model = tiny(name)
    save_huggingface(model, tmp_path / "m", shard_bytes=shard_bytes)
    assert (tmp_path / "m/model.safetensors").exists() == (shard_bytes == 10**9)
    again = load_huggingface(tmp_path / "m")
    if name.startswith("gemma"):  # it stores γ - 1, which rounds
        np.testing.assert_allclose(again.params["final_norm"]["scale"], model.params["final_norm"]["scale"], atol=1e-6)
    else:
        assert same_parameters(model, again)


def test_float64_survives(tmp_path):
    model = tiny("llama").astype(np.float64)
    save_huggingface(model, tmp_path / "m")
    assert same_parameters(load_huggingface(tmp_path / "m"), model)


def test_gpt2_matrices_are_stored_in_out(tmp_path):
    model = tiny("gpt2")
    save_huggingface(model, tmp_path / "m")
    stored = load_file(tmp_path / "m/model.safetensors")["transformer.h.0.mlp.c_fc.weight"]
    assert stored.shape == (16, 24)
    np.testing.assert_array_equal(stored.T, model.params["layers"][0]["mlp"]["w_in"])


def rewrite(folder, change):
    """Save the model's tensors again, after a change."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_names_without_prefix_buffers_and_a_stored_tied_head(tmp_path):
    model = tiny("gpt2")
    save_huggingface(model, tmp_path / "m")

    def as_the_hub_has_it(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.ones((1, 1, 32, 32), np.float32)
        tensors["lm_head.weight"] = tensors["wte.weight"]

    rewrite(tmp_path / "m", as_the_hub_has_it)
    assert same_parameters(load_huggingface(tmp_path / "m"), model)


def test_an_encoders_pooler_is_carried_along(tmp_path):
    save_huggingface(tiny("bert"), tmp_path / "m")
    pooler = np.full((16, 16), 0.5, np.float32)
    rewrite(tmp_path / "m", lambda t: t.update({"pooler.dense.weight": pooler}))
    save_huggingface(load_huggingface(tmp_path / "m"), tmp_path / "again")
    np.testing.assert_array_equal(load_file(tmp_path / "again/model.safetensors")["pooler.dense.weight"], pooler)


def test_half_precision_becomes_float32(tmp_path):
    import ml_dtypes

    save_huggingface(tiny("llama"), tmp_path / "m")
    rewrite(tmp_path / "m", lambda t: t.update({n: a.astype(ml_dtypes.bfloat16) for n, a in t.items()}))
    model = load_huggingface(tmp_path / "m")
    assert model.dtype == np.float32
    np.testing.assert_allclose(model.params["embed"], tiny("llama").params["embed"], rtol=1e-2)


# --- bad input ---------------------------------------------------------------------------------------------------


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"model_type": "mamba"},
            "unknown architecture 'mamba': expected one of bert, camembert, distilbert, .*, llama, ",
        ),
        ({"hidden_size": None}, "null for 'hidden_size'"),
        ({"is_causal": None}, "null for 'is_causal'"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings should be true or false, got 'false'"),
        ({"hidden_act": "erf"}, "unknown hidden_act 'erf'"),
        ({"num_key_value_heads": 3}, "4 query heads cannot be shared out among 3"),
        ({"rope_scaling": {"rope_type": "mrope"}}, "'mrope' is not supported"),
        ({"vocab_size": 40}, r"'model.embed_tokens.weight' has shape \[31, 16\].*\[40, 16\]"),
        ({"num_hidden_layers": 1}, r"tensors that a llama model does not have: model\.layers\.1\..* and 4 more"),
    ],
)
def test_config_that_does_not_fit(changes, text, tmp_path):
    save_huggingface(tiny("llama"), tmp_path / "m")
    edit_config(tmp_path / "m", **changes)
    with pytest.raises(ValueError, match=text):
        load_huggingface(tmp_path / "m")


@pytest.mark.parametrize(("name", "bias"), [("llama", "lm_head.bias"), ("gpt_neox", "embed_out.bias")])
def test_a_head_with_a_bias_is_refused(name, bias, tmp_path):
    """No architecture here has one, so no file's is left out silently."""
    save_huggingface(tiny(name), tmp_path / "m")
    rewrite(tmp_path / "m", lambda t: t.update({bias: np.ones(31, np.float32)}))
    with pytest.raises(ValueError, match=f"does not have: {bias}"):
        load_huggingface(tmp_path / "m")


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("gemma2", {"use_bidirectional_attention": True}),
        ("gpt_neo", {"is_causal": False}),
        ("opt", {"do_layer_norm_before": False}),
        ("phi3", {"attention_bias": True}),
        ("gemma3_text", {"attn_logit_softcapping": 2.0}),
        ("bert", {"position_embedding_type": "relative_key"}),
        ("bert", {"is_decoder": True}),
    ],
)
def test_settings_that_would_change_the_computation(name, setting, tmp_path):
    save_huggingface(tiny(name), tmp_path / "m")
    (key, value), refused = *setting.items(), f"{next(iter(setting))} = .* is not supported"
    edit_config(tmp_path / "m", **{key: None})
    if value is False or isinstance(value, str):  # null is no usual value where that is true, or a word
        with pytest.raises(ValueError, match=refused):
            load_huggingface(tmp_path / "m")
    else:
        assert load_huggingface(tmp_path / "m").config == tiny(name).config
    edit_config(tmp_path / "m", **setting)
    with pytest.raises(ValueError, match=refused):
        load_huggingface(tmp_path / "m")


@pytest.mark.parametrize(
    ("name", "setting", "word"),
    [
        ("gpt2", {"hidden_act": "relu"}, "activation_function"),
        ("gpt2", {"layer_norm_eps": 0.1}, "layer_norm_epsilon"),
        ("gpt_neo", {"hidden_act": "gelu"}, "activation_function"),
        ("opt", {"intermediate_size": 40}, "ffn_dim"),
        ("gemma2", {"hidden_act": "relu"}, "hidden_activation"),
        ("distilbert", {"hidden_act": "relu"}, "activation"),
    ],
)
def test_words_that_a_family_does_not_go_by(name, setting, word, tmp_path):
    save_huggingface(tiny(name), tmp_path / "m")
    edit_config(tmp_path / "m", **setting)
    with pytest.raises(ValueError, match=f"{next(iter(setting))} is .* goes by {word}, which is"):
        load_huggingface(tmp_path / "m")


def test_the_first_files_of_gemma_mean_the_approximate_gelu(tmp_path):
    save_huggingface(tiny("gemma"), tmp_path / "m")
    edit_config(tmp_path / "m", hidden_act="gelu", hidden_activation=None)
    assert load_huggingface(tmp_path / "m").config == tiny("gemma").config


def test_embeddings_as_wide_as_the_stream_have_no_matrix_behind_them(tmp_path):
    model = tiny("electra", embedding_size=16)
    save_huggingface(model, tmp_path / "m")
    assert "embed_project" not in model.params and same_parameters(load_huggingface(tmp_path / "m"), model)


def test_fused_tensor_of_the_wrong_shape(tmp_path):
    save_huggingface(tiny("gpt2"), tmp_path / "m")
    rewrite(tmp_path / "m", lambda t: t.update({"transformer.h.1.attn.c_attn.weight": np.ones((16, 47), np.float32)}))
    with pytest.raises(ValueError) as error:
        load_huggingface(tmp_path / "m")
    assert "'transformer.h.1.attn.c_attn.weight' has shape [16, 47]" in message(error)


def test_missing_and_truncated_shards(tmp_path):
    save_huggingface(tiny("llama"), tmp_path / "m", shard_bytes=3000)
    second = next((tmp_path / "m").glob("model-00002-*"))
    whole = second.read_bytes()
    second.write_bytes(whole[:-50])
    with pytest.raises(ValueError, match=r"model-00002-.*Damaged or truncated"):
        load_huggingface(tmp_path / "m")
    second.unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of its shards: model-00002-"):
        load_huggingface(tmp_path / "m")


def test_not_a_model_folder(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        load_huggingface(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny("llama").raw))
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor"):
        load_huggingface(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="safe_serialization"):
        load_huggingface(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot read"):
        load_huggingface(tmp_path)


def test_integer_weights(tmp_path):
    save_huggingface(tiny("llama"), tmp_path / "m")
    rewrite(tmp_path / "m", lambda t: t.update({"model.norm.weight": np.ones(16, np.int8)}))
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' is int8"):
        load_huggingface(tmp_path / "m")


def test_nothing_is_overwritten_or_half_written(tmp_path):
    model = tiny("mistral")
    save_huggingface(model, tmp_path / "m")
    with pytest.raises(ValueError, match="exists already"):
        save_huggingface(model, tmp_path / "m")
    model.params["layers"][0]["mlp"]["b_up"] = np.zeros(24, np.float32)
    with pytest.raises(ValueError, match=r"no place for layers\.0\.mlp\.b_up"):
        save_huggingface(model, tmp_path / "other")
    with pytest.raises(ValueError, match=r"no parameter layers\.1\.attn\.w_q"):
        del model.params["layers"][1]["attn"]["w_q"]
        save_huggingface(model, tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
