"""Load a model and its tokenizer from a path, in any format that can be read."""

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rotsparse._core.files import new_folder
from rotsparse._core.reading import reading, regular_file
from rotsparse.models.checkpoint import is_lfs_pointer, read_json
from rotsparse.models.gguf import load_gguf
from rotsparse.models.gguf_tokenizer import gguf_tokenizer, save_tokenizer
from rotsparse.models.huggingface import load_huggingface
from rotsparse.models.huggingface_writer import fill_huggingface, save_huggingface
from rotsparse.models.llama2c import Llama2cTokenizer, as_huggingface, load_llama2c, save_llama2c
from rotsparse.models.model import Model


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token numbers and back. `prefix` and `suffix` are what the model expects around every sequence;
    `special` are the tokens that stand for no text (separators too), `pad` is the one that fills up sequences."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def prefix(self) -> Sequence[int]: ...

    @property
    def suffix(self) -> Sequence[int]: ...

    @property
    def special(self) -> AbstractSet[int]: ...

    @property
    def pad(self) -> int | None: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


def load_model(path: str | os.PathLike) -> Model:
    """The model in a Hugging Face folder, a GGUF file or a llama2.c `.bin` file.

    Raises `ValueError` if it is none of them, or cannot be read (it says why).
    """
    path = Path(path)
    with reading(path):
        if path.is_dir():
            return load_huggingface(path)
        if path.suffix == ".gguf" or _begins_with(path, b"GGUF"):
            return load_gguf(path)
        if _begins_with(path, b"PK\x03\x04"):
            raise ValueError(
                f"{path} is a file of PyTorch: save the model again with safe_serialization (from_pretrained, then "
                "save_pretrained of transformers), and give the folder"
            )
        if path.suffix == ".bin":
            return load_llama2c(path)
        if path.suffix == ".safetensors" and (path.parent / "config.json").exists():
            raise ValueError(f"{path} holds only the weights: give its folder, {path.parent}")
    raise ValueError(
        f"{path} is no model: expected a Hugging Face folder, a GGUF file that ends in .gguf, or a llama2.c file that "
        "ends in .bin"
    )


def _begins_with(path: Path, magic: bytes) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as f:
        return f.read(len(magic)) == magic


def save_model(model: Model, path: str | os.PathLike, *, tokenizer_from: str | os.PathLike | None = None) -> None:
    """Write a model in the format that it was read from; one that was read from GGUF as a Hugging Face folder.

    Raises `ValueError` if the format cannot hold it.
    """
    if model.format == "huggingface":
        save_huggingface(model, path, tokenizer_from=tokenizer_from)
    elif model.format == "gguf":
        with new_folder(path) as folder:
            fill_folder(model, folder, tokenizer_from=tokenizer_from)
    elif model.format == "llama2c":
        save_llama2c(model, path)
    else:
        raise ValueError(f"the model came from no file format (its format is {model.format!r}): none to write it in")


def fill_folder(model: Model, folder: Path, *, tokenizer_from: str | os.PathLike | None = None) -> None:
    """Write a model as a Hugging Face folder into an empty one, whichever format it was read from.

    Raises `ValueError` if Hugging Face's format cannot hold it, or the tokenizer of llama2.c's format is to go with it.
    """
    if model.format == "llama2c":
        if tokenizer_from is not None:
            raise ValueError("a llama2.c tokenizer cannot be written as tokenizer.json: leave tokenizer_from out")
        model = as_huggingface(model)
    fill_huggingface(model, folder, tokenizer_from=tokenizer_from if model.format == "huggingface" else None)
    if model.format == "gguf" and tokenizer_from is not None:
        save_tokenizer(tokenizer_from, folder)


def load_tokenizer(path: str | os.PathLike, model: Model) -> Tokenizer:
    """The tokenizer of a Hugging Face folder (its `tokenizer.json`), the one inside a GGUF file, or a llama2.c
    tokenizer file.

    Raises `ValueError` if it is missing, damaged, or not this model's.
    """
    path = Path(path)
    with reading(path):
        if path.suffix == ".bin":
            return Llama2cTokenizer(path, model.config.vocab_size)
        if path.suffix == ".gguf":
            return HuggingFaceTokenizer.wrapped(gguf_tokenizer(path), path, model.config.vocab_size)
        file = path / "tokenizer.json" if path.is_dir() else path
        return HuggingFaceTokenizer(file, model.config.vocab_size)


