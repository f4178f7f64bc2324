"""Hugging Face model folders: `config.json` beside safetensors, one file or several with an index.

Read to a `Model`, written back under the same names. Weights come as float32 (float64 stays), whatever the file has.
"""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rotsparse.models.checkpoint import Checkpoint, read_json, settled, why_not_a_model
from rotsparse.models.config import TransformerConfig
from rotsparse.models.families import Entry, Family, family_of, read_config
from rotsparse.models.model import Model, expected_shape, nested

# What training wrappers put in front of a tensor's name, or in the middle of it.
_INSIDE = r"_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module"
_WRAPPERS = re.compile(rf"^((module|base_model\.model|{_INSIDE})\.)+|(?<=\.)(({_INSIDE})\.)+")
_OLD_NORMS = ((r"\.gamma$", ".weight"), (r"\.beta$", ".bias"))
_QUANTISED = (".qweight", ".weight_packed", ".W_q", ".weight_scale", ".weight_scale_inv", ".SCB", ".absmax", ".scales")
_LANGUAGE_MODELS = re.compile(r"ForCausalLM$|LMHeadModel$")


def load_huggingface(folder: str | os.PathLike) -> Model:
    """The model in a folder that `save_pretrained` wrote, or that was downloaded from the hub.

    What the tensors say counts: a head of its own, biases that are not there. A model with another head than a language
    model's is read without it.

    Raises `ValueError` if the folder or a shard is missing or damaged, the architecture or an entry of its
    configuration is unknown, or tensors are missing, unexpected, or of the wrong shape; the message names them.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists() and (reason := why_not_a_model(folder)):
        raise ValueError(reason)
    raw = read_json(folder / "config.json")
    family = family_of(raw)
    config = read_config(raw, head=False)  # what is wrong with the configuration is said before any tensor is looked at
    tensors = _Tensors(Checkpoint(folder), family)
    flat = tensors.parameters(config)
    embedding = flat.get("embed")
    head = tensors.head(raw, family, embedding)
    config = read_config(raw, head=head is not None)
    if head is not None and head is not embedding:
        flat |= _split(Entry(str(family.head), ("unembed",)), head, config)
    extra = tensors.rest(config, family)
    return Model(
        config, nested(flat, config.n_layers), format="huggingface", raw=raw, extra=extra, prefix=tensors.prefix
    )


def is_language_model(raw: Mapping[str, Any]) -> bool:
    """Whether the file was saved with a language model's head. One that does not say is a language model."""
    return bool(_LANGUAGE_MODELS.search(_class(raw)))


def _class(raw: Mapping[str, Any]) -> str:
    classes = raw.get("architectures")
    return str(classes[0]) if isinstance(classes, list) and classes else "ForCausalLM"


