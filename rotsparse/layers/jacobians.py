"""Statistics of a layer over many examples: moments of activations and of Jacobians.

Examples are processed in chunks of a fixed number of bytes, so memory does not grow with their number. Sums within a
chunk have the precision of the data; sums over chunks are in float64 on the host.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import TypeGuard

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rotsparse._core.checks import activations
from rotsparse._core.orthogonal import WIDE
from rotsparse._core.precision import full_precision
from rotsparse._core.types import AnyArray, Rows
from rotsparse.data import moments
from rotsparse.data.moments import chunks, covariance
from rotsparse.layers.base import ClosedForm, Layer
from rotsparse.layers.closed_moments import JacobianMoments, closed_gram, closed_moments
from rotsparse.layers.subspace import Subspace


def chunk_size(layer: Layer, chunk_bytes: int | None = None) -> int:
    """The number of examples whose float32 Jacobians fit into `chunk_bytes` (default: `moments.CHUNK_BYTES`), at least
    one.

    An example needs `d_out·d_in` numbers for its Jacobian and `d_hidden·d_in` for its gated weights, the size of the
    largest weight matrix.
    """
    sizes = [np.size(leaf) for leaf in jax.tree.leaves(layer) if eqx.is_array_like(leaf)]
    numbers = max([layer.d_out * layer.d_in, *sizes])
    return max(1, (moments.CHUNK_BYTES if chunk_bytes is None else chunk_bytes) // (4 * numbers))


def one_at_a_time(layer: Layer) -> bool:
    """Whether Jacobians are evaluated one at a time: where one fills what a product takes at once, and on a CPU those
    of all wide layers, because the next product then finds them in the cache (objective and gradient at a width of 256
    take two thirds of the time, at 384 nine tenths). Gathered neurons differ between examples, so their products are
    of single examples anyway."""
    plain = layer.layer if isinstance(layer, Subspace) else layer
    wide = isinstance(plain, ClosedForm) and plain.active is None and layer.d_in * layer.d_out >= WIDE**2
    return (wide and jax.default_backend() == "cpu") or chunk_size(layer, moments.at_once_bytes()) == 1


def jacobian_moments(layer: Layer, x: Rows) -> JacobianMoments:
    """`E[J]`, `E[JᵀJ]`, `E[JJᵀ]` over the examples. Besides the Jacobian, each example costs two matrix products of
    `2·d_out·d_in·(d_in + d_out)` flops in total; of wide layers with a closed form no Jacobian is formed
    (`closed_moments`)."""
    if _wide(layer):
        return closed_moments(layer, x)
    return JacobianMoments(*_mean_over_examples(_moment_sums, layer, x))


def jacobian_gram(layer: Layer, x: Rows) -> Float[np.ndarray, "d_in d_in"]:
    """`E[JᵀJ]`. The quadratic form `r E[JᵀJ] rᵀ` is the mean squared length of the response of the output to direction
    r."""
    if _wide(layer):
        return closed_gram(layer, x)
    return _mean_over_examples(_gram_sum, layer, x)[0]


def jacobian_flops(layer: Layer) -> float:
    """Of the objective and its gradient on one example: `2·(d_out·h·d_in + d_out²·d_in + d_out·d_in²)`, without the
    first term where the outputs are the neurons."""
    hidden = len(layer.rights[0]) if isinstance(layer, ClosedForm) and layer.left is not None else 0
    return 2.0 * layer.d_out * layer.d_in * (hidden + layer.d_in + layer.d_out)


def _wide(layer: Layer) -> TypeGuard[ClosedForm]:
    """Whether moments of its Jacobians are cheaper from those of its gates. These take `8·k²` bytes, k gates."""
    if not isinstance(layer, ClosedForm) or layer.d_in * layer.d_out < WIDE**2:
        return False
    return len(layer.rights) * len(layer.rights[0]) <= _MOST_GATES


_MOST_GATES = 8192


def jacobians(layer: Layer, x: Rows, r_in=None, r_out=None) -> Iterator[np.ndarray]:
    """The rotated Jacobians `R_out J R_inᵀ` as NumPy arrays `[c, d_out, d_in]`, a few at a time, in the order of `x`.

    The rows of `r_in` and `r_out` may have any length: a row scaled by s scales its column (row) of the Jacobian.
    """
    r_in, r_out = (None if r is None else jnp.asarray(r, x.dtype) for r in (r_in, r_out))
    size = chunk_size(layer)
    if alone := one_at_a_time(layer):
        # Only Jacobians are kept. The weights are rotated once a chunk, which takes as long as two examples.
        size = max(1, moments.CHUNK_BYTES // (4 * layer.d_out * layer.d_in))
    few = max(1, _CACHED_BYTES // (4 * layer.d_out * layer.d_in))
    for chunk, count in chunks(x, size):
        found = np.asarray(_jacobian(layer, chunk, r_in, r_out, alone))
        for begin in range(0, count, few):
            yield found[begin : min(begin + few, count)]


# What is made of so many Jacobians at a time stays in the processor's cache.
_CACHED_BYTES = 8 * 2**20


class LayerStatistics:
    """The statistics of a layer and its inputs that baselines use, each computed on first use and then kept.

    Raises `ValueError` if `x` is not `[examples, d_in]`, not finite, or constant.
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

    @property
    def gate_powers(self) -> list[Float[np.ndarray, "hidden"]]:
        """`E[g²]` of every hidden neuron, for every way in; gates include the `1/r` of a norm in front. Needs a
        `ClosedForm` layer."""
        return self._gates[::2]

    @property
    def gate_rates(self) -> list[Float[np.ndarray, "hidden"]]:
        """The share of examples on which the gate of every hidden neuron is not zero, for every way in."""
        return self._gates[1::2]

    @cached_property
    def _gates(self) -> list[np.ndarray]:
        return _mean_over_examples(_gate_sums, self.layer, self.x)


