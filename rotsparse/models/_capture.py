"""From text to activation stores: run a model over tokens and save the activations at some of its points.

Tokens are read and rows written one batch at a time, so memory does not grow with their number. The content of a shard
depends only on the settings and its number, so an interrupted capture resumes with the first missing shard.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rotsparse._core.lock import FolderLock
from rotsparse._core.precision import full_precision
from rotsparse.data.store import NO_TOKEN, ActivationStore, StoreWriter
from rotsparse.models.heavy_rows import heavy_rows
from rotsparse.models.inputs import ImageInputs, TokenInputs
from rotsparse.models.model import Model
from rotsparse.models.sequences import ImageFile, TextFile, TokenFile
from rotsparse.models.transformer import Point, check_point, run, site_width
from rotsparse.models.words import vocabulary


def capture(
    model: Model,
    source: TextFile | TokenFile | ImageFile,
    points: Sequence[tuple[int, str]],
    folder: str | os.PathLike,
    *,
    length: int = 128,
    keep: float = 1.0,
    sequences: int | None = None,
    special: bool = False,
    batch: int = 8,
    seed: int = 0,
    dtype: type = np.float32,
    shard_bytes: int = 64 * 2**20,
    progress: bool = False,
) -> list[ActivationStore]:
    """Write the activations at each of `points` into the store `folder/LAYER.SITE`, and open the stores.

    The model reads at most `sequences` sequences of `length` tokens, including the tokenizer's prefix and suffix.
    Positions of prefix, suffix and padding are not kept; those of other special tokens, such as separators between
    texts, only with `special`. Of the remaining positions of each sequence the share `keep` is kept, drawn without
    replacement by `seed`. Image models read whole images, and ignore `length`. `dtype` is float32, or float16 to halve
    the files. An interrupted capture resumes where it stopped; a complete one is only opened.

    A store says of every row from which sequence and position it comes, and holds the tokens of all sequences, so that
    rows can be shown in their context (also where `keep` leaves out their neighbours).

    The manifest of a store says under `heavy_rows` whether a few rows hold nearly all of the variance (see
    `heavy_rows`).

    Raises `ValueError` for invalid settings, tokens that the model does not have, activations that are not finite, a
    folder with activations of another model or of other settings, and a folder to which another capture is writing.
    """
    wanted = list(dict.fromkeys(check_point(model.config, point) for point in points))
    if not wanted:
        raise ValueError("no points to capture: give at least one, such as (0, 'input')")
    if not 0 < keep <= 1:
        raise ValueError(f"capture needs 0 < keep <= 1: got keep={keep}, length={length}")
    if np.dtype(dtype) not in (np.float32, np.float16):
        raise ValueError(f"activations are stored as float32 or float16, not {np.dtype(dtype)}")
    if isinstance(source, ImageFile) != (model.config.patches is not None):
        kind = "images (an ImageFile)" if model.config.patches else "tokens (a TextFile or a TokenFile)"
        raise ValueError(f"a {model.config.architecture} model sees {kind}, got a {type(source).__name__}")
    if isinstance(source, ImageFile):
        inputs: TokenInputs | ImageInputs = ImageInputs(model, source, sequences, batch)
    else:
        inputs = TokenInputs(model, source, length, sequences, batch, special)
    width = max(site_width(model.config, point.site) for point in wanted)
    rows = round(keep * inputs.positions) or 1
    per_shard = _sequences_per_shard(shard_bytes, rows, width * np.dtype(dtype).itemsize, batch)
    settings = {
        "model": model.fingerprint(),
        "architecture": model.config.architecture,
        "tokens": {**inputs.identity(), "keep": keep, "seed": seed},
        "sequences_per_shard": per_shard,
        "batch": batch,
        "dtype": np.dtype(dtype).name,
    }

    def open_writers():
        return [
            StoreWriter(
                Path(folder) / str(p),
                {**settings, "layer": p.layer, "site": p.site, "width": site_width(model.config, p.site)},
            )
            for p in wanted
        ]

    work = _Work(model, inputs, tuple(wanted), keep, batch, seed, np.dtype(dtype))
    writers = open_writers()
    if not all(writer.complete for writer in writers):
        lock = FolderLock(folder)
        try:
            writers = open_writers()  # again, now that no other process writes
            first = min(writer.shards for writer in writers)
            with _bar(progress) as bar:
                task = bar.add_task(f"capture {', '.join(map(str, wanted))}", total=source.size)
                for shard, batches in work.shards(per_shard, first, partial(bar.update, task)):
                    for rows in batches:
                        for writer, array in zip(writers, rows.values, strict=True):
                            writer.append(shard, array, **rows.beside)
                    for writer in writers:
                        writer.close(shard)
                bar.update(task, completed=source.size)  # with `sequences` it ends before the source does
        finally:
            try:
                for writer in writers:
                    writer.abandon()
            finally:
                lock.release()
    if not all(writer.shards for writer in writers):
        raise ValueError(f"{source.path} holds no tokens")
    tokens = None if isinstance(source, ImageFile) else partial(work.tokens, per_shard)
    words = None
    if isinstance(source, TextFile) and not all(writer.complete for writer in writers):
        words = vocabulary(source.tokenizer, model)
    return [_finished(writer, tokens, partial(_word, source), words) for writer in writers]


def _word(source, token: int) -> str:
    """The word of a token, or its number where there is no tokenizer or the token has no text."""
    text = source.tokenizer.decode([token]) if isinstance(source, TextFile) else ""
    return text or f"number {token}"


def _finished(writer: StoreWriter, tokens, word, words) -> ActivationStore:
    if not writer.complete:
        heavy = heavy_rows(ActivationStore(writer.folder, writer.manifest), tokens, word)
        writer.manifest["heavy_rows"] = None if heavy is None else asdict(heavy)
    return writer.finish(words)


class _Rows(NamedTuple):
    """What a batch gives: the rows at each point, and the arrays that lie beside the rows of every store."""

    values: list[np.ndarray]
    beside: dict[str, np.ndarray]


@dataclass(frozen=True)
class _Work:
    """Everything that determines the rows."""

    model: Model
    inputs: TokenInputs | ImageInputs
    points: tuple[Point, ...]
    keep: float
    batch: int
    seed: int
    dtype: np.dtype

    def shards(self, per_shard: int, first: int, progress: Callable) -> Iterator[tuple[int, Iterator[_Rows]]]:
        """Every shard from number `first` on: its number, and its rows in batches."""
        # Weights that are aligned as JAX needs them are used in place, without a copy.
        params = jax.tree.map(lambda array: jax.device_put(array, may_alias=True), self.model.params)

        def batches(shard: int, group: list) -> Iterator[_Rows]:
            for start in range(0, len(group), self.batch):
                chunk = group[start : start + self.batch]
                yield self._rows(params, [piece for piece, _ in chunk], shard * per_shard + start)
                progress(completed=chunk[-1][1])

        # Tokens of complete shards are skipped.
        groups = _groups(self.inputs.pieces(), per_shard)
        for shard, group in enumerate(itertools.islice(groups, first, None), start=first):
            yield shard, batches(shard, group)

    def tokens(self, per_shard: int) -> Iterator[np.ndarray]:
        """The token numbers of all rows, in their order, a batch at a time."""
        for shard, group in enumerate(_groups(self.inputs.pieces(), per_shard)):
            for start in range(0, len(group), self.batch):
                pieces = [piece for piece, _ in group[start : start + self.batch]]
                inputs, _, kept = self._drawn(pieces, shard * per_shard + start)
                yield np.asarray(inputs)[kept]

    def _rows(self, params, pieces: list[np.ndarray], number: int) -> _Rows:
        """The kept rows of a batch; `number` is that of its first sequence."""
        inputs, mask, kept = self._drawn(pieces, number)
        seen = _forward(params, inputs, mask, config=self.model.config, points=self.points)
        beside = {"places": (np.argwhere(kept) + np.array([number, 0])).astype(np.int32)}
        if mask is not None:
            beside["tokens"] = np.where(mask, inputs, NO_TOKEN)[: len(pieces)].astype(np.int32)
        return _Rows([_stored(np.asarray(values)[kept], self.dtype, number) for values in seen], beside)

    def _drawn(self, pieces: list[np.ndarray], number: int):
        """The inputs of a batch, their mask, and which positions are kept."""
        inputs, mask, counts = self.inputs.batch(pieces)
        kept = np.zeros_like(counts)
        for i in range(len(pieces)):
            places = np.flatnonzero(counts[i])
            # The draw depends only on the seed and the number of the sequence.
            rng = np.random.default_rng([self.seed, number + i])
            kept[i, rng.choice(places, size=max(1, round(self.keep * len(places))), replace=False)] = True
        return inputs, mask, kept


def _groups(items: Iterator, size: int) -> Iterator[list]:
    while group := list(itertools.islice(items, size)):
        yield group


def _sequences_per_shard(shard_bytes: int, rows: int, row_bytes: int, batch: int) -> int:
    """The largest number that fits, in whole batches."""
    return max(1, shard_bytes // (rows * row_bytes * batch)) * batch


@partial(jax.jit, static_argnames=("config", "points"))
def _forward(params, tokens, mask, *, config, points):
    # Nothing after the last point is computed, because jit drops unused results.
    with full_precision():
        seen = run(params, config, tokens, mask=mask, capture=points)[1]
    return [seen[point] for point in points]


def _stored(values: np.ndarray, dtype, sequence: int) -> np.ndarray:
    """Convert to the dtype of the store. Raises `ValueError` if that is not finite."""
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
