"""Tiny random models of every architecture, made without any other library."""

import re

import numpy as np
import pytest

from helpers import SHARED
from rotsparse.models.config import TransformerConfig
from rotsparse.models.families import family_of, read_config
from rotsparse.models.model import Model, expected_shape, nested
from rotsparse.models.rotary import Rotary

_GROUPED = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
_ENCODER = {**_GROUPED, "num_key_value_heads": None, "pad_token_id": 1}
RAW = {
    "llama": {**_GROUPED, "architectures": ["LlamaForCausalLM"]},
    "mistral": {**_GROUPED, "sliding_window": 5},
    "qwen2": {**_GROUPED, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {**_GROUPED, "head_dim": 6, "tie_word_embeddings": True},
    "gemma": {**_GROUPED, "head_dim": 6},
    "gemma2": {**_GROUPED, "head_dim": 6, "sliding_window": 5},
    "gemma3_text": {**_GROUPED, "head_dim": 6, "sliding_window": 5, "sliding_window_pattern": 2},
    "phi3": {**_GROUPED, "sliding_window": 5},
    "olmo2": _GROUPED,
    "gpt2": {"vocab_size": 31, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 24, "n_positions": 32},
    "gpt_neo": {
        "vocab_size": 31,
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 4,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 5,
    },
    "gpt_neox": {**_GROUPED, "num_key_value_heads": None, "rotary_pct": 0.5},
    "opt": {
        "vocab_size": 31,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 24,
        "max_position_embeddings": 32,
    },
    "bert": {**_ENCODER, "architectures": ["BertModel"]},
    "roberta": {**_ENCODER, "architectures": ["RobertaModel"]},
    "distilbert": {
        "vocab_size": 31,
        "dim": 16,
        "hidden_dim": 24,
        "n_layers": 2,
        "n_heads": 4,
        "max_position_embeddings": 32,
        "architectures": ["DistilBertModel"],
    },
    "electra": {**_ENCODER, "embedding_size": 8, "architectures": ["ElectraModel"]},
    "mpnet": {**_ENCODER, "architectures": ["MPNetModel"]},
    "vit": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 8,
        "patch_size": 4,
        "architectures": ["ViTModel"],
    },
}
# Architectures whose residual stream can be rotated.
FOLDABLE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "gpt2", "gpt_neox", "opt")

STORIES = SHARED / "stories260k"
needs_stories = pytest.mark.skipif(not STORIES.exists(), reason="stories260K is not at ../shared/data/stories260k")


def random_parameters(config: TransformerConfig, names, seed: int) -> dict[str, np.ndarray]:
    """Parameters of the scale of trained ones; scales and biases well away from 1 and 0."""
    rng = np.random.default_rng(seed)
    flat = {}
    for name in names:
        shape = [n or 2 for n in expected_shape(config, name)]
        noise = rng.normal(size=shape)
        flat[name] = (noise * shape[-1] ** -0.5 if len(shape) == 2 else 0.3 * noise + 0.5).astype(np.float32)
    return flat


def tiny(name: str, seed: int = 0, **changes) -> Model:
    """A random model of this architecture."""
    raw = {"model_type": name, **RAW[name], **changes}
    config = read_config(raw, head=not str(raw.get("architectures")).endswith("Model']"))
    family = family_of(raw)
    on = {flag for flag in family.flags() if raw.get(flag, family.defaults.get(flag))}
    names = [p for e in family.entries(config) if e.flag is None or e.flag in on for p in e.params]
    if config.head and not raw.get("tie_word_embeddings", family.defaults["tie_word_embeddings"]):
        names.append("unembed")
    return Model(config, nested(random_parameters(config, names, seed), config.n_layers), "huggingface", raw)


def inputs(name: str) -> np.ndarray:
    """Two sequences of nine tokens, or two images."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(2, 3, 8, 8)).astype(np.float32) if name == "vit" else rng.integers(0, 31, (2, 9))


def tiny_llama2c(seed: int = 0, *, tied: bool = True) -> Model:
    """A random model that llama2.c's format can hold."""
    config = TransformerConfig(
        "llama2c", 2, 16, 24, 4, 2, 4, 31, 32, "silu", True, "rms", 1e-5, rotary=Rotary(4, interleaved=True)
    )
    matrices = "attn.w_q attn.w_k attn.w_v attn.w_o mlp.w_gate mlp.w_up mlp.w_down attn_norm.scale mlp_norm.scale"
    names = ["embed", "final_norm.scale", *(f"layers.{i}.{n}" for i in range(2) for n in matrices.split())]
    flat = random_parameters(config, names if tied else [*names, "unembed"], seed)
    return Model(config, nested(flat, 2), "llama2c")


def same_parameters(a: Model, b: Model) -> bool:
    """Bitwise, in names, shapes and types too."""
    return a.fingerprint() == b.fingerprint()


def message(error) -> str:
    """A caught error's text on one line."""
    return re.sub(r"\s+", " ", str(error.value))
