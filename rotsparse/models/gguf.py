"""Models in GGUF files (llama.cpp's format), dequantised to float32.

The same architectures as Hugging Face's, under other names; the rotary pairs of Llama's queries and keys are put back
into Hugging Face's order. What a fold of such a model writes is a Hugging Face folder.
"""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from rotsparse.models.checkpoint import settled
from rotsparse.models.config import TransformerConfig
from rotsparse.models.families import family_of, read_config
from rotsparse.models.gguf_config import huggingface_config
from rotsparse.models.gguf_file import GgufFile
from rotsparse.models.model import Model, expected_shape, nested
from rotsparse.models.rotary import pairs_apart

_IGNORED = re.compile(r"rope_freqs\.weight|rope_factors_(long|short)\.weight|.*\.attn_rot_embd\.weight")
_WHOLE = {
    "token_embd.weight": "embed",
    "position_embd.weight": "positions",
    "token_types.weight": "token_types",
    "output.weight": "unembed",
}
# By placement of the norms, what a norm's name means; and the parts of a layer.
_NORMS = {
    "token_embd_norm": "embed_norm",
    "output_norm": "final_norm",
    "attn_norm": "attn_norm",
    "ffn_norm": "mlp_norm",
    "attn_q_norm": "attn.q_norm",
    "attn_k_norm": "attn.k_norm",
    "post_attention_norm": "attn_post_norm",
    "post_ffw_norm": "mlp_post_norm",
    "attn_output_norm": "attn_norm",
    "layer_output_norm": "mlp_norm",
}
_MATRICES = {
    "attn_q": ("attn", "q"),
    "attn_k": ("attn", "k"),
    "attn_v": ("attn", "v"),
    "attn_output": ("attn", "o"),
    "attn_qkv": ("attn", "qkv"),
}
_GATED = {"ffn_gate": ("mlp", "gate"), "ffn_up": ("mlp", "up"), "ffn_down": ("mlp", "down")}
_PLAIN = {"ffn_up": ("mlp", "in"), "ffn_down": ("mlp", "out")}


def load_gguf(path: str | os.PathLike) -> Model:
    """The model in a GGUF file.

    Raises `ValueError` if the file is damaged, the architecture or an entry about it is unknown, or tensors are
    missing, unexpected, or of the wrong shape; the message names them.
    """
    file = GgufFile(Path(path))
    raw = huggingface_config(file)
    head = family_of(raw).head is not None
    config = read_config(raw, head=head)
    flat: dict[str, np.ndarray] = {}
    for name in file.tensors:
        if _IGNORED.fullmatch(name):
            continue
        for param, array in _parameters(file, name, config):
            if param in flat:
                raise ValueError(f"{file.path}: two tensors hold {param}, {name!r} is the second")
            flat[param] = array
    _check_complete(file, raw, config, flat)
    if "unembed" in flat and np.array_equal(flat["unembed"], flat["embed"]):
        del flat["unembed"]  # GPT-2's files have it twice
        raw["tie_word_embeddings"] = True
    return Model(config, nested(flat, config.n_layers), format="gguf", raw=raw)


def _parameters(file: GgufFile, name: str, config: TransformerConfig) -> Iterator[tuple[str, np.ndarray]]:
    """What a tensor holds, each part checked."""
    params, split = _meaning(name, config)
    if not params:
        raise ValueError(f"{file.path} has a tensor {name!r}, which a {config.architecture} model does not have")
    wanted = {param: expected_shape(config, param) for param in params}
    rows = [shape[0] for shape in wanted.values()]
    stored = file.tensors[name].shape
    if (None not in rows and stored[0] != sum(row for row in rows if row)) or len(stored) != len(wanted[params[0]]):
        raise ValueError(
            f"{file.path}: tensor {name!r} has shape {list(stored)}, but its metadata call for "
            f"{' and '.join(f'{p} {list(s)}' for p, s in wanted.items())} ([out, in])"
        )
    array = file.floats(name)
    parts = np.split(array, np.cumsum([row or 0 for row in rows])[:-1]) if len(rows) > 1 else [array]
    for param, part in zip(params, parts, strict=True):
        if any(w not in (None, n) for w, n in zip(wanted[param], part.shape, strict=True)):
            raise ValueError(f"{file.path}: {param} has shape {list(part.shape)}, expected {list(wanted[param])}")
        yield param, settled(split(param, part))


def _meaning(name: str, config: TransformerConfig) -> tuple[tuple[str, ...], Callable[[str, np.ndarray], np.ndarray]]:
    """The parameters in a tensor, and what is to be done to each."""

    def same(param: str, array: np.ndarray) -> np.ndarray:
        return array

    if name in _WHOLE:
        return (_WHOLE[name],), same
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or (match[1] and int(match[1]) >= config.n_layers):
        return (), same
    layer = f"layers.{int(match[1])}." if match[1] else ""
    if match[2] in _NORMS:
        return (f"{layer}{_NORMS[match[2]]}.{'scale' if match[3] == 'weight' else 'bias'}",), same
    matrices = _MATRICES | (_GATED if config.gated else _PLAIN)
    if match[2] not in matrices or not layer:
        return (), same
    parent, letters = matrices[match[2]]
    kind = match[3][0]
    if letters == "qkv":
        return tuple(f"{layer}{parent}.{kind}_{letter}" for letter in letters), same
    if letters == "up" and config.architecture == "phi3":
        return tuple(f"{layer}{parent}.{kind}_{part}" for part in ("gate", "up")), same
    if letters in ("q", "k") and config.architecture in ("llama", "mistral"):
        heads = config.n_heads if letters == "q" else config.n_kv_heads
        return (f"{layer}{parent}.{kind}_{letters}",), lambda param, array: pairs_apart(array, heads)
    return (f"{layer}{parent}.{kind}_{letters}",), same


def _check_complete(file: GgufFile, raw, config: TransformerConfig, flat: dict[str, np.ndarray]) -> None:
    family = family_of(raw)
    entries = list(family.entries(config))
    optional = {param for entry in entries if entry.flag for param in entry.params}
    needed = {param for entry in entries for param in entry.params} - optional
    if missing := sorted(needed - flat.keys()):
        raise ValueError(f"{file.path} has no tensor for {', '.join(missing[:5])}, which a {config.architecture} needs")
    allowed = needed | optional | ({"unembed"} if config.head else set())
    if surplus := sorted(flat.keys() - allowed):
        raise ValueError(
            f"{file.path} has tensors that a {config.architecture} model does not have: {', '.join(surplus[:5])}"
        )