class HuggingFaceTokenizer:
    """A `tokenizer.json`, read by the tokenizers library (the extra `models`).

    A model may have more embeddings than the tokenizer has tokens (they are often padded). Added tokens may be beyond
    the embeddings (a pad token that no text needs): they are refused where they occur. Tokens that only
    `tokenizer_config.json` or `special_tokens_map.json` beside it name are added, as transformers does.
    """

    def __init__(self, path: str | os.PathLike, vocab_size: int):
        try:
            from tokenizers import Tokenizer as Fast
        except ImportError:
            raise ImportError(
                "reading tokenizer.json needs the tokenizers library: pip install 'rotsparse[models]'"
            ) from None
        if not Path(path).exists():
            raise ValueError(f"there is no {path}: save the tokenizer beside the model, in its fast form")
        with _no_panic(path):
            fast = Fast.from_file(str(regular_file(path)))
            _add_stated(fast, Path(path))
        self._set_up(fast, path, vocab_size)

    @classmethod
    def wrapped(cls, fast, path: str | os.PathLike, vocab_size: int) -> "HuggingFaceTokenizer":
        """One that exists already, as an object of the tokenizers library."""
        tokenizer = cls.__new__(cls)
        tokenizer._set_up(fast, path, vocab_size)
        return tokenizer

    def _set_up(self, fast, path, vocab_size):
        self._fast, self._path = fast, path
        self.pad: int | None = fast.token_to_id(_content(_stated(fast, Path(path)).get("pad_token")))
        # Sentence-transformers store a length to cut and pad to; here sequences are cut elsewhere.
        fast.no_truncation()
        fast.no_padding()
        self.vocab_size = fast.get_vocab_size()
        added = fast.get_added_tokens_decoder()
        words = [i for i in fast.get_vocab().values() if i not in added]
        if max(words, default=-1) >= vocab_size:
            raise ValueError(
                f"{path} has token number {max(words)}, but the model has embeddings for {vocab_size} only: "
                "they do not belong together"
            )
        self.prefix: Sequence[int]
        self.suffix: Sequence[int]
        with _no_panic(path):
            self.prefix, self.suffix = _around(fast, path)
        self.special: AbstractSet[int] = frozenset(i for i, token in added.items() if token.special) | {
            *self.prefix,
            *self.suffix,
        }

    def encode(self, text: str) -> list[int]:
        """Token numbers of a text, without `prefix` and `suffix`."""
        # The fast form leaves out where in the text each token is: half the time, two thirds of the memory.
        with _no_panic(self._path):
            return self._fast.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens; special ones are left out."""
        with _no_panic(self._path):
            return self._fast.decode(list(ids))


@contextlib.contextmanager
def _no_panic(path: str | os.PathLike) -> Iterator[None]:
    """Raise `ValueError` for whatever the tokenizers library raises: bare exceptions, and Rust's panics, which are not
    even those."""
    try:
        yield
    except (ValueError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        pointer = " (it is a Git LFS pointer)" if is_lfs_pointer(Path(path)) else ""
        raise ValueError(f"cannot read the tokenizer {path}: {error}{pointer}") from None


def _around(fast, path) -> tuple[list[int], list[int]]:
    """What the tokenizer's template puts in front of a text and behind it. Raises `ValueError` if it puts something
    into the middle."""
    words = (word for word in fast.get_vocab() if word.isalnum())
    for probe in (*("a", "the", "0", "A"), *itertools.islice(words, 50)):
        plain = fast.encode(probe, add_special_tokens=False).ids
        if not plain:
            continue
        encoding = fast.encode(probe)
        ids, template = encoding.ids, [bool(flag) for flag in encoding.special_tokens_mask]
        first = template.index(False) if False in template else len(ids)
        if ids[first : first + len(plain)] == plain and all(template[first + len(plain) :]):
            return ids[:first], ids[first + len(plain) :]
        raise ValueError(f"{path}: its template does not keep a text together, it makes {ids} of {plain}")
    around = fast.encode("").ids
    return around[:1], around[1:]


_ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_LISTS = ("additional_special_tokens", "extra_special_tokens")


def _stated(fast, path: Path) -> dict[str, Any]:
    """What a tokenizer and the files beside it say of it; the last that has an entry counts."""
    stated: dict[str, Any] = {"pad_token": (fast.padding or {}).get("pad_token")}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        with contextlib.suppress(ValueError):  # not there, or no object
            stated |= {key: value for key, value in read_json(path.parent / name).items() if value}
    return stated


def _content(token: Any) -> str:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def _flags(token: Any) -> dict[str, Any]:
    return token if isinstance(token, dict) else {}


def _add_stated(fast, path: Path) -> None:
    """Add the tokens that the files beside `tokenizer.json` name and it does not know as such. Raises `ValueError` if
    they would get other numbers than are written there."""
    from tokenizers import AddedToken

    stated = _stated(fast, path)
    numbered = stated.get("added_tokens_decoder")
    numbered = numbered.items() if isinstance(numbered, dict) else ()
    numbered = {int(i): token for i, token in numbered if i.isdecimal() and _content(token)}
    lists = [stated[key] for key in _LISTS if isinstance(stated.get(key), list)]
    special = [stated.get(role) for role in _ROLES] + [token for tokens in lists for token in tokens]
    known = {token.content for token in fast.get_added_tokens_decoder().values()}
    for token in (*(numbered[i] for i in sorted(numbered)), *special):
        content = _content(token)
        if content and content not in known:
            known.add(content)
            flags = {name: bool(_flags(token).get(name)) for name in ("single_word", "lstrip", "rstrip", "normalized")}
            is_special = token in special or bool(_flags(token).get("special"))
            (fast.add_special_tokens if is_special else fast.add_tokens)([AddedToken(content, **flags)])
    for number, token in numbered.items():
        if (found := fast.token_to_id(_content(token))) != number:
            raise ValueError(
                f"{path} has number {found} for the token {_content(token)!r}, and tokenizer_config.json says "
                f"{number}: they do not belong together"
            )
