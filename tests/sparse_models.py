"""Sparse inputs of every kind for tiny models."""

import numpy as np

from rotsparse.models.model import Model
from rotsparse.models.transformer import READ, site_width
from rotsparse.sparse.inputs import SparseInput


def orthogonal(d: int, rng: np.random.Generator) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(d, d)))[0]


def oblique(d: int, rng: np.random.Generator) -> np.ndarray:
    """A rotation of what a metric measures: singular values from a half to two."""
    return orthogonal(d, rng) * np.geomspace(0.5, 2, d) @ orthogonal(d, rng)


def group_rotation(config, rng: np.random.Generator, block_of=orthogonal) -> np.ndarray:
    """One block for each key/value head, shared by its query heads."""
    r, d = np.zeros((config.n_heads * config.d_head,) * 2), config.d_head
    group = config.n_heads // config.n_kv_heads
    for g in range(config.n_kv_heads):
        block = block_of(d, rng)
        for head in range(g * group, (g + 1) * group):
            r[head * d : (head + 1) * d, head * d : (head + 1) * d] = block
    return r


def sparse_inputs(model: Model, seed: int = 0) -> dict[tuple[int, str], SparseInput]:
    """At every point that a matrix reads: alternately a threshold and a count, with and without shift and scores;
    rotations everywhere but at `hidden`, which in every other layer are not orthogonal."""
    config, rng = model.config, np.random.default_rng(seed)
    inputs = {}
    for layer in range(config.n_layers):
        for i, site in enumerate(READ):
            d = site_width(config, site)
            of = oblique if layer % 2 else orthogonal
            rotation = None if site == "hidden" else of(d, rng)
            rotation = group_rotation(config, rng, of) if site == "heads" else rotation
            inverse = None if rotation is None or of is orthogonal else np.linalg.inv(rotation).astype(np.float32)
            shift = 0.1 * rng.normal(size=d) if (i + layer) % 2 else None
            scores = rng.uniform(0.5, 2, d) if i % 2 else None
            rotation, shift, scores = (None if a is None else a.astype(np.float32) for a in (rotation, shift, scores))
            threshold, count = (0.4, None) if (i // 2 + layer) % 2 else (None, d // 2)
            inputs[layer, site] = SparseInput(rotation, shift, scores, threshold, count, inverse)
    return inputs
