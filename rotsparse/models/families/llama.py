"""Decoders of Llama's kind: gated MLPs, RMSNorms, rotary positions."""

from typing import Any

from rotsparse.models.families import rope
from rotsparse.models.families.family import (
    Entry,
    Family,
    fused,
    gemma_norm,
    linear,
    rms_norm,
    rows,
    stacked,
    tensor,
)
from rotsparse.models.families.settings import Settings
from rotsparse.models.rotary import Rotary

Body = tuple[Entry, ...]

_KEYS = f"num_key_value_heads rms_norm_eps is_causal {rope.KEYS}"
_HEADS = f"{_KEYS} head_dim"
_WINDOWS = "use_sliding_window sliding_window max_window_layers layer_types"
_HARMLESS = "attention_dropout hidden_dropout pretraining_tp is_decoder mlp_dropout"
_CARRIED = r"^(score|classifier|qa_outputs|v_head)\."


# --- config.json --------------------------------------------------------------------------------------------------


def common(s: Settings, **rotary: Any) -> dict[str, Any]:
    """What all of them read the same."""
    sizes = s.sizes()
    embedding = rope.one_rotary(s, sizes["d_head"], **rotary)
    return {
        **sizes,
        "max_positions": rope.reach(embedding, sizes["max_positions"]),
        "gated": True,
        "norm": "rms",
        "norm_eps": s.number("rms_norm_eps"),
        "causal": s.on("is_causal"),
        "rotary": embedding,
    }


def layer_types(s: Settings, usual: list[str]) -> list[str]:
    """Which layers look at a window only. Raises `ValueError` for another kind of attention."""
    n, types = s.layers(), s.optional("layer_types")
    types = usual if types is None else types
    if not isinstance(types, list) or len(types) != n:
        s.refuse("layer_types", f"expected one for each of the {n} layers")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            s.refuse("layer_types", "a layer's attention is full_attention or sliding_attention")
    return types


def windows(s: Settings, types: list[str]) -> tuple[int | None, ...]:
    window = s.optional_integer("sliding_window")
    if window is None and "sliding_attention" in types:
        s.refuse("sliding_window", "layer_types has sliding_attention, which needs a window")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _mistral(s: Settings) -> dict[str, Any]:
    return {**common(s), "windows": (s.optional_integer("sliding_window"),) * s.layers()}


def _phi3(s: Settings) -> dict[str, Any]:
    # Phi-3 calls LongRoPE by other names too, and its original length stands beside the scaling.
    kinds = {"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"}
    everywhere = (s.optional_integer("sliding_window"),) * s.layers()
    return {**common(s, kinds=kinds, partial=True), "windows": everywhere}


def _qwen(s: Settings) -> dict[str, Any]:
    n = s.layers()
    first = s.integer("max_window_layers", least=0)
    on = s.on("use_sliding_window") and s.optional_integer("sliding_window") is not None
    usual = ["sliding_attention" if on and i >= first else "full_attention" for i in range(n)]
    types = layer_types(s, usual)
    if not on and "sliding_attention" in types:
        s.refuse("layer_types", "use_sliding_window is off")
    return {**common(s), "windows": windows(s, types) if on else (None,) * n}


def _gemma(s: Settings) -> dict[str, Any]:
    scale = s.integer("hidden_size") ** 0.5
    if s.optional("hidden_act") == "gelu":  # in Gemma's first files, and what is meant is the approximation
        s.raw["hidden_act"] = "gelu_pytorch_tanh"
    if "hidden_activation" in s and s.optional("hidden_activation") != s.optional("hidden_act"):
        s.refuse("hidden_activation", f"hidden_act is {s.optional('hidden_act')!r}: versions differ in which counts")
    return {**common(s), "embedding_scale": scale}


def _gemma2(s: Settings) -> dict[str, Any]:
    n = s.layers()
    types = layer_types(s, ["full_attention" if i % 2 else "sliding_attention" for i in range(n)])
    return {**common(s), **_gemma_attention(s), "windows": windows(s, types)}


def _gemma3(s: Settings) -> dict[str, Any]:
    n, sizes = s.layers(), s.sizes()
    pattern = s.integer("sliding_window_pattern")
    types = layer_types(s, ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(n)])
    full, local = _gemma3_rotaries(s, sizes["d_head"])
    if s.optional("attn_logit_softcapping") is not None:
        s.refuse("attn_logit_softcapping", "Gemma 3 caps no scores, transformers takes no notice of it")
    return {
        **sizes,
        "max_positions": rope.reach(full, sizes["max_positions"]),
        "gated": True,
        "norm": "rms",
        "norm_eps": s.number("rms_norm_eps"),
        "causal": s.on("is_causal"),
        **_gemma_attention(s),
        "windows": windows(s, types),
        "rotary": full,
        "local_rotary": local,
    }


