"""Substitution: what is lost when only the large coordinates of an activation are kept?

    x̂ = Rᵀ k(R x)

where k sets most coordinates to zero: all but the largest of each example (`KeepLargest`), or all below a threshold
(`KeepAbove`). A basis with sparse activations loses little. Judged by the energy that is lost, the error of the layer
behind, and, where it counts, the loss of the whole network with x̂ in place of x.
"""

import abc
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rotsparse._core.checks import activations, orthogonal
from rotsparse._core.precision import full_precision
from rotsparse._core.types import Rows
from rotsparse.data.moments import CHUNK_BYTES, chunks
from rotsparse.layers.base import Layer
from rotsparse.layers.jacobians import apply

Loss = Callable[[Float[Array, "n d"]], float]
"""The network's loss with these activations in place of its own."""


Matrix = Float[Array, "d d"] | Float[np.ndarray, "d d"]


class Keep(eqx.Module):
    """Which coordinates stay; the others become zero."""

    @abc.abstractmethod
    def __call__(self, z: Float[Array, "n d"]) -> Float[Array, "n d"]:
        """`z` with the others set to zero."""


class KeepLargest(Keep):
    """The `count` coordinates of largest magnitude of each example (the first of equal ones)."""

    count: int = eqx.field(static=True)

    def __call__(self, z):
        if not 0 <= self.count <= z.shape[-1]:
            raise ValueError(f"of {z.shape[-1]} coordinates {self.count} cannot be kept")
        _, kept = jax.lax.top_k(jnp.abs(z), self.count)
        return jnp.put_along_axis(
            jnp.zeros_like(z), kept, jnp.take_along_axis(z, kept, axis=-1), axis=-1, inplace=False
        )


class KeepAbove(Keep):
    """Coordinates of magnitude above `threshold`: one for all, or one for each coordinate. An example keeps as many as
    it has (Liu et al., "Training-Free Activation Sparsity in Large Language Models" (TEAL), 2025)."""

    threshold: float | Float[Array, ""] | Float[Array, "d"]

    def __call__(self, z):
        return jnp.where(jnp.abs(z) > self.threshold, z, 0)

    @classmethod
    def at_sparsity(cls, x: Rows, r: Matrix, sparsity: float) -> "KeepAbove":
        """The one threshold below which a share `sparsity` of all rotated coordinates of `x` lies. Choose it on
        calibration data; what it achieves on others is part of the `Substitution`."""
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity is the share of zeros: expected a number in [0, 1), got {sparsity}")
        x, r = _checked(x, r)
        return cls(float(np.quantile(np.abs(np.asarray(x) @ np.asarray(r).T), sparsity)))


class Substitution(NamedTuple):
    """What a substitution costs.

    `sparsity`: the achieved share of zeros. `energy_lost`: `E‖x - x̂‖² / E‖x‖²`. `output_error`: `E‖f(x) - f(x̂)‖² /
    E‖f(x)‖²` of the layer behind, where one was given. `loss_change`: loss with x̂ minus loss with x, where a loss was
    given.
    """

    sparsity: float
    energy_lost: float
    output_error: float | None
    loss_change: float | None


def substitute(x: Rows, r: Matrix, keep: Keep) -> Float[np.ndarray, "n d"]:
    """`x̂ = Rᵀ k(R x)` of every example."""
    return _substitute(*_checked(x, r), keep)[0]


def substitution(
    x: Rows, r: Matrix, keep: Keep, *, layer: Layer | None = None, loss: Loss | None = None
) -> Substitution:
    """Substitute the activations `x` (`[n, d]`) in the basis `r` (rows are directions), and say what it costs.

    Raises `ValueError` where `x` or `r` are unusable or do not fit each other or the layer.
    """
    x, r = _checked(x, r)
    if layer is not None and layer.d_in != x.shape[1]:
        raise ValueError(f"the layer reads {layer.d_in} inputs, x has {x.shape[1]}")
    replaced, kept = _substitute(x, r, keep)
    return Substitution(
        sparsity=1 - kept / x.size,
        energy_lost=relative_error(x, replaced),
        output_error=None if layer is None else _output_error(layer, x, replaced),
        loss_change=None if loss is None else float(loss(jnp.asarray(replaced))) - float(loss(x)),
    )


def relative_error(y: Rows, y_hat: Rows) -> float:
    """`E‖y - ŷ‖² / E‖y‖²`, summed in float64."""
    y, y_hat = np.asarray(y), np.asarray(y_hat)
    return float(np.square(y - y_hat).sum(dtype=np.float64) / np.square(y).sum(dtype=np.float64))


def _checked(x, r):
    x = activations("x", x, np.shape(x)[-1] if np.ndim(x) else 0, at_least=1)
    return x, jnp.asarray(orthogonal("r", r, x.shape[1]), x.dtype)


def _substitute(x, r, keep):
    """x̂ and the number of coordinates that are not zero."""
    parts, kept = [], 0
    for rows, count in chunks(x, max(1, CHUNK_BYTES // (8 * x.shape[1]))):
        z, replaced = _kept(rows, r, keep)
        parts.append(np.asarray(replaced)[:count])
        kept += int(np.count_nonzero(np.asarray(z)[:count]))
    return np.concatenate(parts), kept


@eqx.filter_jit
def _kept(x, r, keep):
    with full_precision():
        z = keep(x @ r.T)
        return z, z @ r


def _output_error(layer, x, replaced):
    lost = total = 0.0
    for rows, count in chunks(np.concatenate([x, replaced], axis=1), max(1, CHUNK_BYTES // (16 * layer.d_out))):
        y, y_hat = (np.asarray(apply(layer, jnp.asarray(part)))[:count] for part in np.split(rows, 2, axis=1))
        lost += np.square(y - y_hat).sum(dtype=np.float64)
        total += np.square(y).sum(dtype=np.float64)
    return float(lost / total)
