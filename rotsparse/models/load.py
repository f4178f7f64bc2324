"""From a path to a model and its tokenizer, whatever format they are in."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from rotsparse.models.huggingface import load_huggingface
from rotsparse.models.huggingface_writer import save_huggingface
from rotsparse.models.llama2c import Llama2cTokenizer, load_llama2c, save_llama2c
from rotsparse.models.model import Model


class Tokenizer(Protocol):
    """Text to token numbers and back. `prefix` and `suffix` are what the model expects around every sequence."""

    vocab_size: int
    prefix: Sequence[int]
    suffix: Sequence[int]

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


def load_model(path: str | os.PathLike) -> Model:
    """The model in a Hugging Face folder or a llama2.c `.bin` file. Raises `ValueError` where it is neither."""
    path = Path(path)
    if path.is_dir():
        return load_huggingface(path)
    if path.suffix == ".bin":
        return load_llama2c(path)
    raise ValueError(f"{path} is no model: expected a Hugging Face folder, or a llama2.c file that ends in .bin")


def save_model(model: Model, path: str | os.PathLike, *, tokenizer_from: str | os.PathLike | None = None) -> None:
    """Write a model in the format that it was read from. Raises `ValueError` where that cannot hold it."""
    if model.format == "huggingface":
        save_huggingface(model, path, tokenizer_from=tokenizer_from)
    elif model.format == "llama2c":
        save_llama2c(model, path)
    else:
        raise ValueError(f"the model came from no file format (its format is {model.format!r}): none to write it in")


def load_tokenizer(path: str | os.PathLike, model: Model) -> Tokenizer:
    """The tokenizer of a Hugging Face folder (its `tokenizer.json`), or a llama2.c tokenizer file.

    Raises `ValueError` where it is missing, damaged, or not this model's.
    """
    path = Path(path)
    if path.suffix == ".bin":
        return Llama2cTokenizer(path, model.config.vocab_size)
    return HuggingFaceTokenizer(path / "tokenizer.json" if path.is_dir() else path, model.config.vocab_size)


class HuggingFaceTokenizer:
    """A `tokenizer.json`, read by the tokenizers library (the extra `models`).

    A model may have more embeddings than the tokenizer has tokens (they are often padded), never fewer.
    """

    def __init__(self, path: str | os.PathLike, vocab_size: int):
        try:
            from tokenizers import Tokenizer as Fast
        except ImportError:
            raise ValueError(
                "reading tokenizer.json needs the tokenizers library: pip install 'rotsparse[models]'"
            ) from None
        if not Path(path).exists():
            raise ValueError(f"there is no {path}: save the tokenizer beside the model, in its fast form")
        try:
            self._fast = Fast.from_file(str(path))
        except Exception as error:  # the library raises bare exceptions
            raise ValueError(f"cannot read the tokenizer {path}: {error}") from None
        # Sentence-transformers store a length to cut and pad to; here sequences are cut elsewhere.
        self._fast.no_truncation()
        self._fast.no_padding()
        self.vocab_size = self._fast.get_vocab_size()
        largest = max(self._fast.get_vocab().values(), default=-1)
        if largest >= vocab_size:
            raise ValueError(
                f"{path} has token number {largest}, but the model has embeddings for {vocab_size} only: "
                "they do not belong together"
            )
        # What the tokenizer puts around an empty text is what it puts around any: [BOS], or [CLS] and [SEP].
        around = self._fast.encode("").ids
        self.prefix: Sequence[int] = around[:1]
        self.suffix: Sequence[int] = around[1:]

    def encode(self, text: str) -> list[int]:
        """Token numbers of a text, without `prefix` and `suffix`."""
        return self._fast.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens; special ones are left out."""
        return self._fast.decode(list(ids))
