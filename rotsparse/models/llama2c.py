"""llama2.c's own files: the legacy checkpoint (`.bin`) and its tokenizer.

Checkpoint: seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len), then every tensor in
float32. A negative vocab_size says that the head is not the embedding ("untied") and follows at the end.
Tokenizer: int32 longest token, then for every token its float32 score, int32 length, and bytes.
(Karpathy, llama2.c: export.py, run.c.)
"""

import itertools
import math
import os
import re
import struct
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from rotsparse._core.files import write_atomically
from rotsparse._core.reading import regular_file
from rotsparse.models.config import TransformerConfig
from rotsparse.models.model import Model, named, nested
from rotsparse.models.rotary import Rotary, pairs_apart

_HEADER = struct.Struct("<7i")
_NORM_EPS = 1e-5


def load_llama2c(path: str | os.PathLike) -> Model:
    """The model in a legacy llama2.c checkpoint.

    Raises `ValueError` if the file is missing, not such a checkpoint, or not as long as its header says.
    """
    path = Path(path)
    try:
        data = np.memmap(regular_file(path), dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the llama2.c checkpoint {path}: {error}") from None
    if len(data) < _HEADER.size:
        raise ValueError(f"{path} has {len(data)} bytes, a llama2.c checkpoint starts with a header of {_HEADER.size}")
    dim, hidden, n_layers, n_heads, n_kv_heads, vocab, seq_len = _HEADER.unpack(data[: _HEADER.size].tobytes())
    if min(dim, hidden, n_layers, n_heads, n_kv_heads, abs(vocab), seq_len) < 1 or dim % n_heads:
        raise ValueError(
            f"{path} does not look like a legacy llama2.c checkpoint: its header would be dim {dim}, hidden {hidden}, "
            f"{n_layers} layers, {n_heads} heads, {n_kv_heads} key/value heads, vocabulary {vocab}, length {seq_len}"
        )
    config = _config(dim, hidden, n_layers, n_heads, n_kv_heads, abs(vocab), seq_len)
    layout = _layout(config, untied=vocab < 0)
    expected = _HEADER.size + 4 * sum(math.prod(shape) for _, shape in layout)
    if len(data) != expected:
        reason = "it is truncated, fetch it again" if len(data) < expected else "it is another version of the format"
        raise ValueError(f"{path} has {len(data)} bytes, but its header calls for {expected}: {reason}")
    flat, start = {}, _HEADER.size
    for name, shape in layout:
        stop = start + 4 * math.prod(shape)
        array = data[start:stop].view("<f4").reshape(shape)
        flat.update(_unstack(name, array) if "*" in name else {name: np.array(array)})
        start = stop
    flat = {name: array for name, array in flat.items() if not name.startswith("freq_cis")}
    return Model(config, nested(flat, n_layers), format="llama2c", raw={"seq_len": seq_len})


def save_llama2c(model: Model, path: str | os.PathLike) -> None:
    """Write the model as a legacy llama2.c checkpoint (float32), untied where it has a head of its own. Atomic.

    Raises `ValueError` if the format cannot hold the model, and says what it cannot hold.
    """
    c = model.config
    expected = _config(c.d_model, c.d_hidden, c.n_layers, c.n_heads, c.n_kv_heads, c.vocab_size, c.max_positions)
    differing = [name for name in vars(c) if name != "architecture" and getattr(c, name) != getattr(expected, name)]
    if differing:
        changes = ", ".join(f"{n} is {getattr(c, n)} but can only be {getattr(expected, n)}" for n in differing)
        raise ValueError(f"llama2.c's format cannot hold this model: {changes}")
    layout = _layout(c, untied=not model.tied)
    flat = dict(named(model.params))
    generic = {re.sub(r"\.\d+\.", ".*.", name) for name in flat}
    surplus = generic - {name for name, _ in layout}
    if surplus:
        raise ValueError(f"llama2.c's format has no place for {', '.join(sorted(surplus))}")
    angle = np.arange(c.max_positions)[:, None] * _rotary(c.d_head).frequencies()
    flat.update({"freq_cis_real": np.cos(angle), "freq_cis_imag": np.sin(angle)})
    vocab = c.vocab_size if model.tied else -c.vocab_size
    parts = [_HEADER.pack(c.d_model, c.d_hidden, c.n_layers, c.n_heads, c.n_kv_heads, vocab, c.max_positions)]
    for name, _ in layout:
        names = [name.replace("*", str(i)) for i in range(c.n_layers)] if "*" in name else [name]
        parts += [np.ascontiguousarray(flat[n], "<f4").tobytes() for n in names]
    write_atomically(path, b"".join(parts))


def as_huggingface(model: Model) -> Model:
    """The same function as a Llama model of Hugging Face: the rotary pairs of queries and keys are put half a head
    apart. Raises `ValueError` if it has become something that is no Llama model."""
    c = model.config
    raw = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_hidden,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.d_head,
        "max_position_embeddings": c.max_positions,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rotary.theta if c.rotary else 10000.0,
        "hidden_act": c.activation,
        "tie_word_embeddings": model.tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    heads = {"w_q": c.n_heads, "w_k": c.n_kv_heads}
    layers = [
        {**layer, "attn": {n: pairs_apart(a, heads[n]) if n in heads else a for n, a in layer["attn"].items()}}
        for layer in model.params["layers"]
    ]
    config = replace(c, architecture="llama", rotary=replace(_rotary(c.d_head), interleaved=False))
    return Model(config, {**model.params, "layers": layers}, "huggingface", raw)


def _config(dim, hidden, n_layers, n_heads, n_kv_heads, vocab, seq_len):
    d_head = dim // n_heads
    return TransformerConfig(
        architecture="llama2c",
        n_layers=n_layers,
        d_model=dim,
        d_hidden=hidden,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        vocab_size=vocab,
        max_positions=seq_len,
        activation="silu",
        gated=True,
        norm="rms",
        norm_eps=_NORM_EPS,
        rotary=_rotary(d_head),
    )


def _rotary(d_head):
    return Rotary(d_head, interleaved=True)


def _layout(c, untied):
    """Names and shapes of the tensors in the order of the file; `*` stands for all layers, stacked."""
    keys = c.n_kv_heads * c.d_head
    shapes = {
        "embed": (c.vocab_size, c.d_model),
        "layers.*.attn_norm.scale": (c.d_model,),
        "layers.*.attn.w_q": (c.d_model, c.d_model),
        "layers.*.attn.w_k": (keys, c.d_model),
        "layers.*.attn.w_v": (keys, c.d_model),
        "layers.*.attn.w_o": (c.d_model, c.d_model),
        "layers.*.mlp_norm.scale": (c.d_model,),
        "layers.*.mlp.w_gate": (c.d_hidden, c.d_model),
        "layers.*.mlp.w_down": (c.d_model, c.d_hidden),
        "layers.*.mlp.w_up": (c.d_hidden, c.d_model),
        "final_norm.scale": (c.d_model,),
        # Tables of cos and sin, which every reader recomputes or skips.
        "freq_cis_real": (c.max_positions, c.d_head // 2),
        "freq_cis_imag": (c.max_positions, c.d_head // 2),
    }
    if untied:
        shapes["unembed"] = (c.vocab_size, c.d_model)
    return [(name, (c.n_layers, *shape) if "*" in name else shape) for name, shape in shapes.items()]


def _unstack(name, stacked):
    return {name.replace("*", str(i)): np.array(array) for i, array in enumerate(stacked)}


class Llama2cTokenizer:
    """Byte-pair encoding as llama2.c does it: characters, unknown ones as bytes, then the best-scoring neighbours are
    merged until none is left.

    Raises `ValueError` if the file is missing, truncated, or does not hold exactly `vocab_size` tokens.
    """

    prefix: Sequence[int] = (1,)
    suffix: Sequence[int] = ()
    special: AbstractSet[int] = frozenset((0, 1, 2))
    pad: int | None = None

    def __init__(self, path: str | os.PathLike, vocab_size: int):
        self.vocab_size = vocab_size
        self.tokens, self.scores = _read_vocabulary(Path(path), vocab_size)
        # Where two tokens are spelled alike, the first one is meant.
        self._ids = {token: i for i, token in reversed(list(enumerate(self.tokens)))}
        # No merge can cross a place where a space follows a letter, unless a token has such a place inside it.
        crossing = any(re.search(rb"[^ ] ", token) for token in self.tokens[259:])
        self._pieces = re.compile(r"(?s).+" if crossing else r" *[^ ]+| +")
        self._encode_piece = lru_cache(1 << 16)(self._merge)

    def encode(self, text: str) -> list[int]:
        """Token numbers of a text, without the beginning-of-text token (`prefix`)."""
        # As SentencePiece does, a text starts like a word after a space.
        return [i for piece in self._pieces.findall(" " + text) for i in self._encode_piece(piece)] if text else []

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens; beginning and end marks are left out."""
        pieces = []
        for i in ids:
            byte = re.fullmatch(rb"<0x([0-9A-F]{2})>", self.tokens[i])
            pieces.append(bytes([int(byte[1], 16)]) if byte else b"" if i in (1, 2) else self.tokens[i])
        text = b"".join(pieces).decode("utf-8", errors="replace")
        return text.removeprefix(" ")

    def _merge(self, piece: str) -> tuple[int, ...]:
        ids: list[int] = []
        for character in piece:
            encoded = character.encode()
            known = self._ids.get(encoded)
            # The tokens of the 256 bytes follow those of unknown, beginning and end.
            ids += [byte + 3 for byte in encoded] if known is None else [known]
        while True:
            pairs = [self._ids.get(self.tokens[a] + self.tokens[b]) for a, b in itertools.pairwise(ids)]
            merges = [(self.scores[token], -i, token) for i, token in enumerate(pairs) if token is not None]
            if not merges:
                return tuple(ids)
            _, i, token = max(merges)
            ids[-i : -i + 2] = [token]


def _read_vocabulary(path, vocab_size):
    try:
        data = regular_file(path).read_bytes()
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the tokenizer {path}: {error}") from None
    tokens, scores, at = [], [], 4
    while at < len(data):
        start = at + 8
        score, length = struct.unpack_from("<fi", data, at) if start <= len(data) else (0.0, -1)
        if length < 0 or start + length > len(data):
            raise ValueError(f"{path} is truncated or not a llama2.c tokenizer: it ends inside token {len(tokens)}")
        at = start + length
        tokens.append(data[start:at])
        scores.append(score)
    if len(tokens) != vocab_size:
        raise ValueError(
            f"{path} holds {len(tokens)} tokens, but the model has a vocabulary of {vocab_size}: "
            "they do not belong together"
        )
    return tokens, scores
