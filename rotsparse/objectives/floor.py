"""The floor: a lower bound of the objective of a layer over all rotations.

The squared entries of a rotated matrix are majorised by its squared singular values (a mask of k entries has rank at
most k, so by von Neumann's trace inequality it holds at most the k largest of them). For every measure S that is
concave in z² with S(0) = 0, hence,

    E_x mean_{o,i} S(z_oi) ≥ E_x (1/(d_out d_in)) Σ_i S(σ_i(z(x)))        for any R_in, R_out.

It is reached only if one pair of rotations diagonalises the Jacobian of every example, so the gap to it is an upper
bound of what can still be gained, not an estimate. It holds for unscaled inputs only, because the scales of columns
depend on the rotation.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Float

from rotsparse._core.precision import full_precision
from rotsparse._core.types import Data
from rotsparse.data.examples import chunked_sum
from rotsparse.layers.base import Layer
from rotsparse.layers.jacobians import chunk_size, jacobian_gram
from rotsparse.objectives.measures import Measure


def floor(layer: Layer, x: Float[Data, "n d_in"], measure: Measure) -> float:
    """Lower bound of `JacobianSparsity(layer, x, measure, scale_inputs=False)` over all rotations.

    Costs one singular value decomposition per example: use a few hundred examples of a wide layer.
    """
    rms = jnp.sqrt(jnp.trace(jnp.asarray(jacobian_gram(layer, x), x.dtype)) / (layer.d_in * layer.d_out))
    return float(_floor(layer, jnp.asarray(x), measure, rms))


@eqx.filter_jit
def _floor(layer, x, measure, rms):
    rank = min(layer.d_in, layer.d_out)

    def chunk_sum(x, weights):
        singular = jnp.linalg.svd(layer.jacobian(x), compute_uv=False) / rms
        diagonal = jnp.zeros((len(x), layer.d_out, layer.d_in), x.dtype)
        diagonal = diagonal.at[:, jnp.arange(rank), jnp.arange(rank)].set(singular)
        return jnp.sum(weights * measure.example_value(diagonal))

    with full_precision():
        return chunked_sum(chunk_sum, x, chunk_size(layer)) / len(x)
