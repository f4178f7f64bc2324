"""A model's `config.json`, read so that no entry is misunderstood.

Every entry is understood, known to be harmless, or refused by its name: an entry that nobody knows here may well
change what the model computes.
"""

import math
from collections.abc import Mapping
from typing import Any

from rotsparse.models.config import MAX_LAYERS
from rotsparse.models.families.family import Family

Raw = Mapping[str, Any]

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python": "gelu",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "linear": "identity",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "squared_relu",
    "sigmoid": "sigmoid",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
_UNDERSTOOD = frozenset(
    "model_type architectures hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size "
    "max_position_embeddings hidden_act tie_word_embeddings".split()
)
# Entries that are right only with these values, in every family.
_ONLY: dict[str, tuple] = {
    "add_cross_attention": (False,),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "rope_interleaved": (False,),
    "tie_encoder_decoder": (False,),
    "use_mrope": (False,),
}
# Entries about training, generating text, other heads, and the software around the model.
_HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _experts_implementation _experts_implementation_internal _flash_attn_2_enabled _name_or_path _num_labels
    attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token_id cache_implementation
    chunk_size_feed_forward classifier_dropout cls_token_id cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing
    id2label initializer_range is_llama_config label2id language length_penalty license mask_token_id max_length
    max_new_tokens min_length model_max_length name_or_path no_repeat_ngram_size num_beam_groups num_beams num_labels
    num_return_sequences output_attentions output_hidden_states output_past output_scores pad_token_id prefix
    problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    summary_activation summary_first_dropout summary_last_dropout summary_proj_to_labels summary_type summary_use_proj
    suppress_tokens task_specific_params temperature tf_legacy_loss tokenizer_class tokenizer_name top_k top_p
    torch_dtype torchscript transformers.js_config transformers_version typical_p unk_token_id unsloth_fixed
    unsloth_version use_bfloat16 use_cache use_return_dict
    """.split()
)


class Settings:
    """The entries of a `config.json` under their usual names, with the family's defaults.

    Raises `ValueError` for an entry that is not known, or has a value that is not.
    """

    def __init__(self, raw: Raw, family: Family):
        self.kind = str(raw["model_type"])
        self.raw = self._usual(raw, family)
        self._defaults = family.defaults
        self._words = {usual: word for word, usual in family.spelled.items()}
        self._check_known(family)

    def __contains__(self, key: str) -> bool:
        """Whether config.json itself says anything about it."""
        return self.raw.get(key) is not None

    def optional(self, key: str) -> Any:
        """The entry, which may be null."""
        return self.raw[key] if key in self.raw else self._defaults.get(key)

    def need(self, key: str) -> Any:
        """The entry, which may not be null: what transformers makes of null is hardly ever the usual value."""
        value = self.optional(key)
        if value is None:
            missing = "config.json has no" if key not in self.raw else "config.json has null for"
            raise ValueError(
                f"{missing} {self._words.get(key, key)!r}: is it the configuration of a {self.kind} model?"
            )
        return value

    def integer(self, key: str, least: int = 1) -> int:
        return self._integer(key, self.need(key), least)

    def layers(self) -> int:
        """How many layers there are: few enough to make a list of something for each."""
        n = self.integer("num_hidden_layers")
        if n > MAX_LAYERS:
            self.refuse("num_hidden_layers", f"at most {MAX_LAYERS} layers are")
        return n

    def optional_integer(self, key: str, least: int = 1) -> int | None:
        value = self.optional(key)
        return None if value is None else self._integer(key, value, least)

    def number(self, key: str) -> float:
        return positive(self._words.get(key, key), self.need(key))

    def optional_number(self, key: str) -> float | None:
        value = self.optional(key)
        return None if value is None else positive(self._words.get(key, key), value)

    def on(self, key: str) -> bool:
        value = self.need(key)
        if not isinstance(value, bool):
            raise ValueError(f"config.json: {self._words.get(key, key)} should be true or false, got {_short(value)}")
        return value

    def activation(self, key: str = "hidden_act") -> str:
        name = self.need(key)
        if not isinstance(name, str) or name not in _ACTIVATIONS:
            raise ValueError(
                f"config.json: unknown {self._words.get(key, key)} {_short(name)}: expected one of "
                f"{', '.join(_ACTIVATIONS)}"
            )
        return _ACTIVATIONS[name]

    def refuse(self, key: str, sentence: str) -> None:
        """Raise `ValueError` about an entry."""
        word = self._words.get(key, key)
        raise ValueError(f"config.json: {word} = {_short(self.optional(key))} is not supported: {sentence}")

    def sizes(self) -> dict[str, Any]:
        """The fields of `TransformerConfig` that every family reads the same."""
        heads, d_model = self.integer("num_attention_heads"), self.integer("hidden_size")
        return {
            "architecture": self.kind,
            "n_layers": self.layers(),
            "d_model": d_model,
            "d_hidden": self.integer("intermediate_size"),
            "n_heads": heads,
            "n_kv_heads": self.optional_integer("num_key_value_heads") or heads,
            "d_head": self.optional_integer("head_dim") or max(1, d_model // heads),
            "vocab_size": self.integer("vocab_size"),
            "max_positions": self.integer("max_position_embeddings"),
            "activation": self.activation(),
        }

    def _integer(self, key, value, least):
        if type(value) is not int or not least <= value < 1 << 40:
            raise ValueError(
                f"config.json: {self._words.get(key, key)} should be a whole number from {least} on, got "
                f"{_short(value)}"
            )
        return value

    def _usual(self, raw: Raw, family: Family) -> dict[str, Any]:
        usual = dict(raw)
        for word, name in family.spelled.items():
            counts = word in raw or name not in family.also.split()
            value = raw.get(word, family.defaults.get(name)) if counts else raw.get(name)
            if raw.get(name) is not None and raw[name] != value:
                raise ValueError(
                    f"config.json: {name} is {_short(raw[name])}, but a {self.kind} model goes by {word}, which is "
                    f"{_short(value)}"
                )
            usual.pop(word, None)
            if word in raw or name in raw:
                usual[name] = value
        return usual

    def _check_known(self, family: Family) -> None:
        quantised = self.raw.get("quantization_config", self.raw.get("compression_config"))
        if quantised is not None:
            how = quantised.get("quant_method") if isinstance(quantised, Mapping) else None
            raise ValueError(
                f"the model is quantised ({how or 'config.json has a quantization_config'}): load the original "
                "checkpoint, or save a dequantised one (model.dequantize() in transformers)"
            )
        harmless = _HARMLESS | set(family.harmless.split())
        known = _UNDERSTOOD | set(family.keys.split()) | set(family.flags())
        for key, value in self.raw.items():
            only = family.only.get(key, _ONLY.get(key))
            off = value is None and (only is None or not all(only))  # as good as false
            if off or key in known or (key in harmless and key not in family.only):
                continue
            if only is None:
                raise ValueError(
                    f"config.json: {key} = {_short(value)} is not known for a {self.kind} model, and may change what "
                    "it computes: remove it if it does not"
                )
            if not any(type(value) is type(allowed) and value == allowed for allowed in only):
                raise ValueError(
                    f"config.json: {key} = {_short(value)} is not supported, only "
                    f"{' or '.join(repr(allowed) for allowed in only)} is"
                )


def positive(name: str, value: Any) -> float:
    """A finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf or value > 1e300:
        raise ValueError(f"config.json: {name} should be a number above 0, got {_short(value)}")
    return float(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."
