"""Fold what folds of a model's sparse inputs: rotations of the heads.

The input of an attention's last matrix is a mix of values, `h_i = Σ_t a_{it} v_t` in head i, and the query heads of a
group share the values v of one key/value head. A rotation of the heads that is block-diagonal, with the same block B
for all heads of a group, so commutes with the mixing: `B v` and `W_o R⁻¹` in place of v and `W_o`, and no rotation is
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
        blocks = group_blocks(sparse, model.config) if site == "heads" else None
        if blocks is not None:
            layers[layer] = {**layers[layer], "attn": _folded(layers[layer]["attn"], *blocks, model.config)}
            left[layer, site] = replace_fields(sparse, rotation=None, inverse=None)
    return replace(model, params={**model.params, "layers": layers}), left


def exact_heads(model: Model, inputs: SparseInputs) -> dict[tuple[int, str], SparseInput]:
    """The inputs with the rotations that `fold_heads` folds, and their inverses, exact in float64: so it folds them."""
    exact = dict(inputs)
    for (layer, site), sparse in inputs.items():
        blocks = group_blocks(sparse, model.config) if site == "heads" else None
        if blocks is not None:
            rotation, inverse = (_of_all_heads(of, model.config) for of in blocks)
            inverse = None if sparse.inverse is None else inverse
            exact[layer, site] = replace_fields(sparse, rotation=rotation, inverse=inverse)
    return exact


def _of_all_heads(blocks: np.ndarray, config: TransformerConfig) -> np.ndarray:
    n, d = config.n_heads, config.d_head
    r = np.zeros((n, d, n, d))
    r[np.arange(n), :, np.arange(n)] = blocks.repeat(n // config.n_kv_heads, axis=0)
    return r.reshape(n * d, n * d)


def group_blocks(sparse: SparseInput, config: TransformerConfig) -> tuple[np.ndarray, np.ndarray] | None:
    """The blocks `[key/value heads, d, d]` of R for all heads and those of R⁻¹, exact in float64 (of a rotation the
    nearest orthogonal ones); `None` where R is not block-diagonal with one block for a group."""
    blocks = None if sparse.rotation is None else _blocks(sparse.rotation, config)
    if blocks is None:
        return None
    if sparse.inverse is not None:
        return blocks, np.linalg.inv(blocks)
    u, _, vt = np.linalg.svd(blocks)
    return u @ vt, np.swapaxes(u @ vt, -1, -2)


def _blocks(r: AnyArray, config: TransformerConfig) -> np.ndarray | None:
    heads, groups, d = config.n_heads, config.n_kv_heads, config.d_head
    parts = np.asarray(r, np.float64).reshape(heads, d, heads, d).transpose(0, 2, 1, 3)  # [head, head, d, d]
    blocks = parts[np.arange(heads), np.arange(heads)].reshape(groups, -1, d, d)
    first = blocks[:, :1]
    across = parts * (1 - np.eye(heads))[:, :, None, None]
    if max(np.abs(across).max(), np.abs(blocks - first).max()) > 1e-6 * max(1.0, np.abs(parts).max()):
        return None
    return first[:, 0]


def _folded(p, blocks: np.ndarray, inverses: np.ndarray, config: TransformerConfig):
    groups, d, dtype = config.n_kv_heads, config.d_head, np.asarray(p["w_v"]).dtype
    new = dict(p)
    for name in ("w_v", "b_v"):
        if name in p:
            values = np.asarray(p[name], np.float64).reshape(groups, d, -1)
            new[name] = (blocks @ values).reshape(np.shape(p[name])).astype(dtype)
    o = np.asarray(p["w_o"], np.float64).reshape(config.d_model, groups, -1, d)
    new["w_o"] = np.einsum("mghd,gde->mghe", o, inverses).reshape(np.shape(p["w_o"])).astype(dtype)
    return new
