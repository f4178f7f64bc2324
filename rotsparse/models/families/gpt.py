"""Decoders of GPT's kind: MLPs without a gate, LayerNorms with biases."""

from typing import Any

import numpy as np

from rotsparse.models.families import rope
from rotsparse.models.families.family import Entry, Family, fused, layer_norm, linear, tensor
from rotsparse.models.families.settings import Settings

_HARMLESS = (
    "attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop resid_dropout embed_dropout dropout is_decoder "
    "activation_dropout layerdrop init_std"
)
_CARRIED = r"^(score|classifier|qa_outputs|v_head|multiple_choice_head)\."


# --- config.json --------------------------------------------------------------------------------------------------


def _common(s: Settings) -> dict[str, Any]:
    return {**s.sizes(), "gated": False, "norm": "layer", "norm_eps": s.number("layer_norm_eps")}


def _gpt2(s: Settings) -> dict[str, Any]:
    scales = {} if s.on("scale_attn_weights") else {"attention_scale": 1.0}
    inverse = s.on("scale_attn_by_inverse_layer_idx")
    s = _with_hidden(s)
    return {**_common(s), **scales, "causal": s.on("is_causal"), "inverse_layer_scale": inverse}


def _gpt_neo(s: Settings) -> dict[str, Any]:
    s = _with_hidden(s)
    n, window = s.layers(), s.integer("window_size")
    kinds = _expanded(s, n)
    if s.optional("attention_layers") not in (None, kinds):
        s.refuse("attention_layers", "it is not what attention_types says")
    windows = tuple(window if kind == "local" else None for kind in kinds)
    return {**_common(s), "attention_scale": 1.0, "windows": windows}


def _expanded(s: Settings, n: int) -> list[str]:
    """The kinds of all layers from such as `[[["global", "local"], 12]]`."""
    kinds: list[str] = []
    try:
        for pattern, times in s.need("attention_types"):
            if type(times) is not int or times < 0 or len(pattern) * times > n:
                break
            kinds += [str(kind) for kind in pattern] * times
    except (TypeError, ValueError):
        kinds = []
    if len(kinds) != n or not set(kinds) <= {"global", "local"}:
        s.refuse("attention_types", f"expected the kinds 'global' and 'local' for {n} layers")
    return kinds


def _with_hidden(s: Settings) -> Settings:
    """These families' MLPs are four times as wide as the stream where config.json does not say."""
    if s.optional("intermediate_size") is None:
        s.raw["intermediate_size"] = 4 * s.integer("hidden_size")
    return s


def _gpt_neox(s: Settings) -> dict[str, Any]:
    share = s.number("rotary_pct")
    theta = s.number("rotary_emb_base")
    for key, value in (("partial_rotary_factor", share), ("rope_theta", theta)):
        if key in s and s.number(key) != value:
            s.refuse(key, f"the {s.kind} model's own entry means {value:g}, which transformers takes")
    common = _common(s)
    rotary = rope.one_rotary(s, common["d_head"], theta=theta, share=share, partial=True)
    return {
        **common,
        "max_positions": rope.reach(rotary, common["max_positions"]),
        "rotary": rotary,
        "parallel": s.on("use_parallel_residual"),
        "causal": s.on("is_causal"),
    }


def _opt(s: Settings) -> dict[str, Any]:
    if s.optional("word_embed_proj_dim") not in (None, s.integer("hidden_size")):
        s.refuse("word_embed_proj_dim", "only embeddings as wide as the stream are")
    return {**_common(s), "norm_eps": 1e-5, "causal": s.on("is_causal"), "position_offset": 2}


# --- tensors ------------------------------------------------------------------------------------------------------


def _thirds(config, array) -> tuple[np.ndarray, ...]:
    """GPT-2 keeps its matrices as `[in, out]`, and queries, keys and values side by side."""
    q, k, v = np.split(array.T, 3) if array.ndim > 1 else np.split(array, 3)
    return q, k, v


def _side_by_side(config, *qkv) -> np.ndarray:
    return np.concatenate(qkv).T


def _by_head(config, array) -> tuple[np.ndarray, ...]:
    """NeoX fuses them head by head: `[heads, (q, k, v), d_head, ...]`."""
    heads = array.reshape(config.n_heads, 3, config.d_head, *array.shape[1:])
    rows = config.n_heads * config.d_head
    return tuple(heads[:, part].reshape(rows, *array.shape[1:]) for part in range(3))


def _heads_joined(config, *qkv) -> np.ndarray:
    heads = [part.reshape(config.n_heads, config.d_head, *part.shape[1:]) for part in qkv]
    return np.stack(heads, axis=1).reshape(3 * config.n_heads * config.d_head, *qkv[0].shape[1:])


