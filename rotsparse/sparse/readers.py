"""Which tensors of a model read which site, under the names that Hugging Face's files and PyTorch's modules have for
them; and a hash of those tensors, which binds a file of sparse inputs to the model that it was made for."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from rotsparse.models.families import Entry, Family, family_of
from rotsparse.models.model import Model, named
from rotsparse.models.transformer import READ

_SITE = {f"w_{letter}": site for site, letters in READ.items() for letter in letters}


def site_read_by(entry: Entry) -> str | None:
    """The site that a tensor's matrix reads; `None` where it is no such matrix. (Of `layers.*.attn.w_q`, "attention".)
    Matrices that are fused read the same site."""
    sites = {_SITE.get(name.rpartition(".")[2]) for name in entry.params if name.startswith("layers.")}
    return sites.pop() if len(sites) == 1 else None


def reading_entries(family: Family) -> list[tuple[str, Entry]]:
    """The tensors of a family that read a site, with it; `*` in their names stands for the layer."""
    return [(site, entry) for entry in family.body if (site := site_read_by(entry)) is not None]


def reading_weights(model: Model) -> Iterator[tuple[str, np.ndarray]]:
    """The matrices that read sites, as they stand in a Hugging Face folder, without the prefix of the body (such as
    `model.`); for a model of another format, its parameters by their own names."""
    flat = dict(named(model.params))
    if not model.raw.get("model_type"):
        yield from ((name, array) for name, array in flat.items() if name.rpartition(".")[2] in _SITE)
        return
    for entry in family_of(model.raw).entries(model.config):
        if site_read_by(entry) is not None:
            yield entry.name, entry.join(model.config, *(flat[name] for name in entry.params))


def weights_hash(weights: Mapping[str, np.ndarray] | Iterable[tuple[str, np.ndarray]]) -> str:
    """SHA-256 over the names, shapes and values of some weights in the order of their names. Half precision is widened
    to float32 first, which loses nothing: so the same weights have one hash in whatever type they were loaded."""
    digest = hashlib.sha256()
    for name, array in sorted(dict(weights).items()):
        array = np.ascontiguousarray(array, np.float64 if array.dtype == np.float64 else np.float32)
        digest.update(f"{name} {array.dtype.name} {list(array.shape)}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()
