"""Load a folder that `export_sparse` wrote, or make a loaded model of transformers drop coordinates."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from rotsparse.models.families import FAMILIES, Family
from rotsparse.models.load import load_model
from rotsparse.sparse.file import FILE, check_weights, checked_rotation, read_sparse_inputs, stored_inputs
from rotsparse.sparse.readers import reading_entries, weights_hash

_MISSING = "sparse models in PyTorch need torch and transformers: pip install 'rotsparse[torch]'"


def load_sparse(folder: str | os.PathLike, **options: Any) -> Any:
    """The language model of transformers (without a head, the bare model) in a folder that `export_sparse` wrote,
    dropping coordinates of the inputs of its linear layers. `options` go to `from_pretrained` (such as `dtype`).

    Raises `ValueError` if the file of the sparse inputs is missing, damaged, or belongs to other weights than the
    folder's, or the model is of an unknown family; `ImportError` without the extra `torch`.
    """
    try:
        from transformers import AutoModel, AutoModelForCausalLM
    except ImportError:
        raise ImportError(_MISSING) from None
    folder = Path(folder)
    stored = load_model(folder)
    read_sparse_inputs(folder / FILE, stored)  # of the weights in the folder, whatever type they are loaded in
    make = AutoModelForCausalLM if stored.config.head else AutoModel
    model = make.from_pretrained(folder, **{"dtype": "float32", **options}).eval()
    _attach(model, stored_inputs(folder / FILE)[0])
    return model


def sparsify_(model: Any, path: str | os.PathLike) -> Any:
    """Make a loaded model of transformers drop coordinates as the file at `path` says, in place, and return it.

    Raises `ValueError` if the file is damaged or belongs to other weights (half precision is compared as float32; load
    the model without rounding it, and convert it afterwards), or the model is of an unknown family.
    """
    try:
        import torch  # noqa: F401
    except ImportError:
        raise ImportError(_MISSING) from None
    inputs, expected = stored_inputs(path)
    weights = {name: _array(module.weight) for name, (_, _, module) in _readers(model).items()}
    hint = f". The model's type is {next(model.parameters()).dtype}: was it rounded when it was loaded?"
    check_weights(path, expected, weights_hash(weights), hint)
    _attach(model, inputs)
    return model


def _attach(model: Any, inputs) -> None:
    from rotsparse.torch.modules import DropCoordinates

    readers: dict[tuple[int, str], list] = {}
    for layer, site, module in _readers(model).values():
        readers.setdefault((layer, site), []).append(module)
    if missing := [point for point in inputs if point not in readers]:
        raise ValueError(f"the model has no linear layer that reads {missing[0][0]}.{missing[0][1]}")
    for point, sparse in inputs.items():
        modules = readers[point]
        if any(hasattr(module, "sparse_input") for module in modules):
            raise ValueError("this model drops coordinates already: load it anew")
        checked_rotation(f"layers.{point[0]}.{point[1]}", sparse)
        weight = modules[0].weight
        shared = DropCoordinates(sparse, readers=len(modules)).to(device=weight.device, dtype=weight.dtype)
        for module in modules:
            module.sparse_input = shared  # a submodule, so that it moves and is converted with the model
            module.register_forward_pre_hook(_drop)


def _drop(module: Any, args: tuple) -> tuple:
    return (module.sparse_input(args[0]), *args[1:])


def _readers(model: Any) -> dict[str, tuple[int, str, Any]]:
    """The linear layers of a model that read sites, by the name of their weight in the family's table: layer, site and
    module. Raises `ValueError` for a model of an unknown family, or one whose layers are not where they should be."""
    found: dict[str, tuple[int, str, Any]] = {}
    kind = getattr(getattr(model, "config", None), "model_type", None)
    table = _patterns(kind)
    for name, module in model.named_modules():
        for pattern, entry, site in table:
            match = pattern.fullmatch(name)
            if match is None:
                continue
            weight = entry.replace("*", match[1])
            if weight in found or getattr(getattr(module, "weight", None), "ndim", 0) != 2:
                raise ValueError(
                    f"{name} of this {kind} model is no single plain linear layer: expected the model as "
                    "from_pretrained loads it, neither wrapped nor quantised"
                )
            found[weight] = (int(match[1]), site, module)
    layers = {layer for layer, _, _ in found.values()}
    if not found or len(found) != len(layers) * len(table):
        raise ValueError(
            f"this {kind} model has {len(found)} of the linear layers {', '.join(entry for _, entry, _ in table)}: "
            "expected all in every layer. Is it wrapped, or of another version of transformers?"
        )
    return found


def _patterns(kind: Any) -> list[tuple[re.Pattern, str, str]]:
    if kind not in FAMILIES:
        raise ValueError(f"unknown family of models {kind!r}: expected one of {', '.join(sorted(FAMILIES))}")
    family: Family = FAMILIES[kind]
    return [
        (re.compile(rf"(?:.*\.)?{_module(entry.name)}"), entry.name, site) for site, entry in reading_entries(family)
    ]


def _module(name: str) -> str:
    return re.escape(name.removesuffix(".weight")).replace(r"\*", r"(\d+)")


def _array(weight: Any) -> np.ndarray:
    weight = weight.detach().cpu()
    return (weight if weight.dtype.itemsize == 8 else weight.float()).numpy()
