"""Variants of config.json: activations, rotary embeddings, flags, sizes, and entries that nobody knows."""

_ACTIVATIONS = (
    "gelu gelu_10 gelu_fast gelu_new gelu_python gelu_pytorch_tanh gelu_python_tanh gelu_accurate hardswish laplace "
    "leaky_relu linear mish quick_gelu relu relu2 relu6 sigmoid silu sqrtsoftplus swish tanh"
).split()
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 16,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_LINEAR = {"rope_type": "linear", "factor": 4.0}
_SAVED = {"rope_type": "default", "rope_theta": 1e4}

# Each is a change of config.json.
ACTIVATIONS = {name: {"ACTIVATION": name} for name in _ACTIVATIONS}
ROTARY = {
    "theta": {"rope_theta": 500.0},
    "theta inside": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "theta in both": {"rope_theta": 50.0, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "no theta": {"rope_parameters": {"rope_type": "default"}},
    "linear": {"rope_scaling": _LINEAR},
    "linear, old word": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "linear of version 5": {"rope_parameters": {**_LINEAR, "rope_theta": 1e4}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "dynamic beyond": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 16},
    "llama3": {"rope_scaling": _LLAMA3},
    "llama3, theta": {"rope_scaling": _LLAMA3, "rope_theta": 500.0},
    "yarn": {"rope_scaling": _YARN},
    "yarn, betas": {"rope_scaling": {**_YARN, "beta_fast": 16.0, "beta_slow": 2.0}},
    "yarn, mscale": {"rope_scaling": {**_YARN, "mscale": 0.7, "mscale_all_dim": 1.2}},
    "yarn, attention factor": {"rope_scaling": {**_YARN, "attention_factor": 1.3}},
    "yarn, not truncated": {"rope_scaling": {**_YARN, "truncate": False}},
    "yarn, no original length": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "yarn, outer length": {"rope_scaling": _YARN, "original_max_position_embeddings": 8},
    "longrope": {"rope_scaling": _LONGROPE},
    "longrope, factor": {"rope_scaling": {**_LONGROPE, "factor": 8.0}},
    "longrope, attention factor": {"rope_scaling": {**_LONGROPE, "attention_factor": 1.2}},
    "longrope, short text": {"rope_scaling": {**_LONGROPE, "original_max_position_embeddings": 32}},
    "proportional": {"rope_scaling": {"rope_type": "proportional", "partial_rotary_factor": 0.5}},
    "scaling beside parameters": {"rope_scaling": _LINEAR, "rope_parameters": _SAVED},
    "yarn beside parameters": {"rope_scaling": _YARN, "rope_parameters": {**_SAVED, "rope_theta": 500.0}},
    "empty scaling": {"rope_scaling": {}, "rope_parameters": {**_LINEAR, "rope_theta": 1e4}},
    "null scaling": {"rope_scaling": None},
    "partial": {"partial_rotary_factor": 0.5},
    "partial inside": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "unknown type": {"rope_scaling": {"rope_type": "mrope", "mrope_section": [1, 1, 2]}},
    "no factor": {"rope_scaling": {"rope_type": "linear"}},
}
FLAGS = {
    "as it is": {},
    "not causal": {"is_causal": False},
    "causal": {"is_causal": True},
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "attention biases": {"attention_bias": True},
    "MLP biases": {"mlp_bias": True},
    "one key head": {"num_key_value_heads": 1},
    "as many key heads": {"num_key_value_heads": 4},
    "key heads not said": {"num_key_value_heads": None},
    "wide heads": {"head_dim": 12},
    "one layer": {"num_hidden_layers": 1},
    "large epsilon": {"rms_norm_eps": 0.1},
    "large epsilon of a LayerNorm": {"layer_norm_eps": 0.1},
    "window": {"sliding_window": 5},
    "window switched on": {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1},
    "window switched off": {"sliding_window": 5, "use_sliding_window": False},
    "no window": {"sliding_window": None},
    "window, not causal": {"sliding_window": 3, "is_causal": False},
    "types of layers": {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 5},
    "only full attention": {"layer_types": ["full_attention", "full_attention"]},
    "unknown type of layer": {"layer_types": ["linear_attention", "full_attention"]},
    "sequential": {"use_parallel_residual": False},
    "score scale": {"query_pre_attn_scalar": 100},
    "no caps": {"final_logit_softcapping": None, "attn_logit_softcapping": None},
    "caps": {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 2.0},
    "bidirectional": {"use_bidirectional_attention": True},
    "pretraining": {"pretraining_tp": 2, "attention_dropout": 0.3},
    "an entry that nobody knows": {"residual_multiplier": 0.5},
    "an entry about software": {"_attn_implementation_autoset": True, "unsloth_version": "1", "use_cache": False},
    "pruned heads": {"pruned_heads": {"0": [1]}},
    "a decoder": {"is_decoder": True},
    "relative positions": {"position_embedding_type": "relative_key"},
}
VARIANTS = {**ACTIVATIONS, **ROTARY, **FLAGS}

_SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2}
# By model_type: the smallest configuration, and what the family calls its activation.
FAMILIES = {
    "llama": (_GROUPED, "hidden_act"),
    "mistral": (_GROUPED, "hidden_act"),
    "qwen2": (_GROUPED, "hidden_act"),
    "qwen3": ({**_GROUPED, "head_dim": 8}, "hidden_act"),
    "gemma": ({**_GROUPED, "head_dim": 8}, "hidden_act"),
    "gemma2": ({**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8}, "hidden_activation"),
    "gemma3_text": ({**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8}, "hidden_activation"),
    "phi3": (_GROUPED, "hidden_act"),
    "olmo2": (_GROUPED, "hidden_act"),
    "gpt_neox": ({**_SMALL, "rotary_pct": 1.0}, "hidden_act"),
    "opt": (
        {**{k: v for k, v in _SMALL.items() if k != "intermediate_size"}, "ffn_dim": 40, "word_embed_proj_dim": 32},
        "activation_function",
    ),
    "bert": (_SMALL, "hidden_act"),
    "roberta": ({**_SMALL, "pad_token_id": 1}, "hidden_act"),
    "electra": ({**_SMALL, "embedding_size": 16}, "hidden_act"),
    "mpnet": ({**_SMALL, "pad_token_id": 1}, "hidden_act"),
}
ENCODERS = ("bert", "roberta", "electra", "mpnet")
