"""Tiny random models of every architecture, made and saved by the transformers library."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the extra `peers`")
transformers = pytest.importorskip("transformers", reason="needs the extra `peers`")

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
        "bert": t.BertConfig(**_SMALL),
    }


def save_peer(name: str, folder: Path, *, seed: int = 0):
    """A model with random weights everywhere, norms and biases too, written by `save_pretrained`."""
    config = configurations()[name]
    make = transformers.AutoModel if name == "bert" else transformers.AutoModelForCausalLM
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


def peer_output(model, tokens):
    """Its logits, or the last hidden state of an encoder, as NumPy."""
    with torch.no_grad():
        out = model(torch.as_tensor(tokens))
    return (out.last_hidden_state if not hasattr(out, "logits") else out.logits).numpy()
