"""Token sequences of one length, streamed from a text file or a token file; and images from a file of their pixels."""

import hashlib
import io
import os
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import numpy as np

from rotsparse.models.load import Tokenizer
from rotsparse.models.model import Model

PADDING = int(np.iinfo(np.int64).min)  # stands for padding tokens
_BLOCK = 1 << 18  # characters of text that are encoded at a time


class TextFile:
    """A UTF-8 text, encoded piece by piece (a piece ends at a line's end), so that its length does not matter."""

    def __init__(self, path: str | os.PathLike, tokenizer: Tokenizer):
        self.path, self.tokenizer = _existing(path), tokenizer
        self.prefix, self.suffix = list(tokenizer.prefix), list(tokenizer.suffix)
        self.special: AbstractSet[int] = tokenizer.special
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

        Raises `ValueError` if the file is not UTF-8.
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
    """Token numbers in a `.npy` file: one long line of them `[n]`, or sequences `[sequences, tokens]`.

    `pad`: the token that fills up sequences at their ends. Nobody looks at it and none of its rows is kept. `None`:
    what `model` names as such (unless it ends texts too). `special`: tokens that stand for no text, such as separators.
    """

    prefix: list[int] = []
    suffix: list[int] = []

    def __init__(self, path: str | os.PathLike, *, pad: int | None = None, special: AbstractSet[int] = frozenset()):
        self.path, self.pad, self.special = _existing(path), pad, special
        self._tokens = _array(self.path, "tokens")
        if self._tokens.dtype.kind not in "iu" or self._tokens.ndim not in (1, 2):
            raise ValueError(
                f"{path} holds {self._tokens.dtype} {list(self._tokens.shape)}: expected integer tokens, [n] or "
                "[sequences, tokens]"
            )
        self.size = self._tokens.size

    def padded_as(self, model: Model) -> "TokenFile":
        """The same file, its padding known from the model's configuration where it is not given.

        Only sequences are padded, not one long line; and a token that also begins or ends texts may be meant as such.
        """
        pad = model.raw.get("pad_token_id")
        ends = [model.raw.get(f"{end}_token_id") for end in ("bos", "eos")]
        ends = [i for end in ends for i in (end if isinstance(end, list) else [end])]
        if self.pad is not None or self._tokens.ndim == 1 or type(pad) is not int or pad in ends:
            return self
        return TokenFile(self.path, pad=pad, special=self.special)

    def identity(self) -> dict[str, Any]:
        """What determines the tokens."""
        return {"tokens_sha256": _sha256(self.path), "pad": self.pad}

    def sequences(self, length: int) -> Iterator[tuple[np.ndarray, int]]:
        """Pieces of at most `length` tokens, none of which crosses the end of a sequence, and how much of `size` is
        read. Padding is `PADDING` in them."""
        done = 0
        for row in self._tokens if self._tokens.ndim == 2 else [self._tokens]:
            first, stop = self._real(row)
            for start in range(0, len(row), length):
                piece = np.array(row[start : start + length], np.int64)
                place = np.arange(start, start + len(piece))
                piece[(place < first) | (place >= stop)] = PADDING
                done += len(piece)
                if (piece != PADDING).any():
                    yield piece, done

    def _real(self, row) -> tuple[int, int]:
        """Where the padding in front of a sequence ends, and where the one behind it begins."""
        if self.pad is None:
            return 0, len(row)
        real = np.flatnonzero(np.asarray(row) != self.pad)
        return (int(real[0]), int(real[-1]) + 1) if len(real) else (0, 0)


class ImageFile:
    """Images in a `.npy` file `[n, channels, height, width]`, scaled as the model expects them."""

    def __init__(self, path: str | os.PathLike):
        self.path = _existing(path)
        self.images = _array(self.path, "images")
        if self.images.dtype.kind != "f" or self.images.ndim != 4:
            raise ValueError(
                f"{path} holds {self.images.dtype} {list(self.images.shape)}: expected floating-point images [n, "
                "channels, height, width], scaled as the model's image processor does it"
            )
        self.size = len(self.images)

    def identity(self) -> dict[str, Any]:
        """What determines the images."""
        return {"images_sha256": _sha256(self.path)}


def _array(path: Path, what: str) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r")
        if not isinstance(array, np.ndarray):
            raise ValueError("it is an archive of arrays, expected the .npy of one")
        return array
    except Exception as error:  # NumPy evaluates the header: anything may go wrong in it
        raise ValueError(f"cannot read {what} from {path}: {str(error)[:300]}") from None


def _existing(path: str | os.PathLike) -> Path:
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}")
    return Path(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
