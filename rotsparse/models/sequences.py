"""Token sequences of one length, streamed from a text file or a token file."""

import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rotsparse.models.load import Tokenizer

_BLOCK = 1 << 18  # characters of text that are encoded at a time


class TextFile:
    """A UTF-8 text, encoded piece by piece (a piece ends at a line's end), so that its length does not matter."""

    def __init__(self, path: str | os.PathLike, tokenizer: Tokenizer):
        self.path, self.tokenizer = _existing(path), tokenizer
        self.prefix, self.suffix = list(tokenizer.prefix), list(tokenizer.suffix)
        self.size = self.path.stat().st_size

    def identity(self) -> dict[str, Any]:
        """What determines the tokens: the text, and the tokenizer by what it makes of a sample of characters."""
        sample = self.tokenizer.encode("".join(map(chr, range(32, 0x250))))
        return {
            "text_sha256": _sha256(self.path),
            "tokenizer_sha256": hashlib.sha256(f"{self.tokenizer.vocab_size} {sample}".encode()).hexdigest(),
            "prefix": self.prefix,
            "suffix": self.suffix,
        }

    def sequences(self, length: int) -> Iterator[tuple[np.ndarray, int]]:
        """Pieces of `length` tokens (the last one may be shorter), and how much of `size` is read.

        Raises `ValueError` where the file is not UTF-8.
        """
        left = np.zeros(0, np.int64)
        with self.path.open("rb") as raw, io.TextIOWrapper(raw, encoding="utf-8", newline="") as f:
            while block := self._block(f):
                left = np.concatenate([left, np.asarray(self.tokenizer.encode(block), np.int64)])
                whole = len(left) - len(left) % length
                for start in range(0, whole, length):
                    yield left[start : start + length], raw.tell()
                left = left[whole:]
        if len(left):
            yield left, self.size

    def _block(self, f) -> str:
        try:
            return f.read(_BLOCK) + f.readline(_BLOCK)
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is no UTF-8 text: {error}") from None


class TokenFile:
    """Token numbers in a `.npy` file: one long line of them `[n]`, or sequences `[sequences, tokens]`."""

    prefix: list[int] = []
    suffix: list[int] = []

    def __init__(self, path: str | os.PathLike):
        self.path = _existing(path)
        try:
            self._tokens = np.load(self.path, mmap_mode="r")
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"cannot read tokens from {path}: {error}") from None
        if self._tokens.dtype.kind not in "iu" or self._tokens.ndim not in (1, 2):
            raise ValueError(
                f"{path} holds {self._tokens.dtype} {list(self._tokens.shape)}: expected integer tokens, [n] or "
                "[sequences, tokens]"
            )
        self.size = self._tokens.size

    def identity(self) -> dict[str, Any]:
        """What determines the tokens."""
        return {"tokens_sha256": _sha256(self.path)}

    def sequences(self, length: int) -> Iterator[tuple[np.ndarray, int]]:
        """Pieces of at most `length` tokens, none of which crosses the end of a sequence, and how much of `size` is
        read."""
        done = 0
        for row in self._tokens if self._tokens.ndim == 2 else [self._tokens]:
            for start in range(0, len(row), length):
                piece = np.asarray(row[start : start + length], np.int64)
                done += len(piece)
                yield piece, done


def _existing(path: str | os.PathLike) -> Path:
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}")
    return Path(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