_GPT2: tuple[Entry, ...] = (
    *tensor("wte.weight", "embed"),
    *tensor("wpe.weight", "positions"),
    *layer_norm("ln_f", "final_norm"),
    *fused("h.*.attn.c_attn", "layers.*.attn", ("q", "k", "v"), _thirds, _side_by_side, bias=True),
    *linear("h.*.attn.c_proj", "layers.*.attn.o", transposed=True),
    *linear("h.*.mlp.c_fc", "layers.*.mlp.in", transposed=True),
    *linear("h.*.mlp.c_proj", "layers.*.mlp.out", transposed=True),
    *layer_norm("h.*.ln_1", "layers.*.attn_norm"),
    *layer_norm("h.*.ln_2", "layers.*.mlp_norm"),
)
_GPT_NEO: tuple[Entry, ...] = (
    *tensor("wte.weight", "embed"),
    *tensor("wpe.weight", "positions"),
    *layer_norm("ln_f", "final_norm"),
    *(e for x in "qkv" for e in linear(f"h.*.attn.attention.{x}_proj", f"layers.*.attn.{x}", bias=False)),
    *linear("h.*.attn.attention.out_proj", "layers.*.attn.o"),
    *linear("h.*.mlp.c_fc", "layers.*.mlp.in"),
    *linear("h.*.mlp.c_proj", "layers.*.mlp.out"),
    *layer_norm("h.*.ln_1", "layers.*.attn_norm"),
    *layer_norm("h.*.ln_2", "layers.*.mlp_norm"),
)
_GPT_NEOX: tuple[Entry, ...] = (
    *tensor("embed_in.weight", "embed"),
    *layer_norm("final_layer_norm", "final_norm"),
    *fused(
        "layers.*.attention.query_key_value",
        "layers.*.attn",
        ("q", "k", "v"),
        _by_head,
        _heads_joined,
        bias="attention_bias",
    ),
    *linear("layers.*.attention.dense", "layers.*.attn.o", bias="attention_bias"),
    *linear("layers.*.mlp.dense_h_to_4h", "layers.*.mlp.in"),
    *linear("layers.*.mlp.dense_4h_to_h", "layers.*.mlp.out"),
    *layer_norm("layers.*.input_layernorm", "layers.*.attn_norm"),
    *layer_norm("layers.*.post_attention_layernorm", "layers.*.mlp_norm"),
)
_OPT: tuple[Entry, ...] = (
    *tensor("embed_tokens.weight", "embed"),
    *tensor("embed_positions.weight", "positions"),
    *layer_norm("final_layer_norm", "final_norm"),
    *(e for x in "qkv" for e in linear(f"layers.*.self_attn.{x}_proj", f"layers.*.attn.{x}", bias="enable_bias")),
    *linear("layers.*.self_attn.out_proj", "layers.*.attn.o", bias="enable_bias"),
    *linear("layers.*.fc1", "layers.*.mlp.in", bias="enable_bias"),
    *linear("layers.*.fc2", "layers.*.mlp.out", bias="enable_bias"),
    *layer_norm("layers.*.self_attn_layer_norm", "layers.*.attn_norm"),
    *layer_norm("layers.*.final_layer_norm", "layers.*.mlp_norm"),
)

# --- the table ----------------------------------------------------------------------------------------------------

FAMILIES = {
    "gpt2": Family(
        _GPT2,
        "transformer.",
        _gpt2,
        keys="layer_norm_eps scale_attn_weights scale_attn_by_inverse_layer_idx is_causal",
        harmless=f"{_HARMLESS} n_ctx reorder_and_upcast_attn",
        ignored=r"\.attn\.(bias|masked_bias)$",
        carried=_CARRIED,
        defaults={
            "hidden_act": "gelu_new",
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "is_causal": True,
        },
        spelled={
            "n_embd": "hidden_size",
            "n_layer": "num_hidden_layers",
            "n_head": "num_attention_heads",
            "n_positions": "max_position_embeddings",
            "n_inner": "intermediate_size",
            "activation_function": "hidden_act",
            "layer_norm_epsilon": "layer_norm_eps",
        },
        also="hidden_size num_hidden_layers num_attention_heads max_position_embeddings",
    ),
    "gpt_neo": Family(
        _GPT_NEO,
        "transformer.",
        _gpt_neo,
        keys="layer_norm_eps attention_types attention_layers window_size",
        only={"is_causal": (True,)},
        harmless=_HARMLESS,
        ignored=r"\.attn\.attention\.(bias|masked_bias)$",
        carried=_CARRIED,
        defaults={
            "hidden_act": "gelu_new",
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            "window_size": 256,
            "attention_types": [[["global", "local"], 12]],
        },
        spelled={
            "num_layers": "num_hidden_layers",
            "num_heads": "num_attention_heads",
            "activation_function": "hidden_act",
            "layer_norm_epsilon": "layer_norm_eps",
        },
        also="num_hidden_layers num_attention_heads",
    ),
    "gpt_neox": Family(
        _GPT_NEOX,
        "gpt_neox.",
        _gpt_neox,
        head="embed_out.weight",
        keys=f"layer_norm_eps use_parallel_residual rotary_pct rotary_emb_base is_causal {rope.KEYS}",
        harmless=_HARMLESS,
        ignored=r"(rotary_emb\.inv_freq|attention\.(bias|masked_bias))$",
        carried=_CARRIED,
        defaults={
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "use_parallel_residual": True,
            "rotary_pct": 0.25,
            "rotary_emb_base": 10000.0,
            "attention_bias": True,
            "is_causal": True,
        },
    ),
    "opt": Family(
        _OPT,
        "model.decoder.",
        _opt,
        keys="word_embed_proj_dim is_causal",
        only={
            "do_layer_norm_before": (True,),
            "_remove_final_layer_norm": (False,),
            "layer_norm_elementwise_affine": (True,),
        },
        harmless=_HARMLESS,
        carried=_CARRIED,
        defaults={
            "hidden_act": "relu",
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            "enable_bias": True,
            "is_causal": True,
        },
        spelled={"ffn_dim": "intermediate_size", "activation_function": "hidden_act"},
    ),
}
