"""How tokens, or the patches of an image, enter a transformer's residual stream; and the norm and the linear map that
all of it is made of."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from rotsparse._core.types import AnyArray
from rotsparse.layers.norms import Norm, layer_norm
from rotsparse.models.config import TransformerConfig
from rotsparse.models.model import Params


def norm_of(p: Params, config: TransformerConfig) -> Norm:
    """The norm with these parameters (`rotsparse.norms`)."""
    if config.norm == "layer":
        return layer_norm(p["scale"], p.get("bias"), config.norm_eps)
    # A LayerNorm whose stream was centred by folding is an RMSNorm that has a bias.
    return Norm(p["scale"], p.get("bias"), None, len(p["scale"]), config.norm_eps)


def affine(p: Mapping[str, Any], name: str, x):
    """`W x + b`, without `b` where there is none."""
    y = x @ p[f"w_{name}"].T
    return y if f"b_{name}" not in p else y + p[f"b_{name}"]


def embed_tokens(
    params: Params,
    config: TransformerConfig,
    tokens: Integer[AnyArray, "batch tokens"],
    token_types: Integer[AnyArray, "batch tokens"] | None,
    positions: Int[Array, "*batch tokens"],
) -> Float[AnyArray, "batch tokens d"]:
    """The stream in front of the first layer."""
    x = params["embed"][tokens] * config.embedding_scale
    if "positions" in params:
        x = x + params["positions"][_rows_of_positions(config, tokens, positions)]
    if "token_types" in params:
        x = x + params["token_types"][jnp.zeros_like(tokens) if token_types is None else token_types]
    if "embed_norm" in params:
        x = norm_of(params["embed_norm"], config)(x)
    return affine(params["embed_project"], "project", x) if "embed_project" in params else x


def _rows_of_positions(config, tokens, positions):
    if config.position_pad is None:
        return positions + config.position_offset
    real = tokens != config.position_pad
    return jnp.where(real, jnp.cumsum(real, axis=1) - 1 + config.position_offset, config.position_pad)


def embed_image(
    params: Params, config: TransformerConfig, images: Float[AnyArray, "batch channels height width"]
) -> Float[AnyArray, "batch tokens d"]:
    """A class token, and the patches row by row.

    Raises `ValueError` for images of another size.
    """
    assert config.patches is not None, "a model of images"
    wanted = (config.patches.channels, *config.patches.image)
    if images.ndim != 4 or images.shape[1:] != wanted:
        raise ValueError(f"expected images [batch, {', '.join(map(str, wanted))}], got {list(images.shape)}")
    (down, across), (height, width) = config.patches.grid, config.patches.patch
    images = jnp.asarray(images)[:, :, : down * height, : across * width]
    patches = images.reshape(len(images), wanted[0], down, height, across, width)
    patches = patches.transpose(0, 2, 4, 1, 3, 5).reshape(len(images), down * across, -1)
    x = affine(params["patch_embed"], "patch", patches.astype(params["class_token"].dtype))
    first = jnp.broadcast_to(params["class_token"], (len(x), 1, x.shape[-1]))
    return jnp.concatenate([first, x], axis=1) + params["positions"]


def position_bias(params: Params, n: int) -> Float[Array, "heads n n"] | None:
    """What is added to the scores of every layer by how far query and key are apart, where the model has such a table.

    Half of its rows is for keys in front and half for keys behind; in each half, the first half of the rows is for
    single distances, the rest for ever longer ranges up to 128. (Raffel et al., "T5", 2020; as MPNet has it.)
    """
    if "position_bias" not in params:
        return None
    half = len(params["position_bias"]) // 2
    behind = np.arange(n)[:, None] - np.arange(n)[None, :]
    distance, single = abs(behind), half // 2
    # In float32, as the model was trained: at the borders of the ranges the rounding decides.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(single)) / np.float32(math.log(128 / single))
    long = np.minimum(single + np.trunc(ratio * np.float32(half - single)).astype(int), half - 1)
    rows = np.where(distance < single, distance, long) + half * (behind < 0)
    return jnp.asarray(params["position_bias"])[rows].transpose(2, 0, 1)
