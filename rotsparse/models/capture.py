"""From text to activation stores: run a model over tokens and keep what passes at some of its points.

Tokens stream in and rows stream out, a batch at a time: memory does not grow with their number. What each shard holds
depends only on the settings and its number, so an interrupted capture goes on with the first shard that is missing.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rotsparse._core.lock import FolderLock
from rotsparse.data.store import ActivationStore, StoreWriter
from rotsparse.models.model import Model
from rotsparse.models.sequences import TextFile, TokenFile
from rotsparse.models.transformer import Point, check_point, run


def capture(
    model: Model,
    source: TextFile | TokenFile,
    points: Sequence[tuple[int, str]],
    folder: str | os.PathLike,
    *,
    length: int = 128,
    keep: float = 1.0,
    sequences: int | None = None,
    batch: int = 8,
    seed: int = 0,
    dtype: type = np.float32,
    shard_bytes: int = 64 * 2**20,
    progress: bool = False,
) -> list[ActivationStore]:
    """Write what passes at `points` into `folder/LAYER.SITE`, a store for each, and open them.

    The model sees sequences of `length` tokens (the tokenizer's prefix and suffix included; those positions are not
    kept), at most `sequences` of them. Of each, the share `keep` of its positions is kept, drawn without replacement by
    `seed`. `dtype` is float32, or float16 to halve the files. An interrupted capture is taken up where it stopped; a
    finished one is only opened.

    Raises `ValueError` for settings that make no sense, tokens that the model does not have, activations that are not
    finite, a folder that another model or other settings wrote to, and one that another capture is writing to.
    """
    wanted = list(dict.fromkeys(check_point(model.config, point) for point in points))
    body = length - len(source.prefix) - len(source.suffix)
    if not wanted:
        raise ValueError("no points to capture: give at least one, such as (0, 'input')")
    if not 0 < keep <= 1 or body < 1 or length > model.config.max_positions:
        raise ValueError(
            f"capture needs 0 < keep <= 1, and sequences longer than their {length - body} special tokens and at most "
            f"the model's {model.config.max_positions} positions: got keep={keep}, length={length}"
        )
    if np.dtype(dtype) not in (np.float32, np.float16):
        raise ValueError(f"activations are stored as float32 or float16, not {np.dtype(dtype)}")
    width = max(_width(model, point) for point in wanted)
    per_shard = _sequences_per_shard(shard_bytes, round(keep * body) or 1, width * np.dtype(dtype).itemsize, batch)
    settings = {
        "model": model.fingerprint(),
        "architecture": model.config.architecture,
        "tokens": {**source.identity(), "length": length, "sequences": sequences, "keep": keep, "seed": seed},
        "sequences_per_shard": per_shard,
        "batch": batch,
        "dtype": np.dtype(dtype).name,
    }

    def open_writers():
        return [
            StoreWriter(
                Path(folder) / str(p), {**settings, "layer": p.layer, "site": p.site, "width": _width(model, p)}
            )
            for p in wanted
        ]

    writers = open_writers()
    if not all(writer.complete for writer in writers):
        lock = FolderLock(folder)
        try:
            writers = open_writers()  # again, now that nobody else writes
            first = min(writer.shards for writer in writers)
            work = _Work(model, source, tuple(wanted), length, body, keep, sequences, batch, seed, np.dtype(dtype))
            with _bar(progress) as bar:
                task = bar.add_task(f"capture {', '.join(map(str, wanted))}", total=source.size)
                for shard, batches in work.shards(per_shard, first, partial(bar.update, task)):
                    for rows in batches:
                        for writer, array in zip(writers, rows, strict=True):
                            writer.append(shard, array)
                    for writer in writers:
                        writer.close(shard)
        finally:
            for writer in writers:
                writer.abandon()
            lock.release()
    if not all(writer.shards for writer in writers):
        raise ValueError(f"{source.path} holds no tokens")
    return [writer.finish() for writer in writers]


@dataclass(frozen=True)
class _Work:
    """Everything that determines the rows."""

    model: Model
    source: TextFile | TokenFile
    points: tuple[Point, ...]
    length: int
    body: int  # tokens of a sequence that are neither prefix nor suffix
    keep: float
    sequences: int | None
    batch: int
    seed: int
    dtype: np.dtype

    def shards(
        self, per_shard: int, first: int, progress: Callable
    ) -> Iterator[tuple[int, Iterator[list[np.ndarray]]]]:
        """Every shard from number `first` on: its number, and its rows in batches, an array for each point."""
        lines = itertools.islice(self.source.sequences(self.body), self.sequences)
        params = jax.tree.map(jnp.asarray, self.model.params)

        def batches(shard: int, group: list) -> Iterator[list[np.ndarray]]:
            for start in range(0, len(group), self.batch):
                chunk = group[start : start + self.batch]
                yield self._rows(params, [line for line, _ in chunk], shard * per_shard + start)
                progress(completed=chunk[-1][1])

        # Tokens of finished shards are read over, not run.
        for shard, group in enumerate(itertools.islice(_groups(lines, per_shard), first, None), start=first):
            yield shard, batches(shard, group)

    def _rows(self, params, lines: list[np.ndarray], number: int) -> list[np.ndarray]:
        """The kept rows of a batch whose first sequence has that number."""
        tokens, mask, kept = self._batch(lines, number)
        seen = _forward(params, tokens, mask, config=self.model.config, points=self.points)
        return [_stored(np.asarray(values)[kept], self.dtype, number) for values in seen]

    def _batch(self, lines, number) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens `[batch, length]`, False where there are none, True where the row is kept."""
        shape = (self.batch, self.length)
        tokens, mask, kept = np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape, bool)
        for i, body in enumerate(lines):
            line = [*self.source.prefix, *body, *self.source.suffix]
            if min(line) < 0 or max(line) >= self.model.config.vocab_size:
                raise ValueError(
                    f"{self.source.path} has tokens from {min(line)} to {max(line)}, the model's are 0 to "
                    f"{self.model.config.vocab_size - 1}: they do not belong together"
                )
            tokens[i, : len(line)], mask[i, : len(line)] = line, True
            # The draw depends on nothing but the seed and the sequence's number.
            rng = np.random.default_rng([self.seed, number + i])
            chosen = rng.choice(len(body), size=max(1, round(self.keep * len(body))), replace=False)
            kept[i, len(self.source.prefix) + chosen] = True
        return tokens, mask, kept


