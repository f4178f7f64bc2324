"""The bases in which a site's coordinates are dropped: ours, and those of others.

    none       no rotation, the largest stay (Liu et al., "Training-Free Activation Sparsity in Large Language Models"
               (TEAL), 2025)
    wina       no rotation, those stay that move the output most, `|x_i| ‖W_{:,i}‖` (Chen et al., "WINA", 2025)
    hadamard   a random Hadamard matrix: what a rotation does that knows nothing
    pca        the uncentred principal components (Liu et al., "LaRoSA", 2025)
    weighted   the principal components of what W reads, the eigenvectors of `M^½ E[xxᵀ] M^½` with `M = WᵀW`
    learned    the minimum of `DroppedError` with the Fisher information as its metric

W stands for all matrices that read the site, one below the other.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray
from scipy.linalg import block_diag, hadamard

from rotsparse._core.types import AnyArray
from rotsparse.fit.minimize import minimize
from rotsparse.models.model import Model
from rotsparse.models.transformer import read_by
from rotsparse.objectives.dropped import DroppedError
from rotsparse.solvers.anneal import Anneal

BASELINES = ("none", "wina", "hadamard", "pca", "weighted")
LEARNED = "learned"

# The Fisher information from few tokens is singular: so much of its mean is added to its diagonal.
_DAMPING = 0.01

# The best step of a fit is chosen on at most so many of its last rows.
_HELD_OUT = 8192


class Basis(NamedTuple):
    """A rotation (`None`: the identity), and what a coordinate's magnitude counts in it (`None`: one)."""

    rotation: Float[np.ndarray, "d d"] | None
    scores: Float[np.ndarray, "d"] | None


def readers(model: Model, layer: int, site: str) -> Float[np.ndarray, "out d"]:
    """All matrices that read a site, one below the other."""
    part, names = read_by(model.params["layers"][layer], site)
    return np.concatenate([part[f"w_{name}"] for name in names])


def baseline(
    name: str,
    moment: Float[AnyArray, "d d"],
    reading: Float[AnyArray, "out d"],
    *,
    heads: tuple[int, int] | None = None,
    rotate: bool = True,
) -> Basis:
    """A basis of `BASELINES` for a site, from the second moment `E[xxᵀ]` of its values and the matrices that read it.

    `heads`: how many heads the values come from, and how many heads of keys and values these share: each head rotates
    by itself, and those that share values by the same matrix, so that the rotation folds into the matrices around it.
    `rotate`: False for a site that keeps its neurons.
    """
    if name not in BASELINES:
        raise ValueError(f"unknown baseline {name!r}: expected one of {', '.join(BASELINES)}")
    if name == "wina":
        return Basis(None, np.linalg.norm(np.asarray(reading, np.float64), axis=0).astype(np.float32))
    if name == "none" or not rotate:
        return Basis(None, None)
    moment = np.asarray(moment, np.float64)
    if name == "weighted":
        root = _root(np.asarray(reading, np.float64).T @ np.asarray(reading, np.float64))
        moment = root @ moment @ root
    parts = moment[None] if heads is None else _head_moments(moment, heads)
    if name == "hadamard":
        rotations = np.stack([_hadamard(parts.shape[-1])] * len(parts))
    else:
        rotations = np.swapaxes(np.linalg.eigh(parts)[1], -1, -2)[:, ::-1]
    rotation = rotations[0] if heads is None else _expanded(rotations, heads)
    return Basis(np.ascontiguousarray(rotation, np.float32), None)


def learned(
    x: Float[AnyArray, "n d"],
    fisher: Float[AnyArray, "d d"],
    start: Float[AnyArray, "d d"],
    *,
    keep: float,
    key: PRNGKeyArray,
    steps: int,
) -> Basis:
    """The rotation in which dropping all but the share `keep` of the coordinates costs the network least, by
    `DroppedError` with its Fisher information; coordinates are chosen by `|z_i| √(r_iᵀ F r_i)`."""
    metric, held_out = damped(fisher), min(len(x) // 5, _HELD_OUT)
    objective = DroppedError(x[: len(x) - held_out], metric, keep=keep)
    validation = objective.on(x[len(x) - held_out :]) if held_out else None
    # Larger angles leave the basin of the principal components, and take thousands of steps to find a better one.
    method = Anneal(steps=steps, angle=0.1, batch_size=2 * x.shape[1])
    first = {"in": jnp.asarray(start)}
    solution = minimize(objective, first, method=method, key=key, validation=validation).completed()
    return weighed(np.asarray(solution.bases["in"]), fisher)


def weighed(rotation: Float[np.ndarray, "d d"] | None, fisher: Float[AnyArray, "d d"]) -> Basis:
    """A rotation in which coordinates are chosen by `|z_i| √(r_iᵀ F r_i)`."""
    metric = damped(fisher)
    return Basis(rotation, scores(np.eye(len(metric)) if rotation is None else rotation, metric))


def scores(rotation: Float[AnyArray, "d d"], metric: Float[AnyArray, "d d"]) -> Float[np.ndarray, "d"]:
    """`√(r_iᵀ M r_i)` of every direction, divided by their root mean square."""
    r, m = np.asarray(rotation, np.float64), np.asarray(metric, np.float64)
    square = ((r @ m) * r).sum(axis=1)
    return np.asarray(np.sqrt(np.maximum(square, 0) / square.mean()).astype(np.float32))


def damped(metric: Float[AnyArray, "d d"]) -> Float[np.ndarray, "d d"]:
    """The metric, of trace d, with a little of the identity."""
    metric = np.asarray(metric, np.float64)
    scale = np.trace(metric) / len(metric)
    unit = np.eye(len(metric))
    return ((metric / scale + _DAMPING * unit) / (1 + _DAMPING) if scale > 0 else unit).astype(np.float32)


def _head_moments(moment: np.ndarray, heads: tuple[int, int]) -> np.ndarray:
    """The moments within a head, summed over the heads that share their values: `[heads of values, d_head, d_head]`."""
    count, shared = heads
    blocks = np.einsum("hihj->hij", moment.reshape(count, len(moment) // count, count, -1))
    return blocks.reshape(shared, -1, *blocks.shape[1:]).sum(axis=1)


def _expanded(rotations: np.ndarray, heads: tuple[int, int]) -> np.ndarray:
    """The rotation of all heads from those of the heads of values."""
    return np.asarray(block_diag(*np.repeat(rotations, heads[0] // heads[1], axis=0)))


def _root(m):
    values, vectors = np.linalg.eigh(m)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def _hadamard(d: int, seed: int = 0) -> np.ndarray:
    """A Hadamard matrix of the largest power of two in d, times a random orthogonal one of the odd rest, with random
    signs of the inputs."""
    power = d & -d
    rng = np.random.default_rng(seed)
    rest = np.linalg.qr(rng.standard_normal((d // power, d // power)))[0]
    return np.kron(rest, hadamard(power) / np.sqrt(power)) * rng.choice([-1.0, 1.0], d)