def _gemma_attention(s: Settings) -> dict[str, Any]:
    return {
        "placement": "sandwich",
        "attention_scale": s.number("query_pre_attn_scalar") ** -0.5,
        # A missing cap is the default cap; a cap of null is none.
        "attention_softcap": s.optional_number("attn_logit_softcapping"),
        "logit_softcap": s.optional_number("final_logit_softcapping"),
        "embedding_scale": s.integer("hidden_size") ** 0.5,
    }


def _gemma3_rotaries(s: Settings, d_head: int) -> tuple[Rotary, Rotary]:
    """Of the layers that see everything, and of those with a window. The first take `rope_scaling` too."""
    both = s.optional("rope_parameters") or {}
    if not isinstance(both, dict) or not both.keys() <= {"full_attention", "sliding_attention"}:
        s.refuse("rope_parameters", "Gemma 3 has those of full_attention and of sliding_attention")
    scaling = s.optional("rope_scaling") or {}
    if not all(isinstance(part, dict | None) for part in (scaling, *both.values())):
        s.refuse("rope_scaling" if scaling else "rope_parameters", "expected objects such as {'rope_type': ...}")
    full, name = {**(both.get("full_attention") or {}), **scaling}, "rope_scaling" if scaling else "rope_parameters"
    theta, local_theta = s.optional_number("rope_theta"), s.optional_number("rope_local_base_freq")
    return (
        rope.Rope(s, name, full).rotary(d_head, theta=theta or 1e6),
        rope.Rope(s, "rope_parameters", both.get("sliding_attention") or {}).rotary(
            d_head, theta=local_theta or 10000.0
        ),
    )


def _olmo2(s: Settings) -> dict[str, Any]:
    return {**common(s), "placement": "output", "wide_qk_norm": True}


# --- tensors ------------------------------------------------------------------------------------------------------


def _attention(bias: bool | str, o_bias: bool | str) -> list[Entry]:
    at = "layers.*.self_attn"
    entries = [e for x in "qkv" for e in linear(f"{at}.{x}_proj", f"layers.*.attn.{x}", bias=bias)]
    return [*entries, *linear(f"{at}.o_proj", "layers.*.attn.o", bias=o_bias)]


def _qk_norms(norm=rms_norm) -> list[Entry]:
    return [e for x in "qk" for e in norm(f"layers.*.self_attn.{x}_norm", f"layers.*.attn.{x}_norm")]


def _mlp(bias: bool | str = False) -> list[Entry]:
    names = ("gate", "up", "down")
    return [e for x in names for e in linear(f"layers.*.mlp.{x}_proj", f"layers.*.mlp.{x}", bias=bias)]


_ENDS = (*tensor("embed_tokens.weight", "embed"), *rms_norm("norm", "final_norm"))
_GEMMA_ENDS = (*tensor("embed_tokens.weight", "embed"), *gemma_norm("norm", "final_norm"))
_IN_FRONT = (
    *rms_norm("layers.*.input_layernorm", "layers.*.attn_norm"),
    *rms_norm("layers.*.post_attention_layernorm", "layers.*.mlp_norm"),
)
_BEHIND = (
    *rms_norm("layers.*.post_attention_layernorm", "layers.*.attn_post_norm"),
    *rms_norm("layers.*.post_feedforward_layernorm", "layers.*.mlp_post_norm"),
)
_GEMMA_IN_FRONT = (
    *gemma_norm("layers.*.input_layernorm", "layers.*.attn_norm"),
    *gemma_norm("layers.*.post_attention_layernorm", "layers.*.mlp_norm"),
)
_GEMMA_AROUND = (
    *gemma_norm("layers.*.input_layernorm", "layers.*.attn_norm"),
    *gemma_norm("layers.*.post_attention_layernorm", "layers.*.attn_post_norm"),
    *gemma_norm("layers.*.pre_feedforward_layernorm", "layers.*.mlp_norm"),
    *gemma_norm("layers.*.post_feedforward_layernorm", "layers.*.mlp_post_norm"),
)
_LLAMA: Body = (*_ENDS, *_attention("attention_bias", "attention_bias"), *_mlp("mlp_bias"), *_IN_FRONT)
_MISTRAL: Body = (*_ENDS, *_attention(False, False), *_mlp(), *_IN_FRONT)
# Qwen 2 has biases on queries, keys and values, and does not say so.
_QWEN2: Body = (*_ENDS, *_attention(True, False), *_mlp(), *_IN_FRONT)
_QWEN3: Body = (*_ENDS, *_attention("attention_bias", "attention_bias"), *_qk_norms(), *_mlp(), *_IN_FRONT)
_GEMMA: Body = (*_GEMMA_ENDS, *_attention("attention_bias", "attention_bias"), *_mlp(), *_GEMMA_IN_FRONT)
_GEMMA2: Body = (*_GEMMA_ENDS, *_attention("attention_bias", "attention_bias"), *_mlp(), *_GEMMA_AROUND)
_OLMO2: Body = (*_ENDS, *_attention("attention_bias", "attention_bias"), *_qk_norms(), *_mlp(), *_BEHIND)
_PHI3: Body = (
    *_ENDS,
    *fused(
        "layers.*.self_attn.qkv_proj",
        "layers.*.attn",
        ("q", "k", "v"),
        rows(lambda c: c.n_heads * c.d_head, *[lambda c: c.n_kv_heads * c.d_head] * 2),
        stacked,
    ),
    *linear("layers.*.self_attn.o_proj", "layers.*.attn.o", bias=False),
    *fused(
        "layers.*.mlp.gate_up_proj",
        "layers.*.mlp",
        ("gate", "up"),
        rows(*[lambda c: c.d_hidden] * 2),
        stacked,
    ),
    *linear("layers.*.mlp.down_proj", "layers.*.mlp.down", bias=False),
    *_IN_FRONT,
)

