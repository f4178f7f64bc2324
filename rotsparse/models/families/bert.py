"""Encoders of BERT's kind: every position looks at every other, norms stand in the stream (post-LN)."""

from dataclasses import replace
from typing import Any

from rotsparse.models.families.family import Entry, Family, layer_norm, linear, tensor
from rotsparse.models.families.settings import Settings

_HARMLESS = (
    "hidden_dropout_prob attention_probs_dropout_prob dropout attention_dropout directionality pooler_fc_size "
    "pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type type_vocab_size qa_dropout "
    "seq_classif_dropout sinusoidal_pos_embds tie_weights_ gradient_checkpointing"
)
_CARRIED = (
    r"^(cls|classifier|qa_outputs|lm_head|vocab_\w+|pre_classifier|discriminator_predictions|generator_predictions|"
    r"generator_lm_head|sequence_summary)\.|(^|\.)pooler\."
)
_ONLY = {"position_embedding_type": ("absolute",), "use_bidirectional_attention": (True,)}


# --- config.json --------------------------------------------------------------------------------------------------


def _bert(s: Settings) -> dict[str, Any]:
    return {
        **s.sizes(),
        "gated": False,
        "norm": "layer",
        "norm_eps": s.number("layer_norm_eps"),
        "placement": "post",
        "causal": False,
        "head": False,
    }


def _roberta(s: Settings) -> dict[str, Any]:
    return _counted(_bert(s), s.integer("pad_token_id", least=0))


def _mpnet(s: Settings) -> dict[str, Any]:
    # MPNet's code has the padding's number and that of the ranges of distances fixed, whatever its configuration says.
    return {**_counted(_bert(s), 1), "position_buckets": 32}


def _counted(settings: dict[str, Any], pad: int) -> dict[str, Any]:
    """Positions are counted from the padding's number + 1 on: so many fewer tokens fit."""
    return {
        **settings,
        "position_pad": pad,
        "position_offset": pad + 1,
        "max_positions": settings["max_positions"] - pad - 1,
    }


def _electra(s: Settings) -> dict[str, Any]:
    width = s.integer("embedding_size")
    return {**_bert(s), "d_embedding": 0 if width == s.integer("hidden_size") else width}


# --- tensors ------------------------------------------------------------------------------------------------------


def _embeddings(*tables: str) -> list[Entry]:
    ours = {"word": "embed", "position": "positions", "token_type": "token_types"}
    entries = [e for t in tables for e in tensor(f"embeddings.{t}_embeddings.weight", ours[t])]
    return [*entries, *layer_norm("embeddings.LayerNorm", "embed_norm")]


def _block(layer: str, names: dict[str, str]) -> list[Entry]:
    """A layer: `q`, `k`, `v`, `o`, `in`, `out`, and the two norms, by their names in it."""
    linears = {"q": "attn.q", "k": "attn.k", "v": "attn.v", "o": "attn.o", "in": "mlp.in", "out": "mlp.out"}
    entries = [e for x, ours in linears.items() for e in linear(f"{layer}.{names[x]}", f"layers.*.{ours}")]
    norms = {"attn_norm": names["attn_norm"], "mlp_norm": names["mlp_norm"]}
    return [*entries, *(e for ours, x in norms.items() for e in layer_norm(f"{layer}.{x}", f"layers.*.{ours}"))]


_BERT_NAMES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "attn_norm": "attention.output.LayerNorm",
    "in": "intermediate.dense",
    "out": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_DISTILBERT_NAMES = {
    "q": "attention.q_lin",
    "k": "attention.k_lin",
    "v": "attention.v_lin",
    "o": "attention.out_lin",
    "attn_norm": "sa_layer_norm",
    "in": "ffn.lin1",
    "out": "ffn.lin2",
    "mlp_norm": "output_layer_norm",
}
_MPNET_NAMES = {
    **{x: f"attention.attn.{x}" for x in "qkvo"},
    "attn_norm": "attention.LayerNorm",
    "in": "intermediate.dense",
    "out": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_BERT_LAYERS = _block("encoder.layer.*", _BERT_NAMES)
_BERT: tuple[Entry, ...] = (*_embeddings("word", "position", "token_type"), *_BERT_LAYERS)
_ELECTRA: tuple[Entry, ...] = (
    *_BERT,
    *(
        replace(entry, exists=lambda c: c.d_embedding > 0)
        for entry in linear("embeddings_project", "embed_project.project")
    ),
)
_DISTILBERT: tuple[Entry, ...] = (
    *_embeddings("word", "position"),
    *_block("transformer.layer.*", _DISTILBERT_NAMES),
)
_MPNET: tuple[Entry, ...] = (
    *_embeddings("word", "position"),
    *tensor("encoder.relative_attention_bias.weight", "position_bias"),
    *_block("encoder.layer.*", _MPNET_NAMES),
)

# --- the table ----------------------------------------------------------------------------------------------------

_DEFAULTS = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "vocab_size": 30522,
    "pad_token_id": 1,
}


def _encoder(body: tuple[Entry, ...], prefix: str, settings, **rest: Any) -> Family:
    return Family(
        body,
        prefix,
        settings,
        head=None,
        harmless=_HARMLESS,
        ignored=r"embeddings\.position_ids$",
        carried=_CARRIED,
        **{"keys": "layer_norm_eps", "defaults": _DEFAULTS, "only": _ONLY, **rest},
    )


FAMILIES = {
    "bert": _encoder(_BERT, "bert.", _bert),
    "roberta": _encoder(_BERT, "roberta.", _roberta),
    "xlm-roberta": _encoder(_BERT, "roberta.", _roberta),
    "camembert": _encoder(_BERT, "roberta.", _roberta),
    "distilbert": _encoder(
        _DISTILBERT,
        "distilbert.",
        _bert,
        spelled={
            "dim": "hidden_size",
            "n_layers": "num_hidden_layers",
            "n_heads": "num_attention_heads",
            "hidden_dim": "intermediate_size",
            "activation": "hidden_act",
        },
        also="hidden_size num_hidden_layers num_attention_heads",
        keys="",
    ),
    "electra": _encoder(
        _ELECTRA,
        "electra.",
        _electra,
        keys="layer_norm_eps embedding_size",
        defaults={**_DEFAULTS, "embedding_size": 128},
    ),
    "mpnet": _encoder(
        _MPNET,
        "mpnet.",
        _mpnet,
        only={**_ONLY, "relative_attention_num_buckets": (32,)},
    ),
}
