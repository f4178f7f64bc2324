"""Hugging Face model folders: `config.json` beside safetensors, one file or several with an index.

Read to a `Model`, written back under the same names. Weights come as float32 (float64 stays), whatever the file has.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rotsparse._core.files import new_folder
from rotsparse.models.architectures import ARCHITECTURES, Architecture, Entry, is_bare
from rotsparse.models.config import TransformerConfig
from rotsparse.models.model import Model, expected_shape, named, nested

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD_BYTES = 5 * 10**9


def load_huggingface(folder: str | os.PathLike) -> Model:
    """The model in a folder that `save_pretrained` wrote, or that was downloaded from the hub.

    Raises `ValueError` where the folder or a shard is missing or damaged, the architecture is unknown, or tensors are
    missing, unexpected, or of the wrong shape; the message names them.
    """
    folder = Path(folder)
    raw = _read_json(folder / "config.json")
    architecture = _architecture(raw)
    config = architecture.config(raw)
    tensors = dict(_read_tensors(folder))
    prefix = architecture.prefix if any(name.startswith(architecture.prefix) for name in tensors) else ""

    flat: dict[str, np.ndarray] = {}
    for entry in architecture.entries(raw, config, prefix=prefix):
        if entry.name not in tensors:
            raise ValueError(
                f"{folder} has no tensor {entry.name!r}, which a {config.architecture} model needs: is a shard missing?"
            )
        array = _widen(entry.name, tensors.pop(entry.name))
        flat.update(_split(entry, array, config))
    # A tied head is often stored a second time.
    if architecture.head_name in tensors and config.head:
        tensors.pop(architecture.head_name)
    tensors = {name: a for name, a in tensors.items() if not re.search(architecture.ignored, name)}
    extra = {name: a for name, a in tensors.items() if re.search(architecture.carried, name)}
    if unexpected := sorted(tensors.keys() - extra.keys()):
        listed = ", ".join(unexpected[:5]) + (f" and {len(unexpected) - 5} more" if len(unexpected) > 5 else "")
        raise ValueError(f"{folder} has tensors that a {config.architecture} model does not have: {listed}")
    params = nested({name: np.ascontiguousarray(a) for name, a in flat.items()}, config.n_layers)
    return Model(config, params, format="huggingface", raw=raw, extra=extra)


def save_huggingface(
    model: Model,
    folder: str | os.PathLike,
    *,
    tokenizer_from: str | os.PathLike | None = None,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Write a model that came from a Hugging Face folder into a new one, in its present precision.

    The head is untied, and biases are switched on, where the model has them now and did not before. `tokenizer_from`:
    the original folder, whose tokenizer files are copied.

    Raises `ValueError` where the folder exists, or the format cannot hold the model (it says what).
    """
    architecture = _architecture(model.raw)
    raw = _adapted(model, architecture)
    config = architecture.config(raw)
    _check_same_computation(model, config)
    flat = dict(named(model.params))
    prefix = "" if is_bare(raw) else architecture.prefix
    tensors: dict[str, np.ndarray] = {}
    for entry in architecture.entries(raw, config, prefix=prefix):
        arrays = [flat.pop(n) if n in flat else _zero_bias(model, n) for n in entry.params]
        tensors[entry.name] = np.ascontiguousarray(entry.join(*arrays))
    if flat:
        raise ValueError(
            f"the {config.architecture} format has no place for {', '.join(sorted(flat)[:5])}"
            " (skip matrices and rotations carried out at run time stay in rotsparse)"
        )
    tensors.update({name: np.ascontiguousarray(a) for name, a in model.extra.items()})
    with new_folder(folder) as target:
        _write_tensors(target, tensors, shard_bytes)
        (target / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")
        for path in sorted(Path(tokenizer_from).iterdir()) if tokenizer_from is not None else ():
            if re.fullmatch(r"(tokenizer.*|special_tokens_map\.json|vocab\..*|merges\.txt|.*\.model)", path.name):
                shutil.copy(path, target / path.name)


def _architecture(raw: Mapping[str, Any]) -> Architecture:
    kind = raw.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {kind!r}: expected one of {', '.join(sorted(ARCHITECTURES))}")
    return ARCHITECTURES[kind]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None


def _read_tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    if (folder / _INDEX).exists():
        where: dict[str, str] = _read_json(folder / _INDEX).get("weight_map", {})
        missing = sorted({file for file in where.values() if not (folder / file).exists()})
        if missing:
            raise ValueError(f"{folder} lacks {len(missing)} of its shards: {', '.join(missing)}. Download them again")
        files = sorted(set(where.values()))
    elif (folder / _SINGLE).exists():
        files = [_SINGLE]
    else:
        hint = " (there is a pytorch_model file: save the model again with safe_serialization)"
        raise ValueError(
            f"{folder} has neither {_SINGLE} nor {_INDEX}" + (hint if any(folder.glob("pytorch_model*")) else "")
        )
    for file in files:
        try:
            with ExitStack() as stack:
                f = stack.enter_context(safe_open(folder / file, framework="numpy"))
                for name in f.keys():
                    yield name, f.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"cannot read {folder / file}: {error}. Damaged or truncated: fetch it again") from None


