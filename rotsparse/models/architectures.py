"""The Hugging Face architectures that can be read and written: for each one, how its `config.json` maps to a
`TransformerConfig`, and which tensor of the file holds which parameter.

One table serves both directions. All tensors it lists are required, except a head where the embedding serves as one.
"""

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rotsparse.models.config import Rotary, TransformerConfig

Raw = Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """A tensor of the file and the parameters in it: one, or three where queries, keys and values are fused."""

    name: str
    params: tuple[str, ...]
    split: Callable[[np.ndarray], tuple[np.ndarray, ...]] = lambda a: (a,)
    join: Callable[..., np.ndarray] = lambda a: a


@dataclass(frozen=True)
class Architecture:
    """`prefix` stands before the names of the transformer's body where a head was saved with it. `flags` are the
    entries of config.json that switch biases on, with the parameters they stand for; `body` gets those that are on.
    `ignored` are buffers that can be recomputed; `carried` tensors are not used but written back."""

    config: Callable[[Raw], TransformerConfig]
    body: Callable[[TransformerConfig, AbstractSet[str]], list[Entry]]
    prefix: str
    head_name: str | None = "lm_head.weight"
    tied_by_default: bool = False
    flags: Mapping[str, tuple[bool, tuple[str, ...]]] = field(default_factory=dict)
    ignored: str = r"rotary_emb\.inv_freq$"
    carried: str = r"(?!)"

    def entries(self, raw: Raw, config: TransformerConfig, *, prefix: str) -> list[Entry]:
        """Every tensor that a file with this configuration must have."""
        on = {name for name in self.flags if self.flag(raw, name)}
        entries = [Entry(prefix + e.name, e.params, e.split, e.join) for e in self.body(config, on)]
        if config.head and self.head_name and not raw.get("tie_word_embeddings", self.tied_by_default):
            entries.append(Entry(self.head_name, ("unembed",)))
        return entries

    def flag(self, raw: Raw, name: str) -> bool:
        """Whether config.json switches this bias on."""
        return bool(raw.get(name, self.flags[name][0]))


# --- reading config.json -----------------------------------------------------------------------------------------

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "squared_relu",
    "sigmoid": "sigmoid",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}


def _need(raw: Raw, key: str) -> Any:
    if raw.get(key) is None:
        raise ValueError(f"config.json has no {key!r}: is it the configuration of a {raw.get('model_type')} model?")
    return raw[key]


