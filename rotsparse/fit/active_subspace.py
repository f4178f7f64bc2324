"""The active subspace: fit only the directions that hold nearly all of the variance.

Where the variance of a layer's inputs or outputs sits in few directions (99.9% of it in 16 of 128 for modular
addition), rotating the others only misleads the search and costs time. The fit rotates the leading principal
components among themselves and leaves the rest as they are.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from rotsparse._core.orthogonal import matmul
from rotsparse._core.types import Rows
from rotsparse.data.moments import covariance
from rotsparse.layers.base import Layer
from rotsparse.layers.jacobians import apply
from rotsparse.layers.subspace import Subspace
from rotsparse.objectives.base import Bases
from rotsparse.objectives.jacobian import JacobianSparsity


class ActiveSubspace:
    """The principal components of a layer's inputs and outputs that hold a share `energy` of their variance.

    `pca`: all principal components of each space, `[d, d]`, strongest first. `kept`: how many of them are active.
    Raises `ValueError` unless `energy` is in (0, 1].
    """

    def __init__(self, layer: Layer, x: Rows, energy: float):
        if not 0 < energy <= 1:
            raise ValueError(f"active_subspace is a share of the variance: expected a number in (0, 1], got {energy}")
        self.pca, self.kept = {}, {}
        for space, data in {"in": x, "out": apply(layer, x)}.items():
            variances, directions = np.linalg.eigh(np.asarray(covariance(data)[1], np.float64))
            variances, directions = np.maximum(variances[::-1], 0), directions.T[::-1]
            share = np.cumsum(variances) / variances.sum()
            self.pca[space] = jnp.asarray(directions, x.dtype)
            self.kept[space] = min(len(share), int(np.searchsorted(share, energy - 1e-12)) + 1)

    def restrict(self, objective: JacobianSparsity) -> JacobianSparsity:
        """The objective on the active directions alone."""
        frames = {space: directions[: self.kept[space]] for space, directions in self.pca.items()}
        return objective.within(Subspace(objective.layer, frames["in"], frames["out"]))

    @property
    def free(self) -> dict[str, Bool[np.ndarray, "_"]]:
        """Which directions of the lifted rotations a fit can turn."""
        return {space: np.arange(len(directions)) < self.kept[space] for space, directions in self.pca.items()}

    def lift(self, bases: Bases) -> Bases:
        """Extend rotations of the active directions to whole spaces: the other components follow unrotated."""
        parts = {space: jnp.split(directions, [self.kept[space]]) for space, directions in self.pca.items()}
        return {space: jnp.concatenate([matmul(bases[space], kept), rest]) for space, (kept, rest) in parts.items()}
