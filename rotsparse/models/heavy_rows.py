"""Rows that hold nearly all of the variance: attention sinks, the few tokens whose activations are a hundred times as
large as the others' (Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2024).

A basis fitted to all rows describes these few, and measures in units of the overall rms take all other rows for zero.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

from rotsparse.data.sources import Source

NEARLY_ALL, FEW = 0.9, 0.02
_NUMBERS = 1 << 14  # that are looked at together
_STEPS, _STEPS_AN_OCTAVE = 1 << 14, 16


@dataclass(frozen=True)
class HeavyRows:
    """`rows` of `of` rows hold the share `variance` of the squared distance from the typical row. `token`: what the
    most of them are, `share` of them, where that is known."""

    rows: int
    of: int
    variance: float
    token: str | None = None
    share: float = 0.0

    def __str__(self) -> str:
        most = "" if self.token is None else f" {self.share:.0%} of them are the token {self.token!r}."
        return (
            f"{self.rows:,} of {self.of:,} rows ({self.rows / self.of:.2%}) hold {self.variance:.0%} of the variance "
            f"(attention sinks?): bases and measures will describe these few.{most}"
        )


def heavy_rows(
    store: Source,
    tokens: Callable[[], Iterator[Int[np.ndarray, "n"]]] | None = None,
    word: Callable[[int], str] = lambda token: f"number {token}",
) -> HeavyRows | None:
    """The rows that hold 90% of the variance, if they are at most 2% of all; `None` where there are no such.

    Distances are from the median row, which a few large ones do not move. They are counted by their size (in steps of
    4%), so that memory does not grow with the rows: of two rows of nearly the same size, either both count or none.
    `tokens` gives the token numbers of all rows in their order, `word` the word of one: the most frequent token of
    these rows is often an artefact of the text.
    """
    total, width = store.shape
    if total < 1 / FEW:
        return None
    sample = store.read(np.unique(np.linspace(0, total - 1, min(total, max(16, _NUMBERS // width))).astype(int)))
    middle = np.median(np.asarray(sample), axis=0)
    rows, held = np.zeros(2 * _STEPS, np.int64), np.zeros(2 * _STEPS)
    for sizes, squares in _sizes(store, middle):
        rows += np.bincount(sizes, minlength=len(rows))
        held += np.bincount(sizes, weights=squares, minlength=len(held))
    rows, held = np.cumsum(rows[::-1]), np.cumsum(held[::-1])
    if not held[-1] > 0:
        return None
    enough = int(np.argmax(held >= NEARLY_ALL * held[-1]))
    if rows[enough] > FEW * total:
        return None
    found = HeavyRows(int(rows[enough]), total, float(held[enough] / held[-1]))
    if tokens is None:
        return found
    heavy = np.concatenate([sizes >= 2 * _STEPS - 1 - enough for sizes, _ in _sizes(store, middle)])
    seen, start = [], 0
    for some in tokens():
        seen.append(some[heavy[start : start + len(some)]])
        start += len(some)
    values, counts = np.unique(np.concatenate(seen), return_counts=True)
    most = int(np.argmax(counts))
    return replace(found, token=word(int(values[most])), share=float(counts[most] / counts.sum()))


def _sizes(store: Source, middle: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The squared distance of every row from the middle, in steps of its logarithm and as it is, chunk by chunk."""
    total, width = store.shape
    step = max(1, _NUMBERS // width)
    for start in range(0, total, step):
        chunk = np.asarray(store.read(range(start, min(start + step, total)))) - middle
        squares = np.einsum("nd,nd->n", chunk, chunk, dtype=np.float64)
        sizes = np.log2(np.maximum(squares, 1e-300)) * _STEPS_AN_OCTAVE
        yield np.clip(np.rint(sizes).astype(int) + _STEPS, 0, 2 * _STEPS - 1), squares
