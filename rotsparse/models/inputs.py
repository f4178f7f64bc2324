"""Batches of model inputs, tokens or images, and the positions whose activations may be kept."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from rotsparse.models.config import TransformerConfig
from rotsparse.models.model import Model
from rotsparse.models.sequences import PADDING, ImageFile, TextFile, TokenFile


class Batch(NamedTuple):
    """`inputs`: tokens `[batch, positions]` or images. `mask`: False where nobody looks (images have none). `counts`:
    `[batch, positions]`, True for positions whose activations may be kept."""

    inputs: np.ndarray
    mask: np.ndarray | None
    counts: np.ndarray


class TokenInputs:
    """Sequences of `length` tokens, with the special tokens of the tokenizer's template around each.

    `special`: whether positions of other special tokens (separators) count. The template's never do, and padding
    neither.
    """

    def __init__(
        self, model: Model, source: TextFile | TokenFile, length: int, sequences: int | None, batch: int, special: bool
    ):
        self._config, self._count, self._size, self._special = model.config, sequences, batch, special
        self.source = source.padded_as(model) if isinstance(source, TokenFile) else source
        self.positions = length
        self.body = length - len(source.prefix) - len(source.suffix)
        if self.body < 1 or length > model.config.max_positions:
            raise ValueError(
                f"sequences should be longer than their {length - self.body} special tokens and have at most the "
                f"model's {model.config.max_positions} positions: got length={length}"
            )

    def identity(self) -> dict[str, Any]:
        """What determines the batches."""
        special = "kept" if self._special else "left out"
        return {**self.source.identity(), "length": self.positions, "sequences": self._count, "special": special}

    def pieces(self) -> Iterator[tuple[np.ndarray, int]]:
        """Every sequence that has a position which counts, and how much of the source is read."""
        counted = (piece for piece in self.source.sequences(self.body) if self._counts(piece[0]).any())
        return itertools.islice(counted, self._count)

    def batch(self, pieces: Sequence[np.ndarray]) -> Batch:
        shape = (self._size, self.positions)
        # What stands at a masked position matters only where positions are counted by the tokens.
        tokens = np.full(shape, self._config.position_pad or 0, np.int32)
        mask, counts = np.zeros(shape, bool), np.zeros(shape, bool)
        before = len(self.source.prefix)
        for i, piece in enumerate(pieces):
            line = np.array([*self.source.prefix, *piece, *self.source.suffix])
            real = line != PADDING
            check_tokens(line[real], self._config, self.source.path)
            tokens[i, : len(line)][real] = line[real]
            mask[i, : len(line)] = real
            counts[i, before : before + len(piece)] = self._counts(piece)
        return Batch(tokens, mask, counts)

    def _counts(self, piece: np.ndarray) -> np.ndarray:
        real = piece != PADDING
        return real if self._special or not self.source.special else real & ~np.isin(piece, [*self.source.special])


class ImageInputs:
    """Images: every patch counts, and the class token."""

    def __init__(self, model: Model, source: ImageFile, sequences: int | None, batch: int):
        patches = model.config.patches
        assert patches is not None, "a model of images"
        wanted = (patches.channels, *patches.image)
        if source.images.shape[1:] != wanted:
            raise ValueError(
                f"{source.path} has images {list(source.images.shape[1:])}, the model's are {list(wanted)}"
            )
        self.source, self._count, self._size = source, sequences, batch
        self.positions = model.config.max_positions

    def identity(self) -> dict[str, Any]:
        return {**self.source.identity(), "sequences": self._count}

    def pieces(self) -> Iterator[tuple[np.ndarray, int]]:
        images = itertools.islice(self.source.images, self._count)
        return ((image, i + 1) for i, image in enumerate(images))

    def batch(self, pieces: Sequence[np.ndarray]) -> Batch:
        images = np.zeros((self._size, *pieces[0].shape), np.float32)
        images[: len(pieces)] = pieces
        counts = np.zeros((self._size, self.positions), bool)
        counts[: len(pieces)] = True
        return Batch(images, None, counts)


def check_tokens(tokens: np.ndarray, config: TransformerConfig, path) -> None:
    """Raise `ValueError` for tokens that the model does not have."""
    if tokens.size and (tokens.min() < 0 or tokens.max() >= config.vocab_size):
        raise ValueError(
            f"{path} has tokens from {tokens.min()} to {tokens.max()}, the model's are 0 to {config.vocab_size - 1}: "
            "they do not belong together"
        )
