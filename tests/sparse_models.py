"""Sparse inputs of every kind for tiny models."""

import numpy as np

from rotsparse.models.model import Model
from rotsparse.models.transformer import READ, site_width
from rotsparse.sparse.inputs import SparseInput


def orthogonal(d: int, rng: np.random.Generator) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(d, d)))[0]


def group_rotation(config, rng: np.random.Generator) -> np.ndarray:
    """One block for each key/value head, shared by its query heads."""
    r, d = np.zeros((config.n_heads * config.d_head,) * 2), config.d_head
    group = config.n_heads // config.n_kv_heads
    for g in range(config.n_kv_heads):
        block = orthogonal(d, rng)
        for head in range(g * group, (g + 1) * group):
            r[head * d : (head + 1) * d, head * d : (head + 1) * d] = block
    return r


def sparse_inputs(model: Model, seed: int = 0) -> dict[tuple[int, str], SparseInput]:
    """At every point that a matrix reads: alternately a threshold and a count, with and without shift and scores;
    rotations everywhere but at `hidden`."""
    config, rng = model.config, np.random.default_rng(seed)
    inputs = {}
    for layer in range(config.n_layers):
        for i, site in enumerate(READ):
            d = site_width(config, site)
            rotation = None if site == "hidden" else orthogonal(d, rng)
            rotation = group_rotation(config, rng) if site == "heads" else rotation
            shift = 0.1 * rng.normal(size=d) if (i + layer) % 2 else None
            scores = rng.uniform(0.5, 2, d) if i % 2 else None
            rotation, shift, scores = (None if a is None else a.astype(np.float32) for a in (rotation, shift, scores))
            threshold, count = (0.4, None) if (i // 2 + layer) % 2 else (None, d // 2)
            inputs[layer, site] = SparseInput(rotation, shift, scores, threshold, count)
    return inputs