# Full precision everywhere, because baselines are computed once, from these numbers.


@eqx.filter_jit
def apply(layer: Layer, x: Float[AnyArray, "n d_in"]) -> Float[Array, "n d_out"]:
    """The layer's outputs, jitted and in full precision."""
    with full_precision():
        return jnp.asarray(layer(x))


@eqx.filter_jit
def _jacobian(layer, x, r_in, r_out, alone):
    with full_precision():
        if not alone:
            return layer.jacobian(x, r_in, r_out)
        rows = jax.tree.map(lambda a: a[:, None], (x, layer.prepared(x)))
        return jax.lax.map(lambda row: layer.prepared_jacobian(*row, r_in, r_out)[0], rows)


@eqx.filter_jit
def _moment_sums(layer, x, counted):
    with full_precision():
        j = layer.jacobian(x) * counted[:, None, None]
        return j.sum(axis=0), jnp.einsum("noi,noj->ij", j, j), jnp.einsum("noi,npi->op", j, j)


@eqx.filter_jit
def _gram_sum(layer, x, counted):
    with full_precision():
        j = layer.jacobian(x) * counted[:, None, None]
        return (jnp.einsum("noi,noj->ij", j, j),)


@eqx.filter_jit
def _gate_sums(layer, x, counted):
    sums = []
    with full_precision():
        for gate in layer.gates(x):
            scaled = gate if layer.norm is None else gate * layer.norm.direction(x)[1]
            sums += [counted @ jnp.square(scaled), counted @ jnp.asarray(gate != 0, x.dtype)]
    return sums


def _mean_over_examples(chunk_sums, layer, x):
    """Mean over the examples; `chunk_sums(layer, chunk, counted)` returns the sums over one chunk."""
    x = jnp.asarray(x)
    totals = None
    for chunk, count in chunks(x, chunk_size(layer)):
        sums = chunk_sums(layer, chunk, jnp.asarray(np.arange(len(chunk)) < count, x.dtype))
        sums = [np.asarray(s, np.float64) for s in sums]
        totals = sums if totals is None else [t + s for t, s in zip(totals, sums, strict=True)]
    assert totals is not None
    return [t / len(x) for t in totals]
