"""The bases in which a site's coordinates are dropped: ours, and those of others.

    none       no rotation, the largest stay (Liu et al., "Training-Free Activation Sparsity in Large Language Models"
               (TEAL), 2025)
    wina       no rotation, those stay that move the output most, `|x_i| ‖W_{:,i}‖` (Chen et al., "WINA", 2025)
    hadamard   a random Hadamard matrix: what a rotation does that knows nothing
    pca        the uncentred principal components (Liu et al., "LaRoSA", 2025)
    weighted   the principal components of what W makes of x, which are those of `M^½ x` with `M = WᵀW`
    fisher     the principal components of `M^½ x`, M the Fisher information: a formula, and where `learned` begins
    learned    the rotation of `M^½ x` with the least energy in what is dropped, M the Fisher information

W stands for all matrices that read the site, one below the other. With a metric M an error e costs `eᵀ M e`: in the
coordinates `R x`, `R = Q M^½` with Q orthogonal, that is the energy of what is dropped. Such an R is not orthogonal.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray
from scipy.linalg import block_diag, hadamard

from rotsparse._core.types import AnyArray
from rotsparse.fit.default_method import default_basis_method
from rotsparse.fit.minimize import minimize
from rotsparse.models.model import Model
from rotsparse.models.transformer import read_by
from rotsparse.objectives.activation import ActivationSparsity
from rotsparse.objectives.measures import TopK
from rotsparse.sparse.inputs import undoing

BASELINES = ("none", "wina", "hadamard", "pca", "weighted")
FISHER, LEARNED = "fisher", "learned"

# The Fisher information from few tokens is singular: so much of its mean is added to its diagonal.
_DAMPING = 0.01

# The best step of a fit is chosen on at most so many of its last rows.
_HELD_OUT = 8192


class Basis(NamedTuple):
    """R (`None`: the identity), what a coordinate's magnitude counts in it (`None`: one), and R⁻¹ (`None`: Rᵀ)."""

    rotation: Float[np.ndarray, "d d"] | None
    scores: Float[np.ndarray, "d"] | None
    inverse: Float[np.ndarray, "d d"] | None = None


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
    reading = np.asarray(reading, np.float64)
    if name == "wina":
        return Basis(None, np.linalg.norm(reading, axis=0).astype(np.float32))
    if name == "none" or not rotate:
        return Basis(None, None)
    if name == "hadamard":
        count, width = (1, len(moment)) if heads is None else (heads[1], len(moment) // heads[0])
        return Basis(_expanded(np.stack([_hadamard(width)] * count), heads), None)
    return components(moment, damped(reading.T @ reading) if name == "weighted" else None, heads=heads)


def components(
    moment: Float[AnyArray, "d d"],
    metric: Float[AnyArray, "d d"] | None = None,
    *,
    heads: tuple[int, int] | None = None,
) -> Basis:
    """The principal components, uncentred, of x with the second moment `E[xxᵀ]`; with a metric M those of `M^½ x`: no
    basis has a smaller error `E eᵀ M e` without its last coordinates. `heads`: as for `baseline`; heads that share
    values share the mean of their metrics."""
    moments = _of_heads(moment, heads)
    if metric is None:
        return Basis(_expanded(_axes(moments), heads), None)
    root, inverse_root = square_roots(_of_heads(metric, heads))
    axes = _axes(root @ moments @ root)
    return Basis(_expanded(axes @ root, heads), None, _expanded(inverse_root @ np.swapaxes(axes, -1, -2), heads))


def learned(
    x: Float[AnyArray, "n d"], fisher: Float[AnyArray, "d d"], *, keep: float, key: PRNGKeyArray, steps: int
) -> Basis:
    """The rotation Q of `M^½ x`, M the Fisher information, that loses the least energy if each example keeps the share
    `keep` of its coordinates: to second order what that costs the network, `E (x - x̂)ᵀ M (x - x̂)`. It begins at the
    principal components."""
    root, inverse_root = square_roots(damped(fisher))
    measure, held_out = TopK(keep), min(len(x) // 5, _HELD_OUT)
    # The objective's rows are the largest thing here: no others stay, and `jnp.asarray` would copy them twice.
    first, last = (jax.device_put(part @ root.astype(np.float32)) for part in np.split(x, [len(x) - held_out]))
    objective = ActivationSparsity(first, measure)
    (space,) = objective.spaces
    moment = np.asarray(first).T @ np.asarray(first) / len(first)
    start = {space: jnp.asarray(components(moment).rotation)}
    method = default_basis_method(measure, objective, steps=steps)
    validation = objective.on(last) if held_out else None
    found = minimize(objective, start, method=method, key=key, validation=validation).completed()
    q = np.asarray(found.bases[space], np.float64)
    return Basis((q @ root).astype(np.float32), None, (inverse_root @ q.T).astype(np.float32))


def weighed(basis: Basis, fisher: Float[AnyArray, "d d"]) -> Basis:
    """A basis in which coordinates are chosen by what dropping each would cost, `|z_i| √(bᵢᵀ F bᵢ)`, with b the columns
    of R⁻¹."""
    metric = damped(fisher)
    back = undoing(basis.rotation, basis.inverse)
    return basis._replace(scores=scores(np.eye(len(metric)) if back is None else back.T, metric))


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


def square_roots(
    metric: Float[AnyArray, "*many d d"],
) -> tuple[Float[np.ndarray, "*many d d"], Float[np.ndarray, "*many d d"]]:
    """`M^½` and `M^-½` of positive symmetric matrices, in float64."""
    values, vectors = np.linalg.eigh(np.asarray(metric, np.float64))
    root = np.sqrt(np.maximum(values, np.finfo(np.float32).eps * values[..., -1:]))[..., None, :]
    back = np.swapaxes(vectors, -1, -2)
    return (vectors * root) @ back, (vectors / root) @ back


def _axes(moments: np.ndarray) -> np.ndarray:
    """The principal axes, largest first, as rows."""
    return np.swapaxes(np.linalg.eigh(moments)[1], -1, -2)[:, ::-1]


def _of_heads(matrix: Float[AnyArray, "d d"], heads: tuple[int, int] | None) -> np.ndarray:
    """The blocks of a matrix within a head, their mean over the heads that share values: `[heads of values, d_head,
    d_head]`; without heads the matrix itself as the only block."""
    matrix = np.asarray(matrix, np.float64)
    if heads is None:
        return matrix[None]
    count, shared = heads
    blocks = np.einsum("hihj->hij", matrix.reshape(count, len(matrix) // count, count, -1))
    return blocks.reshape(shared, -1, *blocks.shape[1:]).mean(axis=1)


def _expanded(blocks: np.ndarray, heads: tuple[int, int] | None) -> np.ndarray:
    """The matrix of all heads from the blocks of the heads of values."""
    repeats = 1 if heads is None else heads[0] // heads[1]
    return np.ascontiguousarray(block_diag(*np.repeat(blocks, repeats, axis=0)), np.float32)


def _hadamard(d: int, seed: int = 0) -> np.ndarray:
    """A Hadamard matrix of the largest power of two in d, times a random orthogonal one of the odd rest, with random
    signs of the inputs."""
    power = d & -d
    rng = np.random.default_rng(seed)
    rest = np.linalg.qr(rng.standard_normal((d // power, d // power)))[0]
    return np.kron(rest, hadamard(power) / np.sqrt(power)) * rng.choice([-1.0, 1.0], d)
