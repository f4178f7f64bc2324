"""Files as an accident or an attacker makes them: every reader with small whole files, and ways to damage them."""

import contextlib
import copy
import json
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors.numpy import save

import rotsparse as rs
from rotsparse import models
from rotsparse._core.digests import digest
from rotsparse._core.reading import reading
from rotsparse.cli import commands
from rotsparse.data.sources import NpyFile
from rotsparse.data.store import StoreWriter, open_store
from rotsparse.engine._checkpoint import Session
from rotsparse.layers.files import load_activations, load_layer, save_layer
from rotsparse.layers.mlp import MLP
from rotsparse.models.huggingface_writer import save_huggingface
from rotsparse.runs import folders, inputs, listing
from tiny_models import tiny, tiny_llama2c

_ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 7, 10**9, 10**30, -(10**30), 0.5, -0.0, 1e308, float("inf"), float("nan"), "", "x",
    "../x", "/etc/passwd", "\0", "a" * 5000, [], {}, [[]], [None], {"x": 1}, [1, 2, 3], "llama", "gelu", "yarn",
    {"rope_type": "yarn", "factor": 1e-300}, {"rope_type": "longrope", "short_factor": [1], "long_factor": [1]},
)  # fmt: skip


class Reader(NamedTuple):
    """`make` writes whole files into an empty folder, `read` reads them, `damaged` is the one that is damaged. Of a
    `lenient` reader damage is shown or left out, not refused."""

    damaged: str
    make: Callable[[Path], Any]
    read: Callable[[Path], Any]
    lenient: bool = False


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


def _config(name: str) -> Reader:
    """A JSON file of a run, as a user may edit it: without the hash that would give every change away."""

    def make(path: Path) -> None:
        rng = np.random.default_rng(0)
        layer = MLP(rng.standard_normal((5, 4)), rng.standard_normal(5), rng.standard_normal((3, 5)), activation="relu")
        save_layer(path / "layer.safetensors", layer)
        np.save(path / "x.npy", rng.standard_normal((20, 4)))
        solution = rs.find_rotations(layer, np.load(path / "x.npy"), key=jax.random.key(0), method=rs.Anneal(steps=2))
        hashes = inputs.hashes(layer=path / "layer.safetensors", activations=path / "x.npy")
        named = {"layer": "layer.safetensors", "activations": "x.npy", "test_activations": None, "activation": "relu"}
        config = {"command": "demo", **named, "norm": None, "skip": False, "input_scale": "std", "seed": 0, "steps": 2}
        with folders.new_run(path / "run", config=config) as run:
            for file in ("layer.safetensors", "x.npy"):
                (run / file).write_bytes((path / file).read_bytes())
            folders.write_json(run / "config.json", config | {"inputs": hashes, "versions": folders.versions()})
            metrics = {"objective": {"start": 1.0, "train": 0.5, "floor": None}, "function_error": 1e-6}
            folders.write_json(run / "metrics.json", metrics | {"result": "ALL_STEPS"})
            solution.save(run / "solution.npz")
            solution.rotations.save(run / "rotations.safetensors")
            (run / "log.jsonl").write_text('{"step": 1, "checked": [0.5, 0.25]}\n{"step": 2, "checked": [0.5, 0.1]}\n')
        for file in (path / "run").glob("*.json"):
            file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "digest"}))

    def read(path: Path) -> None:
        listing.table(path)
        assert listing.runs_in(path) or name == "status.json"
        with reading(path):
            commands._drawn(path / "run", folders.read_object(path / "run" / "config.json"))
        inputs.check_layer(path / "run", path / "layer.safetensors")

    return Reader(f"run/{name}", make, read, lenient=name in ("status.json", "log.jsonl"))


def _store(path: Path) -> None:
    writer = StoreWriter(path / "store", {"model": "m", "width": 4, "tokens": {}})
    writer.write(0, np.ones((6, 4), np.float32))
    writer.finish()


def _read_store(path: Path) -> None:
    found = open_store(path / "store", "m")
    found.verify()
    found.read(range(len(found)))


def _layer(path: Path) -> None:
    arrays = {
        "w_in": np.ones((5, 4), np.float32),
        "b_in": np.ones(5),
        "w_out": np.ones((3, 5)),
        "norm_scale": np.ones(4),
    }
    np.savez(path / "layer.npz", **arrays, norm_eps=np.float64(1e-5))
    (path / "layer.safetensors").write_bytes(save({k: np.ascontiguousarray(v) for k, v in arrays.items()}))


def _read_layer(name: str) -> Callable[[Path], Any]:
    return lambda path: load_layer(path / name, "relu", norm="rms")


STATE = {"a": np.arange(40.0), "step": np.asarray(3)}


def _checkpoint(path: Path) -> None:
    session = Session(path, {"steps": "10"}, STATE, lambda state: "")
    session.save(3, STATE, 0.5)
    session.close()


def _read_checkpoint(path: Path) -> None:
    """The manifest is signed again: what stands in it is looked at, not only its hash."""
    manifest = path / "step-00000003" / "manifest.json"
    with contextlib.suppress(ValueError, RecursionError):
        content = json.loads(manifest.read_bytes())
        if isinstance(content, dict):
            content.pop("hash", None)
            canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
            manifest.write_text(json.dumps(content | {"hash": digest(canonical)}))
    session = Session(path, {"steps": "10"}, STATE, lambda state: "")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            session.restore()
    finally:
        session.close()


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
    **{f"{name} of a run": _config(name) for name in ("config.json", "metrics.json", "status.json", "log.jsonl")},
    "solution": _config("solution.npz"),
    "rotations": Reader(
        "r.safetensors",
        lambda path: rs.Rotations.identity(4, 3).save(path / "r.safetensors"),
        lambda path: rs.Rotations.load(path / "r.safetensors"),
    ),
    "manifest of a store": Reader("store/manifest.json", _store, _read_store),
    "shard of a store": Reader("store/00000.npy", _store, _read_store),
    "manifest of a checkpoint": Reader("step-00000003/manifest.json", _checkpoint, _read_checkpoint),
    "layer in .npz": Reader("layer.npz", _layer, _read_layer("layer.npz")),
    "layer in safetensors": Reader("layer.safetensors", _layer, _read_layer("layer.safetensors")),
    "activations": Reader(
        "x.npy", _save("x.npy", np.eye(4, 3, dtype=np.float32)), lambda path: load_activations(path / "x.npy", 3)
    ),
    "activations on disk": Reader(
        "x.npy", _save("x.npy", np.ones((4, 3), np.float32)), lambda path: NpyFile(path / "x.npy").read(range(4))
    ),
    "images": Reader(
        "i.npy", _save("i.npy", np.ones((2, 3, 4, 4), np.float32)), lambda path: models.ImageFile(path / "i.npy")
    ),
}
