"""Statistics of a layer over many examples: moments of activations and of Jacobians.

Examples stream through in chunks of a fixed number of bytes, so memory does not grow with their number. Sums within a
chunk are in the precision of the data, sums over chunks in float64 on the host.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rotsparse.checks import activations
from rotsparse.layers import Layer

Rows = Float[Array, "n d"] | Float[np.ndarray, "n d"]
"""Examples, one a row."""

CHUNK_BYTES = 64 * 2**20


def chunk_size(layer: Layer, chunk_bytes: int | None = None) -> int:
    """How many examples' Jacobians, in float32, fit into `chunk_bytes` (default: `CHUNK_BYTES`); at least one.

    An example needs `d_out·d_in` numbers for its Jacobian and `d_hidden·d_in` for the gated weights it is made of: as
    many as the largest weight matrix has.
    """
    sizes = [np.size(leaf) for leaf in jax.tree.leaves(layer) if eqx.is_array_like(leaf)]
    numbers = max([layer.d_out * layer.d_in, *sizes])
    return max(1, (CHUNK_BYTES if chunk_bytes is None else chunk_bytes) // (4 * numbers))


def chunks(x: Rows, size: int) -> Iterator[tuple[Rows, int]]:
    """`x` in chunks of `size` rows, each with the number of rows that count.

    The last chunk is filled up by repeating its last row, so that a jitted function meets one shape only.
    """
    size = min(size, len(x))
    for start in range(0, len(x), size):
        count = min(size, len(x) - start)
        rows = slice(start, start + size) if count == size else np.minimum(np.arange(start, start + size), len(x) - 1)
        yield x[rows], count


def covariance(
    x: Rows, function: Callable[[Rows], Array] | None = None
) -> tuple[Float[np.ndarray, "k"], Float[np.ndarray, "k k"]]:
    """Mean and covariance `E[(v - E v)(v - E v)ᵀ]` of `v = x`, or of `v = function(x)`, in float64.

    One pass; each chunk is centred on its own mean and the chunks are merged pairwise, so nothing cancels where the
    mean is much larger than the spread (Chan, Golub & LeVeque, "Algorithms for Computing the Sample Variance", 1983).
    """
    count, mean, scatter = 0, np.zeros(()), np.zeros(())
    for chunk, size in chunks(x, max(1, CHUNK_BYTES // (8 * x.shape[1]))):
        v = np.asarray(chunk if function is None else function(chunk), np.float64)[:size]
        v_mean = v.mean(axis=0)
        v = v - v_mean
        shift = v_mean - mean
        total = count + size
        scatter = scatter + v.T @ v + np.outer(shift, shift) * (count * size / total)
        mean = mean + shift * (size / total)
        count = total
    return mean, scatter / count


class JacobianMoments(NamedTuple):
    """`E[J]`, `E[JᵀJ]` and `E[JJᵀ]` in float64."""

    mean: Float[np.ndarray, "d_out d_in"]
    gram_in: Float[np.ndarray, "d_in d_in"]
    gram_out: Float[np.ndarray, "d_out d_out"]


def jacobian_moments(layer: Layer, x: Rows) -> JacobianMoments:
    """`E[J]`, `E[JᵀJ]`, `E[JJᵀ]` over the examples. Two matrix products of `2·d_out·d_in·(d_in + d_out)` flops an
    example beside the Jacobian itself."""
    return JacobianMoments(*_mean_over_examples(_moment_sums, layer, x))


def jacobian_gram(layer: Layer, x: Rows) -> Float[np.ndarray, "d_in d_in"]:
    """`E[JᵀJ]`: its quadratic form `r E[JᵀJ] rᵀ` is the mean squared length of the output's response to direction r."""
    return _mean_over_examples(_gram_sum, layer, x)[0]


def jacobians(
    layer: Layer, x: Float[Array, "n d_in"], r_in=None, r_out=None, *, chunk_bytes: int | None = None
) -> Iterator[np.ndarray]:
    """The rotated Jacobians `R_out J R_inᵀ` as NumPy arrays `[c, d_out, d_in]`, chunk by chunk, in the order of `x`.

    The rows of `r_in` and `r_out` may have any length: a row scaled by s scales its column (row) of the Jacobian.
    """
    r_in, r_out = (None if r is None else jnp.asarray(r, x.dtype) for r in (r_in, r_out))
    for chunk, count in chunks(x, chunk_size(layer, chunk_bytes)):
        yield np.asarray(_jacobian(layer, chunk, r_in, r_out))[:count]


class LayerStatistics:
    """What the baselines need to know of a layer and its inputs, each computed when first asked for and then kept.

    Raises `ValueError` where `x` is not `[examples, d_in]`, not finite, or constant.
    """

    def __init__(self, layer: Layer, x: Rows):
        self.layer = layer
        self.x = activations("x", x, layer.d_in)

    @cached_property
    def inputs(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance of x."""
        return covariance(self.x)

    @cached_property
    def outputs(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance of y = f(x)."""
        return covariance(self.x, lambda x: apply(self.layer, jnp.asarray(x)))

    @cached_property
    def jacobian(self) -> JacobianMoments:
        """Moments of the Jacobian."""
        return jacobian_moments(self.layer, self.x)


# Full precision everywhere: these numbers define bases, and are computed once.


@eqx.filter_jit
def apply(layer: Layer, x: Float[Array, "n d_in"]) -> Float[Array, "n d_out"]:
    """The layer's outputs, jitted and in full precision."""
    with jax.default_matmul_precision("highest"):
        return layer(x)


@eqx.filter_jit
def _jacobian(layer, x, r_in, r_out):
    with jax.default_matmul_precision("highest"):
        return layer.jacobian(x, r_in, r_out)


@eqx.filter_jit
def _moment_sums(layer, x, counted):
    with jax.default_matmul_precision("highest"):
        j = layer.jacobian(x) * counted[:, None, None]
        return j.sum(axis=0), jnp.einsum("noi,noj->ij", j, j), jnp.einsum("noi,npi->op", j, j)


@eqx.filter_jit
def _gram_sum(layer, x, counted):
    with jax.default_matmul_precision("highest"):
        j = layer.jacobian(x) * counted[:, None, None]
        return (jnp.einsum("noi,noj->ij", j, j),)


def _mean_over_examples(chunk_sums, layer, x):
    """Mean over the examples of what `chunk_sums(layer, chunk, counted)` sums over one chunk."""
    x = jnp.asarray(x)
    totals = None
    for chunk, count in chunks(x, chunk_size(layer)):
        sums = chunk_sums(layer, chunk, jnp.asarray(np.arange(len(chunk)) < count, x.dtype))
        sums = [np.asarray(s, np.float64) for s in sums]
        totals = sums if totals is None else [t + s for t, s in zip(totals, sums, strict=True)]
    assert totals is not None
    return [t / len(x) for t in totals]
