"""The units of a Jacobian's entries: raw, per standard deviation of the input, or without a unit."""

from typing import Any

import numpy as np
from jaxtyping import Array, Float

from rotsparse._core.checks import weight
from rotsparse._core.types import Rows
from rotsparse.data.scales import Scale, covariance_of
from rotsparse.layers.base import Layer
from rotsparse.objectives.jacobian import VARIANCE_FLOOR, output_covariance

Matrix = Float[Array, "d d"] | Float[np.ndarray, "d d"]
MatrixOut = Float[Array, "d_out d_out"] | Float[np.ndarray, "d_out d_out"]


def scaled_rows(
    layer: Layer,
    x: Rows,
    r_in: Matrix,
    r_out: MatrixOut,
    *,
    scale_inputs: Scale,
    scale_outputs: Scale = False,
    covariance: Matrix | None = None,
    covariance_out: MatrixOut | None = None,
) -> tuple[Float[np.ndarray, "d_in d_in"], Float[np.ndarray, "d_out d_out"]]:
    """The rotations in float64 with rows scaled so that `R_out J R_inᵀ` has the units asked for.

    Row i of `r_in` is multiplied by `√(r_i Σ r_iᵀ)` where inputs are scaled, and row o of `r_out` divided by
    `√(r_o Σ_y r_oᵀ + ε)` where outputs are, with ε a millionth of the mean variance, as in a fit. Σ and Σ_y are
    `covariance` and `covariance_out`, or those of `x` and of the layer's outputs on it (`scale_covariance`, or the
    function that is the scale).

    Raises `ValueError` where shapes do not fit, or outputs that should be scaled do not vary.
    """
    rows_in, rows_out = sized("r_in", r_in, layer.d_in), sized("r_out", r_out, layer.d_out)
    if scale_inputs:
        sigma = covariance_of(scale_inputs, x) if covariance is None else sized("covariance", covariance, layer.d_in)
        variance = np.einsum("id,de,ie->i", rows_in, sigma, rows_in, optimize=True)
        rows_in = rows_in * np.sqrt(np.maximum(variance, 0))[:, None]
    if scale_outputs:
        sigma = output_covariance(layer, x, scale_outputs) if covariance_out is None else covariance_out
        sigma = sized("covariance_out", sigma, layer.d_out)
        floor = VARIANCE_FLOOR * np.trace(sigma) / len(sigma)
        if not floor > 0:
            raise ValueError("the layer's outputs do not vary, so they have no standard deviation to be measured in")
        variance = np.einsum("od,de,oe->o", rows_out, sigma, rows_out, optimize=True)
        rows_out = rows_out / np.sqrt(np.maximum(variance, 0) + floor)[:, None]
    return rows_in, rows_out


def units_of(layer: Layer, x: Rows, *, scale_inputs: Scale = True, scale_outputs: Scale = False) -> dict[str, Any]:
    """The arguments of `scaled_rows` that say the units: those of the activations `x`, which layer and fit have seen.

    Raises `ValueError` where outputs that should be scaled do not vary.
    """
    return {
        "scale_inputs": scale_inputs,
        "scale_outputs": scale_outputs,
        "covariance": covariance_of(scale_inputs, x) if scale_inputs else None,
        "covariance_out": output_covariance(layer, x, scale_outputs) if scale_outputs else None,
    }


def sized(name: str, value, d: int) -> Float[np.ndarray, "d d"]:
    """`value` in float64. Raises `ValueError` where it is not `[d, d]` and finite."""
    return np.asarray(weight(name, value, (d, d)), np.float64)