def _split(entry: Entry, array: np.ndarray, config: TransformerConfig) -> dict[str, np.ndarray]:
    """The parameters in a tensor, their shapes checked."""
    expected = {name: expected_shape(config, name) for name in entry.params}
    try:
        parts = dict(zip(expected, entry.split(array), strict=True))
    except ValueError:  # it cannot even be taken apart
        parts = dict.fromkeys(expected, array)
    for name, part in parts.items():
        wanted = expected[name]
        if part.ndim != len(wanted) or any(w not in (None, n) for w, n in zip(wanted, part.shape, strict=True)):
            raise ValueError(
                f"tensor {entry.name!r} has shape {list(array.shape)}, but config.json calls for "
                f"{' and '.join(f'{n} {list(e)}' for n, e in expected.items())} ([out, in])"
            )
    return parts


def _widen(name: str, array: np.ndarray) -> np.ndarray:
    """float16 and bfloat16 to float32: too coarse to rotate in."""
    if array.dtype == np.float64 or array.dtype == np.float32:
        return array
    if array.dtype.name in ("float16", "bfloat16"):
        return array.astype(np.float32)
    raise ValueError(f"tensor {name!r} is {array.dtype}: expected a float16, bfloat16, float32 or float64 checkpoint")


def _adapted(model: Model, architecture: Architecture) -> dict[str, Any]:
    """config.json for the parameters that the model has now."""
    raw = {**model.raw, "dtype": model.dtype.name}
    raw.pop("torch_dtype", None)
    if architecture.head_name:
        raw["tie_word_embeddings"] = model.tied or not model.config.head
    present = {re.sub(r"^layers\.\d+\.", "", name) for name, _ in named(model.params)}
    for flag, (_, biases) in architecture.flags.items():
        raw[flag] = architecture.flag(raw, flag) or bool(present & set(biases))
    return raw


def _check_same_computation(model: Model, config: TransformerConfig) -> None:
    changed = [f.name for f in fields(config) if getattr(config, f.name) != getattr(model.config, f.name)]
    if changed:
        listed = ", ".join(f"{n} = {getattr(model.config, n)!r} (it means {getattr(config, n)!r})" for n in changed)
        why = (
            ". A LayerNorm stream was rotated so that its mean direction moved: fold a rotation that keeps it "
            "(rotsparse.models.fold.keep_mean) to stay within the original format"
            if "norm" in changed
            else ""
        )
        raise ValueError(f"the {config.architecture} format cannot say {listed}{why}")


def _zero_bias(model: Model, name: str) -> np.ndarray:
    if not name.rsplit(".", 1)[1].startswith("b_"):
        raise ValueError(f"the model has no parameter {name}, which its original format needs")
    return np.zeros([s or 0 for s in expected_shape(model.config, name)], model.dtype)


def _write_tensors(folder: Path, tensors: dict[str, np.ndarray], shard_bytes: int) -> None:
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, array in tensors.items():
        if shards[-1] and sum(a.nbytes for a in shards[-1].values()) + array.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = array
    if len(shards) == 1:
        save_file(shards[0], folder / _SINGLE, metadata={"format": "pt"})
        return
    where = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    total = sum(a.nbytes for a in tensors.values())
    (folder / _INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2))
