"""`Model`: the configuration and parameters of a transformer, and what is needed to write them back to their format.

Parameters are nested dictionaries of arrays, matrices `[out, in]`, embeddings `[entries, d_model]`:

    embed, positions?, token_types?, embed_norm?, embed_project?, position_bias?, final_norm?, unembed?,
    layers: [{attn_norm, attn: {w_q, w_k, w_v, w_o, b_*?, q_norm?, k_norm?}, attn_post_norm?,
              mlp_norm, mlp: {w_in, w_out, b_*?} or {w_gate, w_up, w_down, b_*?}, mlp_post_norm?}]

A norm is `{scale, bias?}`. Folding adds, where it must: `attn_skip`, `mlp_skip` in a layer (a matrix on the skip
connection, where two neighbouring spaces got different rotations), `r_in`, `r_out` in an MLP (rotations that are
carried out when the model runs). A model of images has `patch_embed: {w_patch, b_patch}` and `class_token` instead of
`embed`.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Integer

from rotsparse._core.types import AnyArray
from rotsparse.models.config import TransformerConfig

Params = dict[str, Any]
Inputs = Integer[AnyArray, "batch tokens"] | Float[AnyArray, "batch channels height width"]
"""What a model reads: tokens, or images."""


@dataclass(frozen=True)
class Model:
    """A trained transformer.

    `format` is the one it was read from ("huggingface", "gguf" or "llama2c") and `raw` its configuration (of GGUF, as
    Hugging Face would have it); `extra` are tensors of the file that the transformer does not use (BERT's pooler),
    carried along for export; `prefix` is what stands before the names of the transformer's tensors in the file.
    """

    config: TransformerConfig
    params: Params
    format: str = "none"
    raw: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)
    prefix: str | None = None

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding itself."""
        return self.config.head and "unembed" not in self.params

    @property
    def dtype(self) -> np.dtype:
        """The parameters' floating-point type."""
        return np.dtype(jax.tree.leaves(self.params["layers"][0])[0].dtype)

    def astype(self, dtype) -> "Model":
        """The same model in another precision (float64 NumPy arrays need no `jax_enable_x64`)."""
        return replace(self, params=jax.tree.map(lambda a: np.asarray(a, dtype), self.params))

    def n_parameters(self) -> int:
        """How many numbers the model has, a tied head counted once."""
        return sum(a.size for a in jax.tree.leaves(self.params))

    def fingerprint(self) -> str:
        """SHA-256 over the configuration and every parameter: equal models, and only those, have equal ones."""
        digest = hashlib.sha256(repr(self.config).encode())
        for name, array in named(self.params):
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def named(params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Every parameter with its dotted name, e.g. `layers.0.mlp.w_in`, in a fixed order."""
    for path, array in jax.tree_util.tree_flatten_with_path(params)[0]:
        yield jax.tree_util.keystr(path, simple=True, separator="."), np.asarray(array)


def nested(flat: Mapping[str, np.ndarray], n_layers: int) -> Params:
    """The inverse of `named`."""
    params: Params = {"layers": [{} for _ in range(n_layers)]}
    for name, array in flat.items():
        node: Any = params
        *parents, last = name.split(".")
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        node[last] = array
    return params


def expected_shape(config: TransformerConfig, name: str) -> tuple[int | None, ...]:
    """The shape a parameter must have; `None` where the configuration leaves the size open."""
    c = config
    queries, keys = c.n_heads * c.d_head, c.n_kv_heads * c.d_head
    table: dict[str, tuple[int | None, ...]] = {
        "embed": (c.vocab_size, c.d_embedding or c.d_model),
        "unembed": (c.vocab_size, c.d_model),
        "positions": (c.max_positions + c.position_offset, c.d_embedding or c.d_model),
        "token_types": (None, c.d_embedding or c.d_model),
        "position_bias": (c.position_buckets, c.n_heads),
        "class_token": (c.d_model,),
        "w_project": (c.d_model, c.d_embedding),
        "b_project": (c.d_model,),
        "w_patch": (c.d_model, c.patches.pixels if c.patches else None),
        "b_patch": (c.d_model,),
        "w_q": (queries, c.d_model),
        "w_k": (keys, c.d_model),
        "w_v": (keys, c.d_model),
        "w_o": (c.d_model, queries),
        "b_q": (queries,),
        "b_k": (keys,),
        "b_v": (keys,),
        "b_o": (c.d_model,),
        "w_in": (c.d_hidden, c.d_model),
        "b_in": (c.d_hidden,),
        "w_gate": (c.d_hidden, c.d_model),
        "b_gate": (c.d_hidden,),
        "w_up": (c.d_hidden, c.d_model),
        "b_up": (c.d_hidden,),
        "w_out": (c.d_model, c.d_hidden),
        "b_out": (c.d_model,),
        "w_down": (c.d_model, c.d_hidden),
        "b_down": (c.d_model,),
        "attn_skip": (c.d_model, c.d_model),
        "mlp_skip": (c.d_model, c.d_model),
        "r_in": (c.d_model, c.d_model),
        "r_out": (c.d_model, c.d_model),
    }
    parts = name.split(".")
    if parts[-1] in ("scale", "bias"):
        norm = parts[-2]
        if norm in ("q_norm", "k_norm"):
            return ({"q_norm": queries, "k_norm": keys}[norm] if c.wide_qk_norm else c.d_head,)
        return (c.d_embedding or c.d_model,) if norm == "embed_norm" else (c.d_model,)
    return table[parts[-1]]
