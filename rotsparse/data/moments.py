"""Moments of vectors over many examples, in one pass and in float64."""

import dataclasses
import functools
import hashlib
import os
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from rotsparse._core.files import check_new_file, npz, write_atomically
from rotsparse._core.reading import load_npz
from rotsparse._core.types import AnyArray, Rows
from rotsparse.data.devices import of_all_processes
from rotsparse.data.sources import Source, read_ahead

CHUNK_BYTES = 64 * 2**20


def at_once_bytes() -> int:
    """Memory for the arrays of the examples that one matrix product takes at once. On a CPU more is not faster: this
    keeps the products of a core busy and their results in the cache. Accelerators are only busy with many examples."""
    return (8 if jax.default_backend() == "cpu" else 256) * 2**20


def chunks(x: Shaped[AnyArray, "n ..."], size: int) -> Iterator[tuple[Shaped[AnyArray, "m ..."], int]]:
    """Split `x` into chunks of `size` rows; each comes with the number of its rows that are not padding.

    The last chunk is padded by repeating its last row, so that a jitted function sees one shape only.
    """
    size = min(size, len(x))
    for start in range(0, len(x), size):
        count = min(size, len(x) - start)
        rows = slice(start, start + size) if count == size else np.minimum(np.arange(start, start + size), len(x) - 1)
        yield x[rows], count


def evenly_spaced(x: Shaped[AnyArray, "n *row"], count: int) -> Shaped[AnyArray, "m *row"]:
    """At most `count` rows, evenly spaced."""
    return x if count >= len(x) else x[np.arange(count) * len(x) // count]


@dataclasses.dataclass(frozen=True)
class Moments:
    """Count, mean and scatter `Σ (v - mean)(v - mean)ᵀ` of vectors, in float64.

    Each block is centred on its own mean and blocks are merged pairwise, which avoids cancellation if the mean is much
    larger than the spread (Chan, Golub & LeVeque, "Algorithms for Computing the Sample Variance", 1983).
    """

    count: int
    mean: Float[np.ndarray, "d"]
    scatter: Float[np.ndarray, "d d"]

    @classmethod
    def none(cls, width: int) -> "Moments":
        """The moments of no vectors."""
        return cls(0, np.zeros(width), np.zeros((width, width)))

    @classmethod
    def of(cls, x: Rows) -> "Moments":
        """The moments of the rows of an array, computed in blocks."""
        blocks = (np.asarray(block)[:count] for block, count in chunks(x, block_rows(x.shape[1])))
        return functools.reduce(Moments.with_block, blocks, cls.none(x.shape[1]))

    def with_block(self, block: Float[np.ndarray, "n d"]) -> "Moments":
        """The moments with the rows of `block` added."""
        centred = np.array(block, np.float64)
        mean = centred.mean(axis=0)
        centred -= mean
        return self.merged(Moments(len(block), mean, centred.T @ centred))

    def merged(self, other: "Moments") -> "Moments":
        """The moments of both sets of vectors together."""
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
    """How many rows of this width fit into `CHUNK_BYTES` in float64; at least one."""
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


# A row this many times as far from the median row as half of the rows are says nothing about how far rows go.
FAR = 5.0


def scale_covariance(x: Rows) -> Float[np.ndarray, "d d"]:
    """The covariance that standard deviations are taken from: that of all rows but those that are more than `FAR` times
    as far from the median row as the median distance. Without such rows it is the covariance itself, to the bit.

    In the residual stream of a transformer one row in a hundred (an attention sink) can hold 99% of the variance; the
    deviation of a direction would then be the sinks'.
    """
    far = _far(x)
    if not far.any():
        return Moments.of(x).covariance
    near = (np.asarray(x[rows])[~far[rows]] for rows in _slices(x))
    return functools.reduce(Moments.with_block, near, Moments.none(x.shape[1])).covariance


def far_rows(x: Rows) -> int:
    """How many rows `scale_covariance` leaves out."""
    return int(np.count_nonzero(_far(x)))


def _far(x: Rows) -> Bool[np.ndarray, "n"]:
    middle = np.median(np.asarray(evenly_spaced(x, _MEDIAN_ROWS)), axis=0).astype(np.float64)
    distances = np.concatenate(
        [np.linalg.norm(np.asarray(x[rows], np.float64) - middle, axis=1) for rows in _slices(x)]
    )
    limit = FAR * np.median(distances)
    return distances > limit if limit > 0 else np.zeros(len(distances), bool)


_MEDIAN_ROWS = 1024  # enough for a middle that a few rows do not move


def _slices(x: Rows) -> Iterator[slice]:
    step = block_rows(x.shape[1])
    return (slice(start, start + step) for start in range(0, len(x), step))


def stream_moments(source: Source, path: str | os.PathLike | None = None, *, save_seconds: float = 60.0) -> Moments:
    """Mean and covariance of all rows of a source, in one pass; each block is read while the one before is summed.

    With `path` the sums are saved there every `save_seconds` and at the end. An interrupted pass resumes from them with
    the same blocks, and so with the same bits; a complete pass is not repeated. Of several processes each reads its
    share of the rows and writes its own file.

    Raises `ValueError` if rows cannot be read or are not finite, or if `path` belongs to other data or was not written
    by rotsparse.
    """
    first, last = (len(source) * (jax.process_index() + i) // jax.process_count() for i in (0, 1))
    if path is not None and jax.process_count() > 1:
        path = f"{os.fspath(path)}.{jax.process_index()}-of-{jax.process_count()}"
    if path is not None:
        check_new_file(path, overwrite=True)  # before the pass
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


def _save_moments(path: str | os.PathLike, about: str, moments: Moments) -> None:
    write_atomically(path, npz(about=about, **dataclasses.asdict(moments)))


def _load_moments(path: str | os.PathLike, about: str, width: int) -> Moments:
    """The saved moments of a pass; those of no rows if the file is missing or damaged, so that the pass starts again.
    Raises `ValueError` for moments of other data."""
    try:
        file = load_npz(path)
        found = str(file["about"])
        moments = Moments(int(file["count"]), file["mean"], file["scatter"])
    except (ValueError, KeyError, TypeError):
        return Moments.none(width)
    if found != about:
        raise ValueError(f"{path} holds the moments of {found}, not of {about}: remove it, or choose another path")
    return moments
