"""Tiny models in GGUF files, written by the gguf library under the names that llama.cpp's converter gives them."""

from pathlib import Path

import numpy as np
import pytest

from rotsparse.models.model import Model, named
from tiny_models import tiny

gguf = pytest.importorskip("gguf", reason="needs the extra `gguf`")

ARCHITECTURES = {
    "llama": ("llama", {}),
    "llama_biases": ("llama", {"attention_bias": True}),
    "mistral": ("llama", {}),
    "qwen2": ("qwen2", {"use_sliding_window": False}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 6}),
    "gemma3_text": ("gemma3", {"query_pre_attn_scalar": 6}),
    "phi3": ("phi3", {}),
    "olmo2": ("olmo2", {}),
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gptneox", {}),
    "bert": ("bert", {}),
}
_NORMS = {
    "embed_norm": "token_embd_norm",
    "final_norm": "output_norm",
    "attn_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
    "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "attn_post_norm": "post_attention_norm",
    "mlp_post_norm": "post_ffw_norm",
}
_POST = {"attn_norm": "attn_output_norm", "mlp_norm": "layer_output_norm"}
_WHOLE = {"embed": "token_embd", "positions": "position_embd", "token_types": "token_types", "unembed": "output"}
_LETTERS = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "in": "ffn_up",
    "out": "ffn_down",
}


def model_of(name: str) -> Model:
    return tiny(name.removesuffix("_biases"), **ARCHITECTURES[name][1])


def write(model: Model, architecture: str, path: Path, *, entries=(), kind=None, add=None) -> None:
    """`entries`: more (key, value) of the metadata. `kind`: a quantised type for matrices. `add`: called with the
    writer before it writes."""
    c = model.config
    w = gguf.GGUFWriter(path, architecture)
    w.add_block_count(c.n_layers)
    w.add_embedding_length(c.d_model)
    w.add_feed_forward_length(c.d_hidden)
    w.add_context_length(c.max_positions)
    w.add_head_count(c.n_heads)
    if c.norm == "rms":
        w.add_head_count_kv(c.n_kv_heads)
        w.add_layer_norm_rms_eps(c.norm_eps)
        if architecture not in ("phi3", "olmo2"):
            w.add_key_length(c.d_head)
            w.add_value_length(c.d_head)
    else:
        w.add_layer_norm_eps(c.norm_eps)
    if c.rotary is not None:
        w.add_rope_dimension_count(c.rotary.dims)
        w.add_rope_freq_base(c.rotary.theta)
    if any(c.windows):
        w.add_sliding_window(next(window for window in c.windows if window))
    if c.attention_softcap:
        w.add_attn_logit_softcapping(c.attention_softcap)
        w.add_final_logit_softcapping(c.logit_softcap)
    if architecture == "gptneox":
        w.add_parallel_residual(c.parallel)
    if architecture == "gemma3":
        w.add_uint32("gemma3.attention.sliding_window_pattern", 2)
    for key, value in entries:
        (w.add_string if isinstance(value, str) else w.add_float32)(f"{architecture}.{key}", value)
    for name, array in _tensors(model, architecture):
        stored = np.ascontiguousarray(array, np.float32)
        if kind is not None and stored.ndim == 2:
            w.add_tensor(name, gguf.quantize(stored, kind), raw_dtype=kind)
        else:
            w.add_tensor(name, stored)
    if add is not None:
        add(w)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def _tensors(model: Model, architecture: str):
    c, fused = model.config, {}
    for name, array in named(model.params):
        if name in _WHOLE:
            yield f"{_WHOLE[name]}.weight", array
            continue
        layer, rest = "", name
        if name.startswith("layers."):
            _, number, rest = name.split(".", 2)
            layer = f"blk.{number}."
        parent, _, last = rest.rpartition(".")
        if last in ("scale", "bias"):
            names = _NORMS | (_POST if c.placement == "post" else {})
            yield f"{layer}{names[parent]}.{'weight' if last == 'scale' else 'bias'}", array
            continue
        kind, letter = last.split("_")
        word = "weight" if kind == "w" else "bias"
        if letter in "qk" and architecture == "llama":
            heads = c.n_heads if letter == "q" else c.n_kv_heads
            array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        if letter in "qkv" and architecture in ("phi3", "gpt2", "gptneox"):
            fused.setdefault(f"{layer}attn_qkv.{word}", {})[letter] = array
        elif letter in ("gate", "up") and architecture == "phi3":
            fused.setdefault(f"{layer}ffn_up.{word}", {})[letter] = array
        else:
            yield f"{layer}{_LETTERS[letter]}.{word}", array
    for name, parts in fused.items():
        order = "qkv" if "qkv" in name else ("gate", "up")
        yield name, np.concatenate([parts[letter] for letter in order])