def _activation(raw: Raw, key: str, default: str) -> str:
    name = raw.get(key) or default
    if name not in _ACTIVATIONS:
        raise ValueError(f"config.json: unknown {key} {name!r}: expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _refuse(raw: Raw, **accepted: Any) -> None:
    """Settings that would change the computation in a way the transformer here does not know."""
    for key, value in accepted.items():
        if raw.get(key) not in (None, value):
            raise ValueError(f"config.json: {key} = {raw[key]!r} is not supported, only {value!r} is")


def is_bare(raw: Raw) -> bool:
    """Whether the file was saved from the transformer's body alone ("LlamaModel"), without a head. One that does not
    say is a language model."""
    classes = raw.get("architectures") or ["ForCausalLM"]
    return classes[0].endswith("Model") and not classes[0].endswith("LMHeadModel")


def _rotary(raw: Raw, d_head: int, share: float = 1.0) -> Rotary:
    # Newer files keep everything in rope_parameters, older ones rope_theta beside rope_scaling.
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    dims = int(d_head * rope.get("partial_rotary_factor", share))
    if kind == "default":
        return Rotary(dims, theta)
    if kind == "linear":
        return Rotary(dims, theta, factor=float(rope["factor"]))
    if kind == "llama3":
        context = rope.get("original_max_position_embeddings") or _need(raw, "max_position_embeddings")
        low_high = (float(rope["low_freq_factor"]), float(rope["high_freq_factor"]))
        return Rotary(dims, theta, factor=float(rope["factor"]), low_high=low_high, context=int(context))
    raise ValueError(f"config.json: rotary type {kind!r} is not supported: expected default, linear or llama3")


def _windows(raw: Raw, default_types: list[str]) -> tuple[int | None, ...]:
    types = raw.get("layer_types") or default_types
    return tuple(raw.get("sliding_window") if kind == "sliding_attention" else None for kind in types)


def _llama_like(raw: Raw, **changes: Any) -> TransformerConfig:
    heads, d_model = _need(raw, "num_attention_heads"), _need(raw, "hidden_size")
    d_head = changes.pop("d_head", None) or raw.get("head_dim") or d_model // heads
    settings = {
        "architecture": raw["model_type"],
        "n_layers": _need(raw, "num_hidden_layers"),
        "d_model": d_model,
        "d_hidden": _need(raw, "intermediate_size"),
        "n_heads": heads,
        "n_kv_heads": raw.get("num_key_value_heads") or heads,
        "d_head": d_head,
        "vocab_size": _need(raw, "vocab_size"),
        "max_positions": raw.get("max_position_embeddings", 1 << 30),
        "activation": _activation(raw, "hidden_act", "silu"),
        "gated": True,
        "norm": "rms",
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "head": not is_bare(raw),
        "rotary": _rotary(raw, d_head),
    }
    return TransformerConfig(**{**settings, **changes})


def _mistral(raw: Raw) -> TransformerConfig:
    window = raw.get("sliding_window", 4096)
    return _llama_like(raw, windows=(window,) * _need(raw, "num_hidden_layers"))


def _qwen(raw: Raw) -> TransformerConfig:
    n = _need(raw, "num_hidden_layers")
    first = raw.get("max_window_layers", 28)
    types = ["sliding_attention" if i >= first else "full_attention" for i in range(n)]
    windows = _windows(raw, types) if raw.get("use_sliding_window") else (None,) * n
    default_head = 128 if raw["model_type"] == "qwen3" else None
    return _llama_like(raw, windows=windows, d_head=raw.get("head_dim") or default_head)


def _gemma2(raw: Raw) -> TransformerConfig:
    _refuse(raw, use_bidirectional_attention=False)
    types = ["full_attention" if i % 2 else "sliding_attention" for i in range(_need(raw, "num_hidden_layers"))]
    # A missing cap is the default cap; a cap of null is none.
    return _llama_like(
        raw,
        d_head=raw.get("head_dim") or 256,
        activation=_activation(raw, "hidden_activation", "gelu_pytorch_tanh"),
        placement="sandwich",
        windows=_windows({"sliding_window": 4096, **raw}, types),
        attention_scale=raw.get("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=raw.get("attn_logit_softcapping", 50.0),
        logit_softcap=raw.get("final_logit_softcapping", 30.0),
        embedding_scale=_need(raw, "hidden_size") ** 0.5,
    )


def _gpt2(raw: Raw) -> TransformerConfig:
    _refuse(raw, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    d_model, heads = _need(raw, "n_embd"), _need(raw, "n_head")
    return TransformerConfig(
        architecture="gpt2",
        n_layers=_need(raw, "n_layer"),
        d_model=d_model,
        d_hidden=raw.get("n_inner") or 4 * d_model,
        n_heads=heads,
        n_kv_heads=heads,
        d_head=d_model // heads,
        vocab_size=_need(raw, "vocab_size"),
        max_positions=raw.get("n_positions", 1024),
        activation=_activation(raw, "activation_function", "gelu_new"),
        gated=False,
        norm="layer",
        norm_eps=raw.get("layer_norm_epsilon", 1e-5),
        head=not is_bare(raw),
    )


def _gpt_neox(raw: Raw) -> TransformerConfig:
    d_head = _need(raw, "hidden_size") // _need(raw, "num_attention_heads")
    old = {"rope_theta": raw.get("rotary_emb_base"), **raw}
    return _llama_like(
        raw,
        activation=_activation(raw, "hidden_act", "gelu"),
        gated=False,
        norm="layer",
        norm_eps=raw.get("layer_norm_eps", 1e-5),
        parallel=raw.get("use_parallel_residual", True),
        rotary=_rotary(old, d_head, raw.get("rotary_pct", 0.25)),
    )


def _bert(raw: Raw) -> TransformerConfig:
    _refuse(raw, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    return _llama_like(
        raw,
        activation=_activation(raw, "hidden_act", "gelu"),
        gated=False,
        norm="layer",
        norm_eps=raw.get("layer_norm_eps", 1e-12),
        placement="post",
        causal=False,
        head=False,
        rotary=None,
    )


# --- tensors ------------------------------------------------------------------------------------------------------


def _linear(theirs: str, ours: str, letter: str, bias: bool) -> list[Entry]:
    """A matrix `[out, in]`, and its bias where there is one."""
    entries = [Entry(f"{theirs}.weight", (f"{ours}.w_{letter}",))]
    return [*entries, Entry(f"{theirs}.bias", (f"{ours}.b_{letter}",))] if bias else entries


def _norm(theirs: str, ours: str, bias: bool = True) -> list[Entry]:
    entries = [Entry(f"{theirs}.weight", (f"{ours}.scale",))]
    return [*entries, Entry(f"{theirs}.bias", (f"{ours}.bias",))] if bias else entries


def _gemma_norm(theirs: str, ours: str) -> list[Entry]:
    """Gemma stores `γ - 1`."""
    return [Entry(f"{theirs}.weight", (f"{ours}.scale",), lambda a: (a + 1,), lambda a: a - 1)]


def _llama_body(c: TransformerConfig, on: AbstractSet[str]) -> list[Entry]:
    norm = _gemma_norm if c.placement == "sandwich" else lambda theirs, ours: _norm(theirs, ours, bias=False)
    entries = [Entry("embed_tokens.weight", ("embed",)), *norm("norm", "final_norm")]
    for i in range(c.n_layers):
        theirs, ours = f"layers.{i}", f"layers.{i}"
        for letter in "qkvo":
            # Qwen 2 has biases on queries, keys and values, and does not say so.
            bias = "attention_bias" in on or (c.architecture == "qwen2" and letter != "o")
            entries += _linear(f"{theirs}.self_attn.{letter}_proj", f"{ours}.attn", letter, bias)
        for name in ("gate", "up", "down"):
            entries += _linear(f"{theirs}.mlp.{name}_proj", f"{ours}.mlp", name, "mlp_bias" in on)
        if c.architecture == "qwen3":
            entries += norm(f"{theirs}.self_attn.q_norm", f"{ours}.attn.q_norm")
            entries += norm(f"{theirs}.self_attn.k_norm", f"{ours}.attn.k_norm")
        entries += norm(f"{theirs}.input_layernorm", f"{ours}.attn_norm")
        if c.placement == "sandwich":
            entries += norm(f"{theirs}.post_attention_layernorm", f"{ours}.attn_post_norm")
            entries += norm(f"{theirs}.pre_feedforward_layernorm", f"{ours}.mlp_norm")
            entries += norm(f"{theirs}.post_feedforward_layernorm", f"{ours}.mlp_post_norm")
        else:
            entries += norm(f"{theirs}.post_attention_layernorm", f"{ours}.mlp_norm")
    return entries


def _gpt2_body(c: TransformerConfig, on: AbstractSet[str]) -> list[Entry]:
    def conv1d(theirs, ours, letter):
        """GPT-2 keeps its matrices as `[in, out]`."""
        weight = Entry(f"{theirs}.weight", (f"{ours}.w_{letter}",), lambda a: (a.T,), lambda a: a.T)
        return [weight, Entry(f"{theirs}.bias", (f"{ours}.b_{letter}",))]

    entries = [Entry("wte.weight", ("embed",)), Entry("wpe.weight", ("positions",)), *_norm("ln_f", "final_norm")]
    for i in range(c.n_layers):
        theirs, ours = f"h.{i}", f"layers.{i}"
        w_qkv, b_qkv = (tuple(f"{ours}.attn.{kind}_{letter}" for letter in "qkv") for kind in "wb")
        entries += [
            Entry(
                f"{theirs}.attn.c_attn.weight",
                w_qkv,
                lambda a: tuple(np.split(a.T, 3)),
                lambda *qkv: np.concatenate(qkv).T,
            ),
            Entry(
                f"{theirs}.attn.c_attn.bias", b_qkv, lambda a: tuple(np.split(a, 3)), lambda *qkv: np.concatenate(qkv)
            ),
            *conv1d(f"{theirs}.attn.c_proj", f"{ours}.attn", "o"),
            *conv1d(f"{theirs}.mlp.c_fc", f"{ours}.mlp", "in"),
            *conv1d(f"{theirs}.mlp.c_proj", f"{ours}.mlp", "out"),
            *_norm(f"{theirs}.ln_1", f"{ours}.attn_norm"),
            *_norm(f"{theirs}.ln_2", f"{ours}.mlp_norm"),
        ]
    return entries


def _gpt_neox_body(c: TransformerConfig, on: AbstractSet[str]) -> list[Entry]:
    def split(a):
        """Fused head by head: `[heads, (q, k, v), d_head, ...]`."""
        by_head = a.reshape(c.n_heads, 3, c.d_head, *a.shape[1:])
        return tuple(by_head[:, part].reshape(c.n_heads * c.d_head, *a.shape[1:]) for part in range(3))

    def join(*qkv):
        by_head = [part.reshape(c.n_heads, c.d_head, *part.shape[1:]) for part in qkv]
        return np.stack(by_head, axis=1).reshape(3 * c.n_heads * c.d_head, *qkv[0].shape[1:])

    attention_bias = "attention_bias" in on
    entries = [Entry("embed_in.weight", ("embed",)), *_norm("final_layer_norm", "final_norm")]
    for i in range(c.n_layers):
        name = f"layers.{i}"
        for kind, word in [("w", "weight"), ("b", "bias")][: 1 + attention_bias]:
            qkv = tuple(f"{name}.attn.{kind}_{letter}" for letter in "qkv")
            entries.append(Entry(f"{name}.attention.query_key_value.{word}", qkv, split, join))
        entries += [
            *_linear(f"{name}.attention.dense", f"{name}.attn", "o", attention_bias),
            *_linear(f"{name}.mlp.dense_h_to_4h", f"{name}.mlp", "in", True),
            *_linear(f"{name}.mlp.dense_4h_to_h", f"{name}.mlp", "out", True),
            *_norm(f"{name}.input_layernorm", f"{name}.attn_norm"),
            *_norm(f"{name}.post_attention_layernorm", f"{name}.mlp_norm"),
        ]
    return entries


def _bert_body(c: TransformerConfig, on: AbstractSet[str]) -> list[Entry]:
    entries = [
        Entry("embeddings.word_embeddings.weight", ("embed",)),
        Entry("embeddings.position_embeddings.weight", ("positions",)),
        Entry("embeddings.token_type_embeddings.weight", ("token_types",)),
        *_norm("embeddings.LayerNorm", "embed_norm"),
    ]
    for i in range(c.n_layers):
        theirs, ours = f"encoder.layer.{i}", f"layers.{i}"
        for letter, word in [("q", "query"), ("k", "key"), ("v", "value")]:
            entries += _linear(f"{theirs}.attention.self.{word}", f"{ours}.attn", letter, True)
        entries += [
            *_linear(f"{theirs}.attention.output.dense", f"{ours}.attn", "o", True),
            *_norm(f"{theirs}.attention.output.LayerNorm", f"{ours}.attn_norm"),
            *_linear(f"{theirs}.intermediate.dense", f"{ours}.mlp", "in", True),
            *_linear(f"{theirs}.output.dense", f"{ours}.mlp", "out", True),
            *_norm(f"{theirs}.output.LayerNorm", f"{ours}.mlp_norm"),
        ]
    return entries


_ATTENTION_BIASES = ("attn.b_q", "attn.b_k", "attn.b_v", "attn.b_o")
_MLP_BIASES = ("mlp.b_gate", "mlp.b_up", "mlp.b_down")

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        _llama_like,
        _llama_body,
        "model.",
        flags={"attention_bias": (False, _ATTENTION_BIASES), "mlp_bias": (False, _MLP_BIASES)},
    ),
    "mistral": Architecture(_mistral, _llama_body, "model."),
    "qwen2": Architecture(_qwen, _llama_body, "model."),
    "qwen3": Architecture(_qwen, _llama_body, "model.", flags={"attention_bias": (False, _ATTENTION_BIASES)}),
    "gemma2": Architecture(
        _gemma2,
        _llama_body,
        "model.",
        tied_by_default=True,
        flags={"attention_bias": (False, _ATTENTION_BIASES)},
    ),
    "gpt2": Architecture(
        _gpt2, _gpt2_body, "transformer.", tied_by_default=True, ignored=r"\.attn\.(bias|masked_bias)$"
    ),
    "gpt_neox": Architecture(
        _gpt_neox,
        _gpt_neox_body,
        "gpt_neox.",
        head_name="embed_out.weight",
        flags={"attention_bias": (True, _ATTENTION_BIASES)},
        ignored=r"(rotary_emb\.inv_freq|attention\.(bias|masked_bias))$",
    ),
    "bert": Architecture(
        _bert,
        _bert_body,
        "bert.",
        head_name=None,
        ignored=r"embeddings\.position_ids$",
        carried=r"^(cls|classifier|(bert\.)?pooler)\.",
    ),
}
