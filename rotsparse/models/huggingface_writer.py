"""A model back into a Hugging Face folder, beside every file of the original one that a fold does not change."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from rotsparse._core.files import new_folder
from rotsparse.models.checkpoint import INDEX, SINGLE
from rotsparse.models.config import TransformerConfig
from rotsparse.models.families import Family, family_of, read_config
from rotsparse.models.huggingface import is_language_model
from rotsparse.models.model import Model, expected_shape, named

_SHARD_BYTES = 5 * 10**9
# Weights in any format, and what belongs to a training run: not copied beside folded weights.
_REPLACED = re.compile(r"(.*\.index\.json|.*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|onnx_data|gguf|ot|npz))")


def save_huggingface(
    model: Model,
    folder: str | os.PathLike,
    *,
    tokenizer_from: str | os.PathLike | None = None,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Write a model that has the configuration of a Hugging Face folder into a new one, in its present precision.

    The head is untied, and biases are switched on, where the model has them now and did not before. `tokenizer_from`:
    the original folder, whose other files are copied (tokenizer, chat template, generation settings, licence, …), all
    but weights.

    Raises `ValueError` if the folder exists, or the format cannot hold the model (it says what).
    """
    with new_folder(folder) as target:
        fill_huggingface(model, target, tokenizer_from=tokenizer_from, shard_bytes=shard_bytes)


def fill_huggingface(
    model: Model,
    target: Path,
    *,
    tokenizer_from: str | os.PathLike | None = None,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """What `save_huggingface` does, into a folder that is there."""
    family = family_of(model.raw)
    raw = _adapted(model, family)
    config = read_config(raw, head=model.config.head)
    _check_same_computation(model, config)
    tensors = _tensors(model, family, config, raw)
    _write_tensors(target, tensors, shard_bytes)
    (target / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")
    if tokenizer_from is not None:
        _copy_companions(Path(tokenizer_from), target)


def _tensors(model: Model, family: Family, config: TransformerConfig, raw: Mapping[str, Any]) -> dict[str, np.ndarray]:
    flat = dict(named(model.params))
    bare = not is_language_model(raw) and not model.extra
    prefix = model.prefix if model.prefix is not None else "" if bare else family.prefix
    tensors: dict[str, np.ndarray] = {}
    present = _present(flat)
    for entry in family.entries(config, prefix):
        if entry.flag and not present & {_within_layer(name) for name in family.flags()[entry.flag]}:
            continue
        arrays = [flat.pop(n) if n in flat else _zero_bias(model, n) for n in entry.params]
        tensors[entry.name] = np.ascontiguousarray(entry.join(config, *arrays))
    if "unembed" in flat and config.head:
        tensors[str(family.head)] = np.ascontiguousarray(flat.pop("unembed"))
    if flat:
        raise ValueError(
            f"the {config.architecture} format has no place for {', '.join(sorted(flat)[:5])}"
            " (skip matrices and rotations carried out at run time stay in rotsparse)"
        )
    return tensors | {name: np.ascontiguousarray(a) for name, a in model.extra.items()}


def _adapted(model: Model, family: Family) -> dict[str, Any]:
    """config.json for the parameters that the model has now."""
    raw = {**model.raw, "dtype": model.dtype.name}
    raw.pop("torch_dtype", None)
    if family.head and model.config.head:
        raw["tie_word_embeddings"] = model.tied
    present = _present(dict(named(model.params)))
    for flag, params in family.flags().items():
        raw[flag] = bool(present & {_within_layer(name) for name in params})
    return raw


def _present(flat: Mapping[str, np.ndarray]) -> set[str]:
    return {_within_layer(name) for name in flat}


def _within_layer(name: str) -> str:
    return re.sub(r"^layers\.(\d+|\*)\.", "", name)


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
        save_file(shards[0], folder / SINGLE, metadata={"format": "pt"})
        return
    where = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    total = sum(a.nbytes for a in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2))


def _copy_companions(source: Path, target: Path) -> None:
    """Everything but weights and hidden files. Of links only those are followed that stay in the folder, or lead to
    the blobs of the Hugging Face cache."""
    allowed = [source.resolve(), (source / "../../blobs").resolve()]
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or not path.is_file() or _REPLACED.fullmatch(path.name):
            continue
        if relative == Path("config.json") or not any(path.resolve().is_relative_to(root) for root in allowed):
            continue
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target / relative)
