"""What a row of the table of families consists of: the tensors of a model, and the entries of its `config.json`.

`*` stands for the number of a layer.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rotsparse.models.config import TransformerConfig

Arrays = tuple[np.ndarray, ...]


def _same(config: TransformerConfig, array: np.ndarray) -> Arrays:
    return (array,)


@dataclass(frozen=True)
class Entry:
    """A tensor of the file and the parameters in it: one, or several where matrices are fused.

    `flag`: the entry of config.json that says whether the tensor exists. The file decides: a tensor that is missing
    everywhere is one that the model does not have. `exists`: whether models of this configuration have it.
    """

    name: str
    params: tuple[str, ...]
    split: Callable[[TransformerConfig, np.ndarray], Arrays] = _same
    join: Callable[..., np.ndarray] = lambda config, array: array
    flag: str | None = None
    exists: Callable[[TransformerConfig], bool] = lambda config: True


@dataclass(frozen=True)
class Family:
    """How models of one `model_type` are read and written.

    - `body`: every tensor of the transformer without its head; `prefix` stands before their names in files that were
      saved with a head.
    - `head`: the name of the tensor of the language model's head.
    - `settings`: the fields of `TransformerConfig` that follow from the family and its `config.json`.
    - `keys`: entries of config.json that `settings` reads, beyond those that every family has.
    - `only`: entries that are read right with these values alone; a model with another value is refused.
    - `harmless`: entries without influence on what the trained model computes.
    - `defaults`: what the transformers library takes where config.json has no such entry.
    - `spelled`: the family's own words for entries, and the usual ones. `also`: the usual ones that transformers takes
      as well; it takes no notice of the others.
    - `ignored`, `carried`: patterns of tensors that can be recomputed, and that are not used but written back.
    - `renames`: other names under which files have the tensors.
    """

    body: tuple[Entry, ...]
    prefix: str
    settings: Callable[[Any], dict[str, Any]]  # of a `settings.Settings`
    head: str | None = "lm_head.weight"
    keys: str = ""
    only: Mapping[str, tuple] = field(default_factory=dict)
    harmless: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    spelled: Mapping[str, str] = field(default_factory=dict)
    also: str = ""
    ignored: str = r"rotary_emb\.inv_freq$"
    carried: str = r"(?!)"
    renames: tuple[tuple[str, str | Callable], ...] = ()

    def entries(self, config: TransformerConfig, prefix: str = "") -> Iterator[Entry]:
        """Every tensor of a body with this configuration."""
        for entry in (entry for entry in self.body if entry.exists(config)):
            for i in range(config.n_layers) if "*" in entry.name else (0,):
                yield replace(
                    entry,
                    name=prefix + entry.name.replace("*", str(i)),
                    params=tuple(name.replace("*", str(i)) for name in entry.params),
                )

    def flags(self) -> dict[str, tuple[str, ...]]:
        """The entries of config.json that switch parameters on, and these parameters."""
        flags: dict[str, tuple[str, ...]] = {}
        for entry in self.body:
            if entry.flag:
                flags[entry.flag] = flags.get(entry.flag, ()) + entry.params
        return flags


# --- tensors ------------------------------------------------------------------------------------------------------


def tensor(theirs: str, ours: str) -> list[Entry]:
    """One tensor that is one parameter."""
    return [Entry(theirs, (ours,))]


def linear(theirs: str, ours: str, *, bias: bool | str = True, transposed: bool = False) -> list[Entry]:
    """A matrix `[out, in]` and its bias. `ours` is such as `layers.*.attn.q`; `bias` may be the flag that decides."""
    parent, _, letter = ours.rpartition(".")
    weight = Entry(f"{theirs}.weight", (f"{parent}.w_{letter}",))
    if transposed:
        weight = replace(weight, split=lambda c, a: (a.T,), join=lambda c, a: a.T)
    if not bias:
        return [weight]
    flag = bias if isinstance(bias, str) else None
    return [weight, Entry(f"{theirs}.bias", (f"{parent}.b_{letter}",), flag=flag)]


def fused(
    theirs: str,
    ours: str,
    letters: tuple[str, ...],
    split: Callable[[TransformerConfig, np.ndarray], Arrays],
    join: Callable[..., np.ndarray],
    *,
    bias: bool | str = False,
) -> list[Entry]:
    """Several matrices in one, and their biases. `ours` is such as `layers.*.attn`."""
    entries = [Entry(f"{theirs}.weight", tuple(f"{ours}.w_{letter}" for letter in letters), split, join)]
    if bias:
        flag = bias if isinstance(bias, str) else None
        biases = tuple(f"{ours}.b_{letter}" for letter in letters)
        entries.append(Entry(f"{theirs}.bias", biases, split, join, flag))
    return entries


def layer_norm(theirs: str, ours: str) -> list[Entry]:
    """A LayerNorm's scale and bias."""
    return [Entry(f"{theirs}.weight", (f"{ours}.scale",)), Entry(f"{theirs}.bias", (f"{ours}.bias",))]


def rms_norm(theirs: str, ours: str) -> list[Entry]:
    """An RMSNorm's scale."""
    return [Entry(f"{theirs}.weight", (f"{ours}.scale",))]


def gemma_norm(theirs: str, ours: str) -> list[Entry]:
    """An RMSNorm whose file stores `γ - 1`."""
    return [Entry(f"{theirs}.weight", (f"{ours}.scale",), lambda c, a: (a + 1,), lambda c, a: a - 1)]


def rows(*sizes: Callable[[TransformerConfig], int]) -> Callable[[TransformerConfig, np.ndarray], Arrays]:
    """Parts that stand one below the other, of so many rows each."""

    def split(config, array):
        counts = [size(config) for size in sizes]
        if array.shape[0] != sum(counts):
            raise ValueError("the rows do not add up")
        return tuple(np.split(array, np.cumsum(counts)[:-1]))

    return split


def stacked(config: TransformerConfig, *parts: np.ndarray) -> np.ndarray:
    """The inverse of `rows`."""
    return np.concatenate(parts)
