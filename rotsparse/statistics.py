"""Statistics of a layer over many examples: moments of activations and of Jacobians.

Examples stream through in chunks of a fixed number of bytes, so memory does not grow with their number. Sums within a
chunk are in the precision of the data, sums over chunks in float64 on the host.
"""

import dataclasses
import functools
import hashlib
import io
import os
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rotsparse.checks import activations
from rotsparse.files import write_atomically
from rotsparse.layers import Layer
from rotsparse.sharding import of_all_processes
from rotsparse.sources import Source, read_ahead

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


def evenly_spaced(x: Rows, count: int) -> Rows:
    """At most `count` of the rows, evenly spaced."""
    return x if count >= len(x) else x[np.arange(count) * len(x) // count]


@dataclasses.dataclass(frozen=True)
class Moments:
    """Count, mean and scatter `Σ (v - mean)(v - mean)ᵀ` of vectors, in float64.

    Each block is centred on its own mean and blocks are merged pairwise, so nothing cancels where the mean is much
    larger than the spread (Chan, Golub & LeVeque, "Algorithms for Computing the Sample Variance", 1983).
    """

    count: int
    mean: Float[np.ndarray, "d"]
    scatter: Float[np.ndarray, "d d"]

    @classmethod
    def none(cls, width: int) -> "Moments":
        """Of no vectors."""
        return cls(0, np.zeros(width), np.zeros((width, width)))

    @classmethod
    def of(cls, x: Rows) -> "Moments":
        """Of the rows of an array, in blocks."""
        blocks = (np.asarray(block)[:count] for block, count in chunks(x, block_rows(x.shape[1])))
        return functools.reduce(Moments.with_block, blocks, cls.none(x.shape[1]))

    def with_block(self, block: Float[np.ndarray, "n d"]) -> "Moments":
        """With more vectors."""
        centred = np.array(block, np.float64)
        mean = centred.mean(axis=0)
        centred -= mean
        return self.merged(Moments(len(block), mean, centred.T @ centred))

    def merged(self, other: "Moments") -> "Moments":
        """Of both sets of vectors."""
        total = self.count + other.count
        if not total:
            return self
        shift, share = other.mean - self.mean, other.count / total
        return Moments(
            total,
            self.mean + shift * share,
            self.scatter + other.scatter + np.outer(shift, shift) * (self.count * other.count / total),
        )

    @property
    def covariance(self) -> Float[np.ndarray, "d d"]:
        """`E[(v - E v)(v - E v)ᵀ]`."""
        return self.scatter / self.count

    @property
    def rms(self) -> float:
        """The root mean square of all entries."""
        return float(np.sqrt(np.mean(np.diagonal(self.covariance) + self.mean**2)))


def block_rows(width: int) -> int:
    """How many rows of a block are `CHUNK_BYTES` in float64."""
    return max(1, CHUNK_BYTES // (8 * width))


def covariance(
    x: Rows, function: Callable[[Rows], Array] | None = None
) -> tuple[Float[np.ndarray, "k"], Float[np.ndarray, "k k"]]:
    """Mean and covariance `E[(v - E v)(v - E v)ᵀ]` of `v = x`, or of `v = function(x)`, in float64, in one pass (see
    `Moments`)."""
    if function is None:
        moments = Moments.of(x)
    else:
        blocks = (np.asarray(function(block))[:count] for block, count in chunks(x, block_rows(x.shape[1])))
        first = next(blocks)
        moments = functools.reduce(Moments.with_block, blocks, Moments.none(first.shape[1]).with_block(first))
    return moments.mean, moments.covariance


def stream_moments(source: Source, path: str | os.PathLike | None = None, *, save_seconds: float = 60.0) -> Moments:
    """Mean and covariance of all rows of a source, in one pass over it; the next block is read meanwhile.

    With `path` the sums so far are saved there every `save_seconds` and at the end, and a pass that was interrupted
    goes on where they end: with the same bits, since the blocks are the same. A pass that was finished is not taken
    again. With several processes each goes through its share of the rows, in a file of its own.

    Raises `ValueError` where rows cannot be read or are not finite, and where `path` belongs to other data.
    """
    first, last = (len(source) * (jax.process_index() + i) // jax.process_count() for i in (0, 1))
    if path is not None and jax.process_count() > 1:
        path = f"{os.fspath(path)}.{jax.process_index()}-of-{jax.process_count()}"
    ends = hashlib.sha256(source.read(np.array([first, last - 1])).tobytes()).hexdigest()[:16]
    size = block_rows(source.shape[1])
    about = f"rows {first} to {last} of {source.fingerprint()} ({ends}) in blocks of {size}"
    moments = Moments.none(source.shape[1]) if path is None else _load_moments(path, about, source.shape[1])
    starts = range(first + moments.count, last, size)
    saved = time.monotonic()
    for block in read_ahead(functools.partial(source.read, range(a, min(a + size, last))) for a in starts):
        moments = moments.with_block(block)
        if path is not None and (time.monotonic() - saved >= save_seconds or first + moments.count == last):
            _save_moments(path, about, moments)
            saved = time.monotonic()
    counts, means, scatters = map(of_all_processes, (np.asarray(moments.count), moments.mean, moments.scatter))
    return functools.reduce(Moments.merged, map(Moments, counts.tolist(), means, scatters))


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


def _save_moments(path: str | os.PathLike, about: str, moments: Moments) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, about=about, **dataclasses.asdict(moments))
    write_atomically(path, buffer.getvalue())


def _load_moments(path: str | os.PathLike, about: str, width: int) -> Moments:
    """What was saved of a pass; nothing where there is no file, or a damaged one: the pass is taken again."""
    try:
        with open(path, "rb") as f, np.load(f, allow_pickle=False) as file:
            found = str(file["about"])
            moments = Moments(int(file["count"]), file["mean"], file["scatter"])
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return Moments.none(width)
    if found != about:
        raise ValueError(f"{path} holds the moments of {found}, not of {about}: remove it, or choose another path")
    return moments
