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
    "theta in the scaling": {"rope_theta": 50.0, "rope_scaling": {**_LINEAR, "rope_theta": 500.0}},
    "two words for the type": {"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 4.0}},
    "su": {"rope_scaling": {**_LONGROPE, "rope_type": "su"}},
    "sections of images": {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
    "for each type of layer": {"rope_parameters": {"full_attention": _LINEAR, "sliding_attention": _SAVED}},
    "partial scaled": {"partial_rotary_factor": 0.5, "rope_scaling": _YARN},
    "partial twice": {"partial_rotary_factor": 0.25, "rope_parameters": {**_SAVED, "partial_rotary_factor": 0.5}},
    "partial beyond": {"partial_rotary_factor": 2.0},
    "a factor below 1": {"rope_scaling": {"rope_type": "linear", "factor": 0.5}},
    "a factor in words": {"rope_scaling": {"rope_type": "linear", "factor": "4.0"}},
    "yarn of version 5": {"rope_parameters": {**_YARN, "rope_theta": 500.0}},
    "yarn, one mscale": {"rope_scaling": {**_YARN, "mscale": 0.7}},
    "yarn, betas swapped": {"rope_scaling": {**_YARN, "beta_fast": 1.0, "beta_slow": 32.0}},
    "yarn, factor 1": {"rope_scaling": {**_YARN, "factor": 1.0}},
    "longrope, outer length": {"rope_scaling": _LONGROPE, "original_max_position_embeddings": 8},
    "longrope, short list": {"rope_scaling": {**_LONGROPE, "short_factor": [1.0]}},
    "dynamic, original length": {
        "rope_scaling": {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 8},
        "max_position_embeddings": 16,
    },
    "dynamic, alpha": {"rope_scaling": {"rope_type": "dynamic", "alpha": 1000.0}},
    "llama3, factors swapped": {"rope_scaling": {**_LLAMA3, "low_freq_factor": 4.0, "high_freq_factor": 1.0}},
    "default beside linear": {
        "rope_scaling": {"rope_type": "default"},
        "rope_parameters": {**_LINEAR, "rope_theta": 9.0},
    },
    "only a factor": {"rope_scaling": {"factor": 4.0}},
    "a share in two words": {"rotary_pct": 0.5, "partial_rotary_factor": 0.25},
    "local theta": {"rope_local_base_freq": 500.0},
    "layers without": {"no_rope_layers": [1, 0]},
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
    "window of one": {"sliding_window": 1},
    "window of nothing": {"sliding_window": 0},
    "pattern of windows": {"sliding_window": 5, "sliding_window_pattern": 2},
    "hidden pattern of windows": {"sliding_window": 5, "_sliding_window_pattern": 2},
    "too few types of layers": {"layer_types": ["full_attention"]},
    "unscaled scores": {"scale_attn_weights": False},
    "scores scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "scores scaled otherwise": {"attention_multiplier": 0.5},
    "biases of queries": {"qkv_bias": True},
    "no biases": {"enable_bias": False, "attention_bias": False},
    "clipped queries": {"clip_qkv": 1.0},
    "no final norm": {"_remove_final_layer_norm": True},
    "norm behind": {"do_layer_norm_before": False},
    "narrow embeddings": {"embedding_size": 8},
    "embeddings as wide": {"embedding_size": 32},
    "one type of tokens": {"type_vocab_size": 1},
    "another pad": {"pad_token_id": 3},
    "fewer buckets": {"relative_attention_num_buckets": 8},
    "local layers": {"attention_types": [[["local", "global"], 1]], "window_size": 5},
    "other layers than types": {"attention_layers": ["local", "global"]},
    "experts": {"num_local_experts": 2},
    "quantised": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "half precision": {"torch_dtype": "float16"},
}
# Other families' words, and words of one's own under a usual name.
WORDS = {
    "hidden_act": {"hidden_act": "relu"},
    "hidden_activation": {"hidden_activation": "relu"},
    "activation_function": {"activation_function": "relu"},
    "activation": {"activation": "relu"},
    "Gemma's gelu": {"hidden_act": "gelu", "hidden_activation": None},
    "layer_norm_eps": {"layer_norm_eps": 1.0},
    "layer_norm_epsilon": {"layer_norm_epsilon": 0.1},
    "norm_eps": {"norm_eps": 0.1},
    "intermediate_size": {"intermediate_size": 48},
    "ffn_dim": {"ffn_dim": 48},
    "n_inner": {"n_inner": 48},
    "n_positions": {"n_positions": 32},
}
_NULLS = (
    "is_causal hidden_act head_dim num_key_value_heads rms_norm_eps layer_norm_eps attention_bias tie_word_embeddings "
    "sliding_window use_sliding_window layer_types rope_theta rope_parameters pad_token_id position_embedding_type "
    "do_layer_norm_before scale_attn_weights use_parallel_residual use_bidirectional_attention type_vocab_size"
).split()
NULLS = {f"null {name}": {name: None} for name in _NULLS}
VARIANTS = {**ACTIVATIONS, **ROTARY, **FLAGS, **WORDS, **NULLS}

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
    "gpt2": (
        {
            **{k: v for k, v in _SMALL.items() if k not in ("intermediate_size", "max_position_embeddings")},
            "n_positions": 64,
            "n_inner": 40,
        },
        "activation_function",
    ),
    "gpt_neo": (
        {**_SMALL, "attention_types": [[["global", "local"], 1]], "window_size": 5},
        "activation_function",
    ),
    "bert": (_SMALL, "hidden_act"),
    "roberta": ({**_SMALL, "pad_token_id": 1}, "hidden_act"),
    "xlm-roberta": ({**_SMALL, "pad_token_id": 1}, "hidden_act"),
    "camembert": ({**_SMALL, "pad_token_id": 1}, "hidden_act"),
    "distilbert": (
        {**{k: v for k, v in _SMALL.items() if k != "intermediate_size"}, "hidden_dim": 40},
        "activation",
    ),
    "electra": ({**_SMALL, "embedding_size": 16}, "hidden_act"),
    "mpnet": ({**_SMALL, "pad_token_id": 1}, "hidden_act"),
    "vit": (
        {
            **{k: v for k, v in _SMALL.items() if k not in ("vocab_size", "max_position_embeddings")},
            "image_size": 8,
            "patch_size": 4,
        },
        "hidden_act",
    ),
}
ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "mpnet", "vit")
