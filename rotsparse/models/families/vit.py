"""ViT: an encoder whose tokens are patches of an image behind a class token."""

from typing import Any

import numpy as np

from rotsparse.models.config import Patches
from rotsparse.models.families.family import Entry, Family, layer_norm, linear
from rotsparse.models.families.settings import Settings


def _vit(s: Settings) -> dict[str, Any]:
    patches = Patches(s.integer("num_channels"), _pair(s, "image_size"), _pair(s, "patch_size"))
    down, across = patches.grid
    s.raw["vocab_size"], s.raw["max_position_embeddings"] = 1, 1 + down * across
    return {
        **s.sizes(),
        "vocab_size": 0,
        "gated": False,
        "norm": "layer",
        "norm_eps": s.number("layer_norm_eps"),
        "causal": False,
        "head": False,
        "patches": patches,
    }


def _pair(s: Settings, key: str) -> tuple[int, int]:
    """A height and a width, or one number for both."""
    size = s.need(key)
    sizes = size if isinstance(size, list) else [size, size]
    if len(sizes) != 2 or not all(type(n) is int and 1 <= n < 1 << 20 for n in sizes):
        s.refuse(key, "expected a height and a width in pixels")
    return sizes[0], sizes[1]


def _kernel(config, kernel: np.ndarray) -> tuple[np.ndarray, ...]:
    """The convolution over patches as a matrix `[d_model, pixels]`."""
    channels, (down, across) = config.patches.channels, config.patches.patch
    if kernel.shape[1:] != (channels, down, across):
        raise ValueError("another patch")
    return (kernel.reshape(len(kernel), -1),)


def _as_kernel(config, matrix: np.ndarray) -> np.ndarray:
    return matrix.reshape(len(matrix), config.patches.channels, *config.patches.patch)


_LAYER = "encoder.layer.*"
_WORDS = {"q": "query", "k": "key", "v": "value"}
_BODY: tuple[Entry, ...] = (
    Entry("embeddings.patch_embeddings.projection.weight", ("patch_embed.w_patch",), _kernel, _as_kernel),
    Entry("embeddings.patch_embeddings.projection.bias", ("patch_embed.b_patch",)),
    Entry("embeddings.cls_token", ("class_token",), lambda c, a: (a.reshape(-1),), lambda c, a: a.reshape(1, 1, -1)),
    Entry("embeddings.position_embeddings", ("positions",), lambda c, a: tuple(a), lambda c, a: a[None]),
    *layer_norm("layernorm", "final_norm"),
    *(
        e
        for x, word in _WORDS.items()
        for e in linear(f"{_LAYER}.attention.attention.{word}", f"layers.*.attn.{x}", bias="qkv_bias")
    ),
    *linear(f"{_LAYER}.attention.output.dense", "layers.*.attn.o"),
    *linear(f"{_LAYER}.intermediate.dense", "layers.*.mlp.in"),
    *linear(f"{_LAYER}.output.dense", "layers.*.mlp.out"),
    *layer_norm(f"{_LAYER}.layernorm_before", "layers.*.attn_norm"),
    *layer_norm(f"{_LAYER}.layernorm_after", "layers.*.mlp_norm"),
)

FAMILIES = {
    "vit": Family(
        _BODY,
        "vit.",
        _vit,
        head=None,
        keys="layer_norm_eps image_size patch_size num_channels",
        harmless="hidden_dropout_prob attention_probs_dropout_prob encoder_stride pooler_output_size pooler_act",
        carried=r"^(classifier|decoder)\.|(^|\.)pooler\.|embeddings\.mask_token$",
        defaults={
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
            "image_size": 224,
            "patch_size": 16,
            "num_channels": 3,
            "qkv_bias": True,
        },
        renames=(
            (r"^(vit\.)?layers\.", r"\1encoder.layer."),
            (r"attention\.(q|k|v)_proj\.", lambda m: f"attention.attention.{_WORDS[m[1]]}."),
            (r"attention\.o_proj\.", "attention.output.dense."),
            (r"mlp\.fc1\.", "intermediate.dense."),
            (r"mlp\.fc2\.", "output.dense."),
        ),
    )
}
