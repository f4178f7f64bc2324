"""Fold what folds of a model's sparse inputs: rotations of the heads.

The input of an attention's last matrix is a mix of values, `h_i = Σ_t a_{it} v_t` in head i, and the query heads of a
group share the values v of one key/value head. A rotation of the heads that is block-diagonal, with the same block B
for all heads of a group, so commutes with the mixing: `B v` and `W_o Rᵀ` in place of v and `W_o`, and no rotation is
left when the model runs.
"""

from dataclasses import replace

import numpy as np

from rotsparse._core.modules import replace_fields
from rotsparse._core.types import AnyArray
from rotsparse.models.config import TransformerConfig
from rotsparse.models.model import Model
from rotsparse.sparse.file import SparseInputs, checked_inputs
from rotsparse.sparse.inputs import SparseInput


def fold_heads(model: Model, inputs: SparseInputs) -> tuple[Model, dict[tuple[int, str], SparseInput]]:
    """The same function with block-diagonal rotations of the site `heads` in the weights, and the inputs without them.
    Other rotations stay. Computed in float64 and rounded once. Raises `ValueError` as `write_sparse_inputs` does."""
    layers, left = list(model.params["layers"]), checked_inputs(inputs, model)
    for (layer, site), sparse in left.items():
        blocks = group_blocks(sparse.rotation, model.config) if site == "heads" else None
        if blocks is not None:
            layers[layer] = {**layers[layer], "attn": _folded(layers[layer]["attn"], blocks, model.config)}
            left[layer, site] = replace_fields(sparse, rotation=None)
    return replace(model, params={**model.params, "layers": layers}), left


def exact_heads(model: Model, inputs: SparseInputs) -> dict[tuple[int, str], SparseInput]:
    """The inputs with those rotations that `fold_heads` folds orthogonal to float64, which is how it folds them."""
    exact = dict(inputs)
    for (layer, site), sparse in inputs.items():
        blocks = group_blocks(sparse.rotation, model.config) if site == "heads" else None
        if blocks is not None:
            n, d = model.config.n_heads, model.config.d_head
            r = np.zeros((n, d, n, d))
            r[np.arange(n), :, np.arange(n)] = blocks.repeat(n // model.config.n_kv_heads, axis=0)
            exact[layer, site] = replace_fields(sparse, rotation=r.reshape(n * d, n * d))
    return exact


def group_blocks(r: AnyArray | None, config: TransformerConfig) -> np.ndarray | None:
    """The blocks `[key/value heads, d, d]` of a rotation of all heads, made orthogonal to float64; `None` where it is
    not block-diagonal with one block for a group."""
    if r is None:
        return None
    heads, groups, d = config.n_heads, config.n_kv_heads, config.d_head
    parts = np.asarray(r, np.float64).reshape(heads, d, heads, d).transpose(0, 2, 1, 3)  # [head, head, d, d]
    blocks = parts[np.arange(heads), np.arange(heads)].reshape(groups, -1, d, d)
    first = blocks[:, :1]
    across = parts * (1 - np.eye(heads))[:, :, None, None]
    if np.abs(across).max() > 1e-6 or np.abs(blocks - first).max() > 1e-6:
        return None
    u, _, vt = np.linalg.svd(first[:, 0])
    return u @ vt


def _folded(p, blocks: np.ndarray, config: TransformerConfig):
    groups, d, dtype = config.n_kv_heads, config.d_head, np.asarray(p["w_v"]).dtype
    new = dict(p)
    for name in ("w_v", "b_v"):
        if name in p:
            values = np.asarray(p[name], np.float64).reshape(groups, d, -1)
            new[name] = (blocks @ values).reshape(np.shape(p[name])).astype(dtype)
    o = np.asarray(p["w_o"], np.float64).reshape(config.d_model, groups, -1, d)
    new["w_o"] = np.einsum("mghd,ged->mghe", o, blocks).reshape(np.shape(p["w_o"])).astype(dtype)
    return new
