"""What the directions of a layer do to each other: statistics of the rotated Jacobian, and the neurons that carry an
effect."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from rotsparse._core.precision import full_precision
from rotsparse._core.types import Rows
from rotsparse.data.moments import chunks
from rotsparse.evaluation.units import scaled_rows
from rotsparse.layers.base import ClosedForm, Layer
from rotsparse.layers.jacobians import apply, jacobians
from rotsparse.layers.rotations import Rotations

# An entry counts as large from this share of the rms of all entries on: the border of "practically zero".
LARGE = 0.1

_ROWS = 2048


class Effects(NamedTuple):
    """Statistics of `Z = R_out J R_inᵀ` over examples.

    `mean`: `E[Z_oi] sd_i / sd_o`, how many of its standard deviations output o moves when input i moves by one of its
    own. `size`: the same of the root mean square of `Z_oi`; where it is much larger than the mean, the sign of the
    effect differs between examples. `energy`: the share of each entry in `E Σ Z²`, in the units of the fit. `often`:
    the share of examples in which `|Z_oi|` is above a tenth of the rms of all entries, in the units of the fit.
    """

    mean: Float[np.ndarray, "d_out d_in"]
    size: Float[np.ndarray, "d_out d_in"]
    energy: Float[np.ndarray, "d_out d_in"]
    often: Float[np.ndarray, "d_out d_in"]


def effects(layer: Layer, x: Rows, rotations: Rotations, **units: Any) -> Effects:
    """The effects of inputs on outputs over the examples `x`; `units` as `scaled_rows` takes them. Two passes over the
    Jacobians. Raises `ValueError` if all of them are zero."""
    r_in, r_out = scaled_rows(layer, x, rotations.r_in, rotations.r_out, **units)
    total, square = np.zeros((layer.d_out, layer.d_in)), np.zeros((layer.d_out, layer.d_in))
    for z in jacobians(layer, x, r_in, r_out):
        total += z.sum(axis=0, dtype=np.float64)
        square += np.square(z, dtype=np.float64).sum(axis=0)
    if not square.sum() > 0:
        raise ValueError("the layer's Jacobian is zero for every example: no direction does anything")
    border = LARGE * np.sqrt(square.mean() / len(x))
    often = np.zeros_like(total)
    for z in jacobians(layer, x, r_in, r_out):
        often += (np.abs(z) > border).sum(axis=0)
    # Rows of the rotations have length 1: those of r_in and r_out have the scale that the units gave them.
    unit = np.linalg.norm(r_out, axis=1)[:, None] * np.linalg.norm(r_in, axis=1)
    ratio = np.divide(deviations_ratio(layer, x, rotations), unit, out=np.zeros_like(unit), where=unit > 0)
    mean, size = total / len(x) * ratio, np.sqrt(square / len(x)) * ratio
    return Effects(mean, size, square / square.sum(), often / len(x))


def deviations_ratio(layer: Layer, x: Rows, rotations: Rotations) -> Float[np.ndarray, "d_out d_in"]:
    """`sd_i / sd_o` over examples: 0 for outputs that do not vary."""
    sd_in = np.asarray(rotations.apply_in(x), np.float64).std(axis=0)
    sd_out = np.asarray(rotations.apply_out(apply(layer, jnp.asarray(x))), np.float64).std(axis=0)
    return np.divide(sd_in, sd_out[:, None], out=np.zeros((len(sd_out), len(sd_in))), where=sd_out[:, None] > 0)


class Mediation:
    """Which hidden neurons carry the mean effect of an input direction on an output direction.

    The Jacobian of a `ClosedForm` layer is `Σ_k L diag(g_k) M_k N'` (and a skip connection), so

        E[Z_oi] = Σ_h A[o, h] G[h, i] + S[o, i],    A = R_out L,   G[h, i] = E[Σ_k g_k[h] (M_k N' R_inᵀ)[h, i]]

    with `G[h, i]` the mean derivative of hidden neuron h along input direction i, behind the nonlinearity and through
    the norm, and `S` the rotated skip connection. The sum over neurons is exact. Raises `ValueError` for a layer that
    has no such form.
    """

    def __init__(self, layer: Layer, x: Rows, rotations: Rotations):
        if not isinstance(layer, ClosedForm):
            raise ValueError(f"a {type(layer).__name__} has no hidden neurons of which this could be told")
        r_in, r_out = np.asarray(rotations.r_in, np.float64), np.asarray(rotations.r_out, np.float64)
        self._left = r_out if layer.left is None else r_out @ np.asarray(layer.left, np.float64)
        self._mean = _mean_derivatives(layer, x) @ r_in.T
        self._skip = None if layer.skip is None else r_out @ np.asarray(layer.skip, np.float64) @ r_in.T
        self._ratio = deviations_ratio(layer, x, rotations)

    def of(self, output: int, input: int) -> Float[np.ndarray, "hidden"]:
        """What each hidden neuron contributes to `Effects.mean[output, input]`, in the same unit."""
        return self._left[output] * self._mean[:, input] * self._ratio[output, input]

    def skip(self, output: int, input: int) -> float:
        """What the skip connection contributes."""
        return 0.0 if self._skip is None else float(self._skip[output, input] * self._ratio[output, input])

    @property
    def hidden(self) -> int:
        """How many neurons there are."""
        return len(self._mean)


def _mean_derivatives(layer: ClosedForm, x: Rows) -> Float[np.ndarray, "hidden d_in"]:
    """`E[Σ_k diag(g_k) M_k N']`, before the rotation."""
    total = None
    for chunk, count in chunks(jnp.asarray(x), _ROWS):
        parts = _derivative_sums(layer, chunk, jnp.asarray(np.arange(len(chunk)) < count, chunk.dtype))
        parts = jax.tree.map(lambda a: np.asarray(a, np.float64), parts)
        total = parts if total is None else jax.tree.map(np.add, total, parts)
    assert total is not None
    gates, outer = total
    rights = [np.asarray(m if layer.norm is None else layer.norm.absorb(m), np.float64) for m in layer.rights]
    mean = np.sum([g[:, None] * m for g, m in zip(gates, rights, strict=True)], axis=0)
    return (mean - (0 if outer is None else outer)) / len(x)


@eqx.filter_jit
def _derivative_sums(layer, x, counted):
    """Sums over examples of the gates (with the norm's `1/r`), and of the rank-one part of the norm's derivative,
    `(Σ_k g_k ⊙ M_k D n̂) n̂ᵀ/d`."""
    with full_precision():
        gates, factors = layer.prepared(x)
        outer = None if factors is None else (factors[0] * counted[:, None]).T @ factors[1]
        return [counted @ g for g in gates], outer