def _groups(items: Iterator, size: int) -> Iterator[list]:
    while group := list(itertools.islice(items, size)):
        yield group


def _width(model: Model, point: Point) -> int:
    return model.config.d_hidden if point.site == "hidden" else model.config.d_model


def _sequences_per_shard(shard_bytes: int, rows: int, row_bytes: int, batch: int) -> int:
    """As many as fit, whole batches only."""
    return max(1, shard_bytes // (rows * row_bytes * batch)) * batch


@partial(jax.jit, static_argnames=("config", "points"))
def _forward(params, tokens, mask, *, config, points):
    # What comes behind the last point is never computed: nothing here uses it.
    seen = run(params, config, tokens, mask=mask, capture=points)[1]
    return [seen[point] for point in points]


def _stored(values: np.ndarray, dtype, sequence: int) -> np.ndarray:
    """In the store's type, checked to be finite."""
    with np.errstate(over="ignore"):
        stored = values.astype(dtype)
    if not np.isfinite(stored).all():
        raise ValueError(
            f"activations of the sequences from number {sequence} on are not finite"
            + (f" in {stored.dtype}: store float32" if np.isfinite(values).all() else "")
        )
    return stored


def _bar(enabled: bool) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    return Progress(*columns, TimeRemainingColumn(), disable=not enabled)