class _Tensors:
    """A checkpoint's tensors under the names that the family's table has for them."""

    def __init__(self, checkpoint: Checkpoint, family: Family):
        self._checkpoint, self._family = checkpoint, family
        # By the table's name, the name in the file.
        self._stored = self._unique((_usual_name(name, family), name) for name in checkpoint.names)
        self.prefix = self._find_prefix()
        outer = self.prefix.removesuffix(family.prefix)
        if outer != self.prefix:  # a wrapper's name may stand in front of everything, the head too
            self._stored = self._unique((usual.removeprefix(outer), name) for usual, name in self._stored.items())
            self.prefix = family.prefix

    def parameters(self, config: TransformerConfig) -> dict[str, np.ndarray]:
        """All parameters of the body."""
        entries = list(self._family.entries(config, self.prefix))
        kinds = {_generic(e.name) for e in entries if e.flag and e.name in self._stored}
        flat: dict[str, np.ndarray] = {}
        for entry in entries:
            if entry.flag and _generic(entry.name) not in kinds:
                continue
            if entry.name not in self._stored:
                raise ValueError(
                    f"{self._checkpoint.folder} has no tensor {entry.name!r}, which a {config.architecture} model needs"
                    + _reason(list(self._stored))
                )
            array = self._checkpoint.floats(self._stored.pop(entry.name))
            flat |= _split(entry, array, config)
        return flat

    def head(self, raw: Mapping[str, Any], family: Family, embedding: np.ndarray | None) -> np.ndarray | None:
        """The language model's head, which is the embedding where the two are tied. `None`: there is none."""
        if family.head is None:
            return None
        tied = raw.get("tie_word_embeddings")
        tied = family.defaults.get("tie_word_embeddings", False) if tied is None else tied
        if not isinstance(tied, bool):
            raise ValueError(f"config.json: tie_word_embeddings should be true or false, got {tied!r}")
        if family.head in self._stored:
            head = self._checkpoint.floats(self._stored.pop(family.head))
            # A tied head is often stored a second time. Where it differs it was trained by itself.
            return embedding if tied and embedding is not None and np.array_equal(head, embedding) else head
        if not is_language_model(raw):
            return None
        if tied:
            return embedding
        raise ValueError(
            f"{self._checkpoint.folder} has no tensor {family.head!r}, and config.json does not say that the embedding "
            f"is the head of this {_class(raw)} (tie_word_embeddings)"
        )

    def rest(self, config: TransformerConfig, family: Family) -> dict[str, np.ndarray]:
        """The tensors that are carried along. Raises `ValueError` that names those that should not be there."""
        left = {usual: name for usual, name in self._stored.items() if not re.search(family.ignored, usual)}
        extra = {usual: name for usual, name in left.items() if re.search(family.carried, usual)}
        if unexpected := sorted(left.keys() - extra.keys()):
            listed = ", ".join(unexpected[:5]) + (f" and {len(unexpected) - 5} more" if len(unexpected) > 5 else "")
            raise ValueError(
                f"{self._checkpoint.folder} has tensors that a {config.architecture} model does not have: {listed}"
                + _reason(unexpected)
            )
        return {usual: self._checkpoint.raw(name) for usual, name in extra.items()}

    def _unique(self, names: Iterable[tuple[str, str]]) -> dict[str, str]:
        unique: dict[str, str] = {}
        for usual, name in names:
            if usual in unique:
                raise ValueError(
                    f"{self._checkpoint.folder}: {name!r} and {unique[usual]!r} are names of the same tensor: keep one"
                )
            unique[usual] = name
        return unique

    def _find_prefix(self) -> str:
        """What stands before the names of the body: found by the first tensor of the table."""
        first = next(entry.name for entry in self._family.body if "*" not in entry.name)
        found = [name.removesuffix(first) for name in self._stored if name == first or name.endswith(f".{first}")]
        if len(found) != 1:
            inside = [name for name in self._stored if name.startswith(self._family.prefix)]
            return self._family.prefix if inside else ""
        return found[0]


def _usual_name(name: str, family: Family) -> str:
    name = _WRAPPERS.sub("", name)
    for pattern, usual in (*_OLD_NORMS, *family.renames):
        name = re.sub(pattern, usual, name)
    return name


def _generic(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def _reason(names: list[str]) -> str:
    if any("lora_" in name or ".base_layer." in name for name in names):
        return ". An adapter was not merged: merge it first (merge_and_unload in peft)"
    if any(name.endswith(_QUANTISED) for name in names):
        return ". Its weights are quantised: load the original checkpoint, or save a dequantised one"
    return ""


def _split(entry: Entry, array: np.ndarray, config: TransformerConfig) -> dict[str, np.ndarray]:
    """The parameters in a tensor, their shapes checked."""
    expected = {name: expected_shape(config, name) for name in entry.params}
    try:
        parts = dict(zip(expected, entry.split(config, array), strict=True))
    except (ValueError, IndexError):  # it cannot even be taken apart
        parts = dict.fromkeys(expected, array)
    for name, part in parts.items():
        wanted = expected[name]
        if part.ndim != len(wanted) or any(w not in (None, n) for w, n in zip(wanted, part.shape, strict=True)):
            raise ValueError(
                f"tensor {entry.name!r} has shape {list(array.shape)}, but config.json calls for "
                f"{' and '.join(f'{n} {list(e)}' for n, e in expected.items())} ([out, in])"
            )
    return {name: settled(part) for name, part in parts.items()}
