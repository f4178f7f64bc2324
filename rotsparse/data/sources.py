"""Sources: examples that stay on disk, of which only requested rows are read.

A fit needs random minibatches, one pass for the covariance, and a sample of bounded size on which rotations are judged.
So a source offers random access only. The rows of a step follow from the key and the number of the step, and are those
that an array in memory would give; no position in the data has to be stored.

Files are read, not memory-mapped: the pages of a mapped file count as memory of the process, and a truncated file would
end the process without a message.
"""

import abc
import itertools
import mmap
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, Int

from rotsparse._core.reading import check_typed, npy_header, regular_file
from rotsparse._core.threads import in_threads
from rotsparse._core.types import Data

# Size of the sample of a source that is kept in memory: for judging rotations, `E[JᵀJ]`, the covariance of outputs, and
# pair searches.
RESIDENT_EXAMPLES = 8192
RESIDENT_BYTES = 256 * 2**20

# Rows are drawn as 32-bit numbers.
MOST_ROWS = 2**31 - 1

T = TypeVar("T")


class Source(abc.ABC):
    """`n` examples of `width` numbers, read by their index. Subclass it for a format of your own: set `shape`, and
    implement `_rows` and `where`."""

    shape: tuple[int, int]

    @abc.abstractmethod
    def _rows(self, rows: Int[np.ndarray, "k"]) -> Float[np.ndarray, "k width"]:
        """Read these rows, in this order, as floating-point numbers. Indices are within the source and may repeat."""

    @abc.abstractmethod
    def where(self, row: int) -> str:
        """The origin of a row, for error messages."""

    def read(self, rows: Int[np.ndarray, "k"] | range) -> Float[np.ndarray, "k width"]:
        """Read these rows, in this order, as float32 or float64. Raises `ValueError`, with the row and its file, if a
        row is outside the source, cannot be read, differs in width, or is not finite."""
        rows = np.asarray(rows, np.int64)
        if len(rows) and not (0 <= rows.min() and rows.max() < len(self)):
            raise ValueError(f"rows {rows.min()} to {rows.max()} are outside {self}, which has {len(self)}")
        x = self._rows(rows)
        assert x.shape == (len(rows), self.shape[1])
        if x.dtype not in (np.float32, np.float64):
            x = x.astype(np.float32)
        finite = np.isfinite(x).all(axis=1)
        if not finite.all():
            bad = np.unique(rows[~finite])
            raise ValueError(
                f"{len(bad)} of {len(x)} rows that were read contain NaN or infinity, the first is "
                f"{self.where(bad[0])}: check where it comes from, and leave such rows out of the data"
            )
        return x

    def part(self, examples: int) -> Float[np.ndarray, "k width"]:
        """One random row out of each of `examples` equal parts, always the same ones; all rows if there are no more."""
        n = len(self)
        if examples >= n:
            return self.read(range(n))
        # Random, because evenly spaced rows might all have the same position in a sequence.
        offsets = np.random.default_rng(0).random(examples)
        return self.read(((np.arange(examples) + offsets) * (n / examples)).astype(np.int64))

    def resident(self, most: int | None = None) -> Float[np.ndarray, "k width"]:
        """The sample of the source that a fit keeps in memory, of at most `most` rows."""
        count = max(2, min(RESIDENT_EXAMPLES, RESIDENT_BYTES // (4 * self.shape[1])))
        return self.part(count if most is None else min(count, most))

    def fingerprint(self) -> str:
        """A description that checkpoints compare, besides a hash of the sample in memory. It contains no path, so data
        may be moved to another folder."""
        return f"a source of {self.shape[0]} x {self.shape[1]}"

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, row: int) -> Float[np.ndarray, "width"]:
        """One row. With `len`, this is the interface of `grain.MapDataset.source` and other pipelines."""
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        return self.read(np.array([row % len(self)]))[0]


class NpyFile(Source):
    """The rows of a `.npy` file `[n, width]`, or of a part of it.

    Raises `ValueError` if it is not a floating-point matrix in C order, and, when rows are read, if the file has become
    shorter or is gone.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            with regular_file(self.path).open("rb") as f:
                shape, fortran_order, self.dtype = npy_header(f)
                self.offset = f.tell()
        except Exception as error:  # NumPy's parser raises many kinds of error for a damaged header
            raise ValueError(f"cannot read {self.path}: {error}") from None
        check_typed(self.path, self.dtype)
        if len(shape) != 2 or fortran_order or self.dtype.kind != "f":
            order = " in Fortran order" if fortran_order else ""
            raise ValueError(
                f"{self.path} holds {self.dtype} {list(shape)}{order}: expected floating-point numbers "
                "[examples, width] in C order (save them with np.save(path, np.ascontiguousarray(x)))"
            )
        self.shape = shape
        end = self.offset + shape[0] * shape[1] * self.dtype.itemsize
        if self.path.stat().st_size < end:
            raise ValueError(f"cannot read {self.path}: it ends before its row {self._whole_rows()} of {shape[0]}")

    @classmethod
    def of_map(cls, x: np.memmap) -> "NpyFile":
        """The file of a memory map, or of a range of its rows."""
        root = x
        while isinstance(root.base, np.memmap):
            root = root.base
        if x.ndim != 2 or not x.flags.c_contiguous or root.mode == "c" or not isinstance(root.base, mmap.mmap):
            raise ValueError(
                "a memory map should be of a file, [examples, width], with all columns of neighbouring rows and no "
                f"private changes, got {list(x.shape)}: hand in x[first:last], or load it with np.array(x)"
            )
        file = object.__new__(cls)
        file.path, file.dtype, file.shape = Path(str(root.filename)), x.dtype, x.shape
        file.offset = root.offset + x.ctypes.data - root.ctypes.data
        return file

    def where(self, row):
        return f"row {row} of {self.path}"

    def __repr__(self):
        return f"{self.path} {list(self.shape)}"

    def _rows(self, rows):
        order = np.argsort(rows, kind="stable")
        wanted = rows[order]
        out = np.empty((len(rows), self.shape[1]), self.dtype)
        bounds = [*np.flatnonzero(np.diff(wanted, prepend=-2) != 1), len(wanted)]
        width = self.shape[1] * self.dtype.itemsize
        try:
            with self.path.open("rb", buffering=0) as f:
                for begin, end in itertools.pairwise(bounds):  # runs of neighbouring rows
                    f.seek(self.offset + int(wanted[begin]) * width)
                    _fill(f, out[begin:end].reshape(-1).view(np.uint8).data)
        except EOFError:
            raise ValueError(
                f"cannot read {self.path}: it has become shorter and ends before its row {self._whole_rows()} of "
                f"{len(self)}. Write it again"
            ) from None
        except OSError as error:
            raise ValueError(f"cannot read {self.path}: {error}. Put it back, or write it again") from None
        if not np.array_equal(order, np.arange(len(order))):
            out[order] = out.copy()
        return out.astype(out.dtype.newbyteorder("="), copy=False)

    def _whole_rows(self):
        """How many complete rows the file has now."""
        return max(0, self.path.stat().st_size - self.offset) // (self.shape[1] * self.dtype.itemsize)


class Shards(Source):
    """Several sources of equal width, one after another."""

    def __init__(self, sources: Sequence[Source]):
        self.sources = tuple(sources)
        if not self.sources:
            raise ValueError("expected at least one file or source, got none")
        widths = [source.shape[1] for source in self.sources]
        if len(set(widths)) > 1:
            odd = next(source for source in self.sources if source.shape[1] != widths[0])
            raise ValueError(f"{odd} is {odd.shape[1]} wide and {self.sources[0]} {widths[0]}: expected one width")
        self._ends = np.cumsum([len(source) for source in self.sources])
        self.shape = (int(self._ends[-1]), widths[0])

    def where(self, row):
        shard = int(np.searchsorted(self._ends, row, side="right"))
        return self.sources[shard].where(int(row - self._first(shard)))

    def __repr__(self):
        return f"{self.sources[0]} and {len(self.sources) - 1} more"

    def _rows(self, rows):
        shards = np.searchsorted(self._ends, rows, side="right")
        out = np.zeros((len(rows), self.shape[1]), np.float32)  # not np.empty: it may be cast before it is filled
        for shard in map(int, np.unique(shards)):
            here = shards == shard
            part = self.sources[shard]._rows(rows[here] - self._first(shard))
            out = out.astype(np.promote_types(out.dtype, part.dtype), copy=False)
            out[here] = part
        return out

    def _first(self, shard):
        return self._ends[shard] - len(self.sources[shard])


class RowRange(Source):
    """Neighbouring rows of another source."""

    def __init__(self, source: Source, rows: range):
        assert rows.step == 1 and 0 <= rows.start < rows.stop <= len(source)
        self.source, self.first = source, rows.start
        self.shape = (len(rows), source.shape[1])

    def where(self, row):
        return self.source.where(row + self.first)

    def __repr__(self):
        return f"rows {self.first} to {self.first + len(self) - 1} of {self.source}"

    def _rows(self, rows):
        return self.source._rows(rows + self.first)


class Mapped(Source):
    """A function `[k, width] -> [k, d]`, such as a layer, applied to the rows of another source whenever rows are
    read."""

    def __init__(self, source: Source, function: Callable[[Any], Any]):
        self.source, self.function = source, function
        self.shape = (len(source), self._rows(np.array([0])).shape[1])

    def where(self, row):
        return f"what a function made of {self.source.where(row)}"

    def __repr__(self):
        return f"a function of {self.source}"

    def _rows(self, rows):
        return np.asarray(self.function(self.source.read(rows)))


class ArrayRows(Source):
    """The rows of an array in memory."""

    def __init__(self, x: Data):
        self.x = np.asarray(x)
        self.shape = self.x.shape

    def where(self, row):
        return f"row {row}"

    def _rows(self, rows):
        return self.x[rows]


class Dataset(Source):
    """Anything with a length whose elements are vectors, such as a `grain.MapDataset` of one epoch (without `repeat`).

    Elements are read one at a time in a background thread.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset
        if not 0 < len(dataset) <= MOST_ROWS:
            raise ValueError(
                f"a dataset should have from 1 to {MOST_ROWS:,} elements, this one has {len(dataset):,}: leave out "
                "`repeat`, a fit goes through the examples for as long as it takes"
            )
        self.shape = (len(dataset), len(self._element(0)))

    def where(self, row):
        return f"element {row} of {type(self.dataset).__name__}"

    def _rows(self, rows):
        elements = [self._element(int(row)) for row in rows]
        for row, element in zip(rows, elements, strict=True):
            if element.shape != self.shape[1:]:
                raise ValueError(f"{self.where(row)} has shape {list(element.shape)}, expected {[self.shape[1]]}")
        return np.stack(elements) if elements else np.empty((0, self.shape[1]), np.float32)

    def _element(self, row):
        try:
            element = self.dataset[row]
        except (LookupError, OSError) as error:
            raise ValueError(f"cannot read {self.where(row)} of {len(self.dataset)}: {error!r}") from error
        array = np.asarray(element)
        if array.ndim != 1 or array.dtype.kind != "f":
            got = "nothing (it was filtered out)" if element is None else f"{array.dtype} {list(array.shape)}"
            raise ValueError(f"{self.where(row)} should be a vector of floating-point numbers, got {got}")
        return array


def as_source(x: Any) -> Source | None:
    """`x` as a source, if it is a `Source`, a NumPy memory map, or a dataset with a length and elements; `None` for
    arrays. Raises `ValueError` for a source that cannot be used."""
    if isinstance(x, np.memmap):
        x = NpyFile.of_map(x)
    elif not isinstance(x, Source):
        if isinstance(x, Sequence) or hasattr(x, "__array__") or not hasattr(x, "__getitem__"):
            return None
        x = Dataset(x)
    if len(x) > MOST_ROWS:
        raise ValueError(f"{x} has {len(x):,} rows: at most {MOST_ROWS:,} can be drawn from, use a part of it")
    return x


def in_memory(x: Any, most: int | None = None) -> tuple[Any, Source | None]:
    """The rows of `x` that are kept in memory (all of an array, a sample of a source), and the source if it has more.
    With `most`, an array of more rows is a source too, of which so many are looked at.

    Raises `ValueError` for a source that cannot be used."""
    source = as_source(x)
    if source is None:
        if most is None or np.ndim(x) != 2 or len(x) <= most:
            return x, None
        source = ArrayRows(x)
    kept = source.resident(most)
    return kept, None if len(kept) == len(source) else source


def read_ahead(reads: Iterable[Callable[[], T]]) -> Generator[T, None, None]:
    """The result of each function, while the next one runs in a background thread. The iterable advances in the
    caller's thread, one function ahead of the result."""
    return in_threads(lambda read: read(), reads, threads=1)


def _fill(file, buffer: memoryview) -> None:
    """Read until the buffer is full. Raises `EOFError`."""
    while buffer:
        count = file.readinto(buffer)
        if not count:
            raise EOFError
        buffer = buffer[count:]
