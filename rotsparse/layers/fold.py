"""`fold`: multiply rotations into a layer's weights, and check that the function did not change.

`f'(z) = R_out f(R_inᵀ z)`. The rotations are made orthogonal to float64 and multiplied into the weights in float64;
only the result is rounded to the precision of the weights.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from rotsparse._core import checks
from rotsparse._core.errors import CheckError
from rotsparse._core.precision import full_precision
from rotsparse._core.types import AnyArray
from rotsparse.layers.base import Layer
from rotsparse.layers.rotations import Rotations, checked

# Larger differences of outputs, relative to their rms, are not rounding errors.
TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Folded:
    """A rotated layer `z ↦ R_out f(R_inᵀ z)` and the rotations in it, orthogonal to float64.

    `error` is the largest absolute difference between `R_outᵀ f'(R_in x)` and `f(x)` on the checked examples, in the
    precision of the weights; `scale` is the root mean square of `f(x)` on them.
    """

    layer: Layer
    rotations: Rotations
    error: float
    scale: float


def fold(layer: Layer, rotations: Rotations, x: Float[AnyArray, "n d_in"] | None = None) -> Folded:
    """Fold rotations into a layer: the same function, `f(x) = R_outᵀ f'(R_in x)`, in rotated coordinates.

    `x`: inputs `[n, d_in]` on which this is checked (default: 64 standard normal vectors; real activations are better).

    The outputs of a single layer `φ(Wx + b)` are rotated after φ, so that `f'` ends in the matrix `R_out`.

    Raises `ValueError` if the rotations do not fit the layer, and `CheckError` (a `ValueError`) if the function changed
    by more than `TOLERANCE`.
    """
    rotations = checked("rotations", rotations)
    widths = (rotations.r_in.shape[0], rotations.r_out.shape[0])
    if widths != (layer.d_in, layer.d_out):
        raise ValueError(
            f"the rotations have widths {widths[0]} and {widths[1]}, the layer {layer.d_in} and {layer.d_out}"
        )
    x = np.random.default_rng(0).standard_normal((64, layer.d_in), np.float32) if x is None else np.asarray(x)
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(layer) if eqx.is_inexact_array(leaf)] or [x.dtype]
    dtype = np.result_type(*dtypes)
    x = np.asarray(checks.weight("x", x, (None, layer.d_in)), dtype)

    exact = Rotations(_orthogonalized(rotations.r_in), _orthogonalized(rotations.r_out))
    # An identity needs no product; the outputs of a single layer then stay its neurons.
    r_in, r_out = (None if np.array_equal(r, np.eye(len(r))) else r for r in (exact.r_in, exact.r_out))
    with jax.enable_x64(dtype == np.float64), full_precision():
        rotated = _cast(_cast(layer, np.float64).rotate(r_in, r_out), dtype)
        before = np.asarray(layer(jnp.asarray(x)))
        z = np.asarray(x.astype(np.float64) @ exact.r_in.T, dtype)
        after = np.asarray(rotated(jnp.asarray(z)), np.float64) @ exact.r_out
    error, scale = float(np.abs(after - before).max()), float(np.sqrt(np.mean(np.square(before, dtype=np.float64))))
    if not error <= TOLERANCE * max(scale, 1e-30):
        raise CheckError(
            f"folding changed the function: outputs differ by up to {error:.2g} where their root mean square is "
            f"{scale:.2g}. Check that the layer computes in full float32 precision and that x looks like its real "
            "inputs"
        )
    return Folded(rotated, exact, error, scale)


def _orthogonalized(r: AnyArray) -> np.ndarray:
    """The nearest orthogonal matrix in float64, by Newton-Schulz steps from an `r` that is orthogonal to float32."""
    x = np.asarray(r, np.float64)
    for _ in range(4):
        x = 1.5 * x - 0.5 * x @ x.T @ x
    return x


def _cast(layer, dtype):
    """The layer with NumPy weights of this dtype. Integer arrays and functions are left as they are."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, dtype) if eqx.is_inexact_array_like(leaf) else leaf, layer)