# --- the table ----------------------------------------------------------------------------------------------------

_GEMMA_DEFAULTS = {
    "hidden_act": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "head_dim": 256,
    "is_causal": True,
}
_GEMMA2_DEFAULTS = {**_GEMMA_DEFAULTS, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096}
_GEMMA2_KEYS = (
    f"{_HEADS} attention_bias query_pre_attn_scalar sliding_window layer_types final_logit_softcapping "
    "attn_logit_softcapping"
)
_ONE_WAY = {"use_bidirectional_attention": (False,)}
_DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "is_causal": True}
_QWEN_DEFAULTS = {
    **_DEFAULTS,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

FAMILIES = {
    "llama": Family(
        _LLAMA,
        "model.",
        common,
        keys=_HEADS,
        harmless=_HARMLESS,
        carried=_CARRIED,
        defaults={**_DEFAULTS, "max_position_embeddings": 2048},
    ),
    "mistral": Family(
        _MISTRAL,
        "model.",
        _mistral,
        keys=f"{_HEADS} sliding_window",
        harmless=_HARMLESS,
        carried=_CARRIED,
        defaults={
            **_DEFAULTS,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
    ),
    "qwen2": Family(
        _QWEN2,
        "model.",
        _qwen,
        keys=f"{_HEADS} {_WINDOWS}",
        harmless=_HARMLESS,
        carried=_CARRIED,
        defaults=_QWEN_DEFAULTS,
    ),
    "qwen3": Family(
        _QWEN3,
        "model.",
        _qwen,
        keys=f"{_HEADS} {_WINDOWS}",
        harmless=_HARMLESS,
        carried=_CARRIED,
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
    ),
    "gemma": Family(
        _GEMMA,
        "model.",
        _gemma,
        keys=f"{_HEADS} hidden_activation",
        only=_ONE_WAY,
        harmless=_HARMLESS,
        carried=_CARRIED,
        defaults={**_GEMMA_DEFAULTS, "num_key_value_heads": 16},
    ),
    "gemma2": Family(
        _GEMMA2,
        "model.",
        _gemma2,
        keys=_GEMMA2_KEYS,
        only=_ONE_WAY,
        harmless=f"{_HARMLESS} sliding_window_size",
        carried=_CARRIED,
        defaults={**_GEMMA2_DEFAULTS, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
        spelled={"hidden_activation": "hidden_act"},
    ),
    "gemma3_text": Family(
        (*_GEMMA2, *_qk_norms(gemma_norm)),
        "model.",
        _gemma3,
        keys=f"{_GEMMA2_KEYS} rope_local_base_freq sliding_window_pattern",
        only=_ONE_WAY,
        harmless=f"{_HARMLESS} _sliding_window_pattern",
        carried=_CARRIED,
        defaults={**_GEMMA2_DEFAULTS, "max_position_embeddings": 131072, "sliding_window_pattern": 6},
        spelled={"hidden_activation": "hidden_act"},
    ),
    "phi3": Family(
        _PHI3,
        "model.",
        _phi3,
        keys=f"{_KEYS} sliding_window",
        only={"attention_bias": (False,)},
        harmless=f"{_HARMLESS} resid_pdrop embd_pdrop",
        carried=_CARRIED,
        defaults={
            **_DEFAULTS,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
        },
    ),
    "olmo2": Family(
        _OLMO2,
        "model.",
        _olmo2,
        keys=_KEYS,
        harmless=_HARMLESS,
        carried=_CARRIED,
        defaults={**_DEFAULTS, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048},
    ),
}
