"""Tiny random models of every architecture, made and saved by the transformers library."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `peers`")
transformers = pytest.importorskip("transformers", reason="needs the extra `peers`")
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)  # the models are tiny

_SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LONGROPE = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 3.0, 4.0]}
# Encoders, which have no logits.
BODIES = ("bert", "roberta", "xlm_roberta", "camembert", "distilbert", "electra", "mpnet", "vit")
# Architectures whose stream cannot be rotated within their format.
PINNED = (*BODIES, "gemma2", "gemma2_uncapped", "gemma3", "olmo2", "gpt_neo")


def configurations() -> dict:
    """Every architecture, and the variants of it that change the computation."""
    t = transformers
    gpt2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
    gemma = {**_GROUPED, "head_dim": 10, "query_pre_attn_scalar": 7, "sliding_window": 5}
    return {
        "llama": t.LlamaConfig(**_GROUPED),
        "llama_biases": t.LlamaConfig(**_GROUPED, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
        "llama3_rotary": t.LlamaConfig(**_GROUPED, rope_parameters=_LLAMA3),
        "linear_rotary": t.LlamaConfig(
            **_GROUPED, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
        ),
        "mistral": t.MistralConfig(**_GROUPED, sliding_window=6, head_dim=8),
        "qwen2": t.Qwen2Config(**_GROUPED, use_sliding_window=True, sliding_window=5, max_window_layers=1),
        "qwen3": t.Qwen3Config(**_GROUPED, head_dim=8, tie_word_embeddings=True),
        "gpt2": t.GPT2Config(**gpt2),
        "gpt2_untied": t.GPT2Config(**gpt2, tie_word_embeddings=False),
        "gpt_neox": t.GPTNeoXConfig(**_SMALL),
        "gpt_neox_sequential": t.GPTNeoXConfig(**_SMALL, use_parallel_residual=False, rotary_pct=0.5),
        "gpt_neox_no_bias": t.GPTNeoXConfig(**_SMALL, attention_bias=False),
        "gemma2": t.Gemma2Config(**gemma),
        "gemma2_uncapped": t.Gemma2Config(**gemma, attn_logit_softcapping=None, final_logit_softcapping=None),
        "gemma": t.GemmaConfig(**_GROUPED, head_dim=10),
        "gemma3": t.Gemma3TextConfig(**gemma, layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
        "phi3": t.Phi3Config(**_GROUPED, sliding_window=6, pad_token_id=0),
        "phi3_longrope": t.Phi3Config(
            **_GROUPED,
            pad_token_id=0,
            original_max_position_embeddings=8,
            rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **_LONGROPE},
        ),
        "olmo2": t.Olmo2Config(**_GROUPED, pad_token_id=0),
        "gpt_neo": t.GPTNeoConfig(
            **{k: v for k, v in _SMALL.items() if not k.startswith("num_")},
            num_layers=3,
            num_heads=4,
            attention_types=[[["global", "local"], 1], [["local"], 1]],
            window_size=5,
        ),
        "opt": t.OPTConfig(
            **{k: v for k, v in _SMALL.items() if k != "intermediate_size"}, ffn_dim=40, word_embed_proj_dim=32
        ),
        "bert": t.BertConfig(**_SMALL),
        "roberta": t.RobertaConfig(**_SMALL),
        "xlm_roberta": t.XLMRobertaConfig(**_SMALL),
        "camembert": t.CamembertConfig(**_SMALL),
        "distilbert": t.DistilBertConfig(
            vocab_size=61, dim=32, hidden_dim=40, n_layers=3, n_heads=4, max_position_embeddings=64
        ),
        "electra": t.ElectraConfig(**_SMALL, embedding_size=16),
        "mpnet": t.MPNetConfig(**_SMALL),
        "vit": t.ViTConfig(
            **{k: v for k, v in _SMALL.items() if k not in ("vocab_size", "max_position_embeddings")},
            image_size=[8, 12],
            patch_size=4,
        ),
    }


def save_peer(name: str, folder: Path, *, seed: int = 0):
    """A model with random weights everywhere, norms and biases too, written by `save_pretrained`."""
    config = configurations()[name]
    make = transformers.AutoModel if name in BODIES else transformers.AutoModelForCausalLM
    torch.manual_seed(seed)
    # Eager attention: Gemma's soft caps exist only there.
    model = make.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            # Matrices that keep the scale of what they multiply; scales and biases well away from 1 and 0.
            parameter.copy_(noise * 0.3 + 0.3 if parameter.ndim == 1 else noise * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return model


def inputs(name: str):
    """Two sequences of tokens, or two images."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, 3, 8, 12)).astype(np.float32)
    return images if name == "vit" else rng.integers(0, 61, (2, 17))


def peer_output(model, tokens):
    """Its logits, or the last hidden state of an encoder, as NumPy."""
    with torch.no_grad():
        out = model(torch.as_tensor(tokens))
    return (out.last_hidden_state if not hasattr(out, "logits") else out.logits).numpy()
