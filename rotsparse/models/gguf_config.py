"""What a GGUF file's metadata says about the model, as the `config.json` that Hugging Face would have.

Every entry under the architecture's name is understood, harmless, or refused by its name, as those of `config.json`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from rotsparse.models.gguf_file import GgufFile

Raw = dict[str, Any]

# In each architecture: an entry of the metadata and its name in config.json.
_COMMON = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.head_count": "num_attention_heads",
}
_GROUPED = {
    **_COMMON,
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_HEADS = {**_GROUPED, "attention.key_length": "head_dim"}
_CAPS = {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_LAYER_NORM = {**_COMMON, "attention.layer_norm_epsilon": "layer_norm_eps"}
_ROPE = "rope.dimension_count rope.scaling.type rope.scaling.factor rope.scaling.original_context_length"
_HARMLESS = frozenset("vocab_size attention.value_length rope.scaling.finetuned pooling_type".split())
_PLAIN = frozenset("none None".split())


class Metadata:
    """The entries of one architecture."""

    def __init__(self, file: GgufFile):
        self.file = file
        self.architecture = file.metadata.get("general.architecture")
        self._prefix = f"{self.architecture}."
        self.entries = {
            key.removeprefix(self._prefix): value
            for key, value in file.metadata.items()
            if key.startswith(self._prefix)
        }

    def __getitem__(self, key: str) -> Any:
        if key not in self.entries:
            raise ValueError(f"{self.file.path} does not say {self._prefix}{key}, which is needed")
        value = self.entries[key]
        if isinstance(value, list):  # one for each layer
            if not value or any(one != value[0] for one in value):
                self.refuse(key, "layers that differ in it are not supported")
            value = value[0]
        return value

    def get(self, key: str, usual: Any = None) -> Any:
        return self[key] if key in self.entries else usual

    def number(self, key: str) -> float:
        value = self[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
            self.refuse(key, "expected a number above 0")
        return value

    def refuse(self, key: str, sentence: str) -> None:
        """Raise `ValueError` about an entry."""
        shown = repr(self.entries.get(key))
        shown = shown if len(shown) < 80 else shown[:77] + "..."
        raise ValueError(f"{self.file.path}: {self._prefix}{key} = {shown} is not supported: {sentence}")

    def translated(self, names: Mapping[str, str], also: str = "") -> Raw:
        """The entries under the names of config.json. Raises `ValueError` for one that nobody knows."""
        known = names.keys() | _HARMLESS | set(also.split())
        for key in self.entries.keys() - known:
            self.refuse(key, f"it is not known for {self.architecture}, and may change what the model computes")
        return {name: self[key] for key, name in names.items() if key in self.entries}


def _scaling(m: Metadata) -> Raw:
    """`rope_scaling` as Hugging Face has it, empty without scaling."""
    factors = _factors(m, "rope_freqs.weight")
    kind = m.get("rope.scaling.type", "none")
    if kind in _PLAIN and factors is None:
        return {}
    context = m.get("rope.scaling.original_context_length", m["context_length"])
    if factors is not None:
        if kind not in _PLAIN:
            m.refuse("rope.scaling.type", "there is a tensor rope_freqs.weight as well")
        # Llama 3.1's scaling, as a divisor for every pair of coordinates.
        return {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": 1.0,
            "original_max_position_embeddings": context,
        }
    if kind not in ("linear", "yarn"):
        m.refuse("rope.scaling.type", "expected none, linear or yarn")
    scaling: Raw = {"rope_type": kind, "factor": m.number("rope.scaling.factor")}
    return scaling | ({"original_max_position_embeddings": context} if kind == "yarn" else {})


def _factors(m: Metadata, name: str) -> list[float] | None:
    return [float(x) for x in m.file.floats(name).ravel()] if name in m.file.tensors else None


def _whole_heads(m: Metadata, raw: Raw) -> Raw:
    """Refuse heads of which only a part turns, in architectures where all of it does."""
    d_head = raw.get("head_dim") or raw["hidden_size"] // max(1, raw["num_attention_heads"])
    if m.get("rope.dimension_count", d_head) != d_head:
        m.refuse("rope.dimension_count", f"heads of {d_head} turn as a whole")
    return raw | ({"rope_scaling": scaling} if (scaling := _scaling(m)) else {})


def _llama(m: Metadata) -> Raw:
    if m.get("expert_count", 0):
        m.refuse("expert_count", "mixtures of experts are not")
    raw = _whole_heads(m, m.translated(_HEADS, f"{_ROPE} attention.sliding_window expert_count expert_used_count"))
    if (window := m.get("attention.sliding_window")) is not None:
        return raw | {"model_type": "mistral", "sliding_window": window}
    return raw | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def _qwen(m: Metadata) -> Raw:
    return _whole_heads(m, m.translated(_HEADS, _ROPE)) | {"model_type": m.architecture, "use_sliding_window": False}


def _gemma(m: Metadata) -> Raw:
    return _whole_heads(m, m.translated(_HEADS, _ROPE)) | {"model_type": "gemma"}


def _gemma2(m: Metadata) -> Raw:
    raw = _whole_heads(m, m.translated(_HEADS | _CAPS, _ROPE))
    # The file does not say it: in the largest model (46 layers) scores are scaled by the stream's width.
    return raw | {"model_type": "gemma2", "query_pre_attn_scalar": _query_scale(raw, largest=46)}


def _gemma3(m: Metadata) -> Raw:
    raw = _whole_heads(m, m.translated(_HEADS | _CAPS, f"{_ROPE} rope.freq_base_swa attention.sliding_window_pattern"))
    raw["rope_local_base_freq"] = m.get("rope.freq_base_swa", 10000.0)
    raw["sliding_window_pattern"] = m.get("attention.sliding_window_pattern", 6)
    return raw | {"model_type": "gemma3_text", "query_pre_attn_scalar": _query_scale(raw, largest=62)}


def _query_scale(raw: Raw, largest: int) -> int:
    if raw["num_hidden_layers"] == largest:
        return raw["hidden_size"] // raw["num_attention_heads"]
    return raw.get("head_dim", 256)


def _phi3(m: Metadata) -> Raw:
    raw = m.translated({**_GROUPED, "attention.sliding_window": "sliding_window"}, f"{_ROPE} rope.scaling.attn_factor")
    raw["original_max_position_embeddings"] = m.get("rope.scaling.original_context_length", m["context_length"])
    raw["sliding_window"] = raw.get("sliding_window") or None
    d_head = raw["hidden_size"] // max(1, raw["num_attention_heads"])
    raw["partial_rotary_factor"] = m.get("rope.dimension_count", d_head) / max(1, d_head)
    short, long = _factors(m, "rope_factors_short.weight"), _factors(m, "rope_factors_long.weight")
    if short is not None and long is not None:
        raw["rope_scaling"] = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        if "rope.scaling.attn_factor" in m.entries:
            raw["rope_scaling"]["attention_factor"] = m.number("rope.scaling.attn_factor")
    elif m.get("rope.scaling.type", "none") not in _PLAIN:
        m.refuse("rope.scaling.type", "its factors are missing")
    return raw | {"model_type": "phi3"}


def _olmo2(m: Metadata) -> Raw:
    return _whole_heads(m, m.translated(_GROUPED, _ROPE)) | {"model_type": "olmo2"}


def _gpt2(m: Metadata) -> Raw:
    # GPT-2's own words for these, the only ones that transformers takes.
    words = {"feed_forward_length": "n_inner", "attention.layer_norm_epsilon": "layer_norm_epsilon"}
    return m.translated(_LAYER_NORM | words) | {"model_type": "gpt2", "activation_function": "gelu_new"}


def _gptneox(m: Metadata) -> Raw:
    raw = m.translated(
        {**_LAYER_NORM, "use_parallel_residual": "use_parallel_residual", "rope.freq_base": "rotary_emb_base"}, _ROPE
    )
    d_head = raw["hidden_size"] // max(1, raw["num_attention_heads"])
    raw["rotary_pct"] = m.get("rope.dimension_count", d_head) / max(1, d_head)
    if scaling := _scaling(m):
        raw["rope_scaling"] = scaling
    return raw | {"model_type": "gpt_neox"}


def _bert(m: Metadata) -> Raw:
    raw = m.translated(_LAYER_NORM, "attention.causal token_type_count")
    if m.get("attention.causal", False):
        m.refuse("attention.causal", "an encoder sees everything")
    return raw | {"model_type": "bert", "architectures": ["BertModel"]}


ARCHITECTURES: dict[str, Callable[[Metadata], Raw]] = {
    "llama": _llama,
    "qwen2": _qwen,
    "qwen3": _qwen,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "olmo2": _olmo2,
    "gpt2": _gpt2,
    "gptneox": _gptneox,
    "bert": _bert,
}


def huggingface_config(file: GgufFile) -> Raw:
    """The `config.json` of the model in a GGUF file.

    Raises `ValueError` if the architecture, or an entry about it, is missing or unknown.
    """
    metadata = Metadata(file)
    if metadata.architecture not in ARCHITECTURES:
        raise ValueError(
            f"{file.path} has the architecture {metadata.architecture!r}: expected one of "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path} has no tensor 'token_embd.weight': is it a part of a model, or an adapter?")
    if (parts := file.metadata.get("split.count", 1)) not in (0, 1):
        raise ValueError(f"{file.path} is one of {parts} parts: merge them first (llama-gguf-split --merge)")
    raw = ARCHITECTURES[str(metadata.architecture)](metadata)
    for side in ("bos", "eos", "padding"):
        if (token := file.metadata.get(f"tokenizer.ggml.{side}_token_id")) is not None:
            raw[f"{'pad' if side == 'padding' else side}_token_id"] = token
    raw["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    raw["tie_word_embeddings"] = "output.weight" not in file.tensors
    return raw
