"""Files as an accident or an attacker makes them: every reader with small whole files, and ways to damage them."""

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rotsparse import models
from rotsparse.models.huggingface_writer import save_huggingface
from tiny_models import tiny, tiny_llama2c

_ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 7, 10**9, 10**30, -(10**30), 0.5, -0.0, 1e308, float("inf"), float("nan"), "", "x",
    "../x", "/etc/passwd", "\0", "a" * 5000, [], {}, [[]], [None], {"x": 1}, [1, 2, 3], "llama", "gelu", "yarn",
    {"rope_type": "yarn", "factor": 1e-300}, {"rope_type": "longrope", "short_factor": [1], "long_factor": [1]},
)  # fmt: skip


class Reader(NamedTuple):
    """`make` writes whole files into an empty folder, `read` reads them, `damaged` is the one that is damaged."""

    damaged: str
    make: Callable[[Path], Any]
    read: Callable[[Path], Any]


def damaged_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """A few bytes changed, removed, repeated or cut off, mostly near the beginning, where the headers are."""
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(min(len(data), rng.choice([64, 600, 10**9])) or 1))
        kind = rng.integers(6)
        if kind == 0:
            data = data[:at] + bytes([rng.integers(256)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + data[at + int(rng.integers(1, 9)) :]
        elif kind == 2:
            data = data[:at] + data[at : at + 16] * int(rng.integers(2, 5)) + data[at + 16 :]
        elif kind == 3:
            data = data[:at]
        else:
            wide = int(rng.choice([4, 8]))
            number = int(rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1])) % 2 ** (8 * wide)
            data = data[:at] + struct.pack("<Q", number)[:wide] + data[at + wide :]
    return data


def damaged_json(data: bytes, rng: np.random.Generator) -> bytes:
    """An entry anywhere replaced by something odd, removed, or added."""
    if rng.random() < 0.2:
        return damaged_bytes(data, rng)
    content = copy.deepcopy(json.loads(data))
    for _ in range(rng.integers(1, 3)):
        node, places = content, []
        while isinstance(node, dict | list) and node:
            key = list(node)[rng.integers(len(node))] if isinstance(node, dict) else int(rng.integers(len(node)))
            places.append((node, key))
            node = node[key]
        if not places:
            break
        parent, key = places[rng.integers(len(places))]
        odd = copy.deepcopy(_ODD[rng.integers(len(_ODD))])
        if rng.random() < 0.15:
            del parent[key]
        elif rng.random() < 0.15 and isinstance(parent, dict):
            parent[f"{key}_too"] = odd
        else:
            parent[key] = odd
    return json.dumps(content).encode()


def damaged(reader: Reader, data: bytes, rng: np.random.Generator) -> bytes:
    return (damaged_json if reader.damaged.endswith(".json") else damaged_bytes)(data, rng)


def survives(reader: Reader, folder: Path, content: bytes) -> bool:
    """Read the damaged file: False where it is refused with a `ValueError`; any other exception is the reader's."""
    (folder / reader.damaged).write_bytes(content)
    try:
        reader.read(folder)
    except ValueError as error:
        if not str(error):
            raise AssertionError("the message is empty") from error
        return False
    return True


# --- the readers --------------------------------------------------------------------------------------------------


def _folder(name: str, **options: Any) -> Callable[[Path], None]:
    return lambda path: save_huggingface(tiny(name), path / "m", **options)


def _inside(path: Path) -> Any:
    return models.load_model(path / "m")


def _tokenizer(path: Path) -> None:
    import tokenizers as tk

    fast = tk.Tokenizer(tk.models.BPE({"<s>": 0} | {c: i + 1 for i, c in enumerate("abcdefghĠ")}, [("a", "b")][:0]))
    fast.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.add_special_tokens(["<s>"])
    fast.post_processor = tk.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast.save(str(path / "tokenizer.json"))


def _gguf(path: Path) -> None:
    import tiny_gguf

    def tokens(w):
        w.add_tokenizer_model("gpt2")
        w.add_token_list([*"abcdefghijklmnopqrstuvwxyz", "ab", "<end>", "1", "2", "Ġ"])
        w.add_token_merges(["a b"])
        w.add_token_types([*[1] * 27, 3, 1, 1, 1])

    tiny_gguf.write(tiny("llama"), "llama", path / "m.gguf", add=tokens)


def _encoded(tokenizer: Any) -> None:
    tokenizer.encode("ab cd <s> 12")


def _save(name: str, array: np.ndarray) -> Callable[[Path], None]:
    return lambda path: np.save(path / name, array)


def _pieces(path: Path) -> None:
    for _ in models.TokenFile(path / "t.npy", pad=0).sequences(7):
        pass


READERS = {
    **{
        f"config of {name}": Reader("m/config.json", _folder(name), _inside)
        for name in ("llama", "gemma3_text", "phi3", "gpt2", "gpt_neo", "gpt_neox", "opt", "mpnet", "vit")
    },
    "index": Reader("m/model.safetensors.index.json", _folder("llama", shard_bytes=3000), _inside),
    "safetensors": Reader("m/model.safetensors", _folder("qwen3"), _inside),
    "llama2.c": Reader(
        "m.bin",
        lambda path: models.save_model(tiny_llama2c(), path / "m.bin"),
        lambda path: models.load_model(path / "m.bin"),
    ),
    "GGUF": Reader("m.gguf", _gguf, lambda path: models.load_model(path / "m.gguf")),
    "tokenizer in GGUF": Reader(
        "m.gguf", _gguf, lambda path: _encoded(models.load_tokenizer(path / "m.gguf", tiny("llama")))
    ),
    "tokenizer": Reader(
        "tokenizer.json",
        _tokenizer,
        lambda path: _encoded(models.load_tokenizer(path / "tokenizer.json", tiny("llama"))),
    ),
    "tokens": Reader("t.npy", _save("t.npy", np.arange(20).reshape(4, 5)), _pieces),
    "images": Reader(
        "i.npy", _save("i.npy", np.ones((2, 3, 4, 4), np.float32)), lambda path: models.ImageFile(path / "i.npy")
    ),
}
