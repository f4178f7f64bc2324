"""Decoding one sequence on CPUs, reading only the weights of coordinates that are not zero.

For each token every weight is read once and used once, so the time is that of reading memory. A matrix that reads a
sparse input is stored transposed, and the rows whose coordinate was dropped are not read. (With many sequences at once
the same weights serve all of them, another coordinate is zero in each, and nothing is gained.)

    decoder = Decoder(model, inputs)                         # inputs by layer and site; none: the dense model
    tokens = decoder.generate(prompt, 100)

A rotation in front of a matrix costs the reading of d² numbers. It costs nothing where it is folded: of the heads
(`fold_heads`, done here), or of the whole stream (`models.fold_stream`, before).
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from rotsparse.models.llama2c import as_huggingface
from rotsparse.models.model import Model, named
from rotsparse.models.transformer import READ
from rotsparse.sparse.decode_weights import aligned, padded, site_arrays, stored, weight_type
from rotsparse.sparse.file import SparseInputs
from rotsparse.sparse.fold import fold_heads

_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


class Decoder:
    """A model of Llama's family that takes one token at a time and keeps the keys and values of those before it.

    `inputs`: by layer and site, what drops coordinates there. `dtype`: of the weights, float32, bfloat16 or int8 (with
    a scale for each row); sums are in float32. `rotation_dtype`: of rotations that are carried out at each token
    (default: int8, a quarter of the reading: the matrices behind them undo their very rounding, so that the dense
    function is the same). `length`: how many tokens fit. `threads`: how many cores work (default: all).

    Raises `ValueError` for a model that is not of this kind, which says why; `ImportError` without the extra `decode`.
    """

    def __init__(
        self,
        model: Model,
        inputs: SparseInputs | None = None,
        *,
        dtype: Any = np.float32,
        rotation_dtype: Any = np.int8,
        length: int | None = None,
        threads: int | None = None,
    ):
        try:
            from rotsparse.sparse import decode_step, kernels
        except ImportError:
            raise ImportError("decoding on CPUs needs numba: pip install 'rotsparse[decode]'") from None
        model = as_huggingface(model) if model.format == "llama2c" else model
        if (reason := undecodable(model)) is not None:
            raise ValueError(reason)
        model, rest = fold_heads(model, inputs or {})
        weights, rotations = weight_type(dtype), weight_type(rotation_dtype)
        c = self.config = model.config
        self.length = min(length or c.max_positions, c.max_positions)
        self.threads = threads or os.cpu_count() or 1
        self.position = 0
        self._embed = np.asarray(model.params["embed"], np.float32)
        self._run: Any = decode_step.step
        self._abandoned = kernels.ABANDONED
        self._shape = decode_step.Shape(
            layers=c.n_layers,
            d_model=c.d_model,
            d_hidden=c.d_hidden,
            heads=c.n_heads,
            groups=c.n_kv_heads,
            d_head=c.d_head,
            vocabulary=c.vocab_size,
            turned=c.rotary.dims if c.rotary else 0,
            activation=_ACTIVATIONS[c.activation],
            eps=c.norm_eps,
            attention_scale=c.attention_scale,
        )
        self._constants = decode_step.Constants(**self._constant_arrays(model, weights))
        self._matrices = [decode_step.Matrix(**site_arrays(model, s, rest, weights, rotations)) for s in READ]
        self._state = decode_step.State(**self._arrays())
        self._others = ThreadPoolExecutor(max(self.threads - 1, 1))

    def reset(self) -> None:
        """Forget all tokens."""
        self.position = 0
        self._state.read[:] = 0

    def step(self, token: int) -> Float[np.ndarray, "vocabulary"]:
        """The logits behind one more token (overwritten by the next step). Raises `ValueError` for a token that the
        model does not have, or if no more fit."""
        if not 0 <= token < len(self._embed):
            raise ValueError(f"tokens are from 0 to {len(self._embed) - 1}, got {token}")
        if self.position >= self.length:
            raise ValueError(f"{self.length} tokens fit into this decoder: give it a longer length, or reset it")
        self._state.stream[:] = self._embed[token] * np.float32(self.config.embedding_scale)
        arguments = (self._shape, self._constants, *self._matrices, self._state, self.position)
        others = []
        try:
            for rank in range(1, self.threads):
                others.append(self._others.submit(self._run, *arguments, rank, self.threads))
            self._run(*arguments, 0, self.threads)
        except BaseException:  # interrupted: let those go on who wait for a thread that will not come
            self._state.counter[0] = self._abandoned
            raise
        finally:
            wait(others)
            self._state.counter[0] = 0
        self.position += 1
        return self._state.logits

    def generate(self, prompt: Sequence[int] | Integer[np.ndarray, "prompt"], length: int) -> list[int]:
        """Continue a prompt to `length` tokens, the likeliest each time. Forgets what was before."""
        if not 0 < len(prompt) < length <= self.length:
            raise ValueError(
                f"length counts the prompt: expected more than its {len(prompt)} tokens and at most the {self.length} "
                f"that fit, got {length}"
            )
        self.reset()
        tokens = [int(token) for token in prompt]
        for i in range(length - 1):
            logits = self.step(tokens[i])
            if i + 1 == len(tokens):
                tokens.append(int(np.argmax(logits)))
        return tokens

    def bytes_read(self) -> dict[str, float]:
        """The mean number of bytes that a token reads since the last reset, by what they are: the matrices of each
        site, rotations, the head, and keys and values. Raises `ValueError` before the first step."""
        if not self.position:
            raise ValueError("nothing was read yet: take a step first")
        c, read = self.config, self._state.read / self.position
        sites = zip(READ, read, self._matrices, strict=True)
        return {
            **{site: float(n) * m.biases.shape[1] * m.weights.itemsize for site, n, m in sites},
            "rotations": float(sum(m.rotations.nbytes for m in self._matrices)),
            "head": float(self._constants.head.nbytes),
            "cache": 4.0 * c.n_layers * c.n_kv_heads * c.d_head * (self.position + 1),
        }

    def _constant_arrays(self, model: Model, dtype: np.dtype) -> dict[str, np.ndarray]:
        p, c = model.params, model.config
        norms = [layer[name]["scale"] for layer in p["layers"] for name in ("attn_norm", "mlp_norm")]
        head, scales = stored(np.asarray(p.get("unembed", p["embed"])), dtype)
        angle, amplitude = np.zeros((self.length, 0)), 1.0
        if c.rotary is not None:
            angle = np.arange(self.length)[:, None] * c.rotary.frequencies(self.length)
            amplitude = c.rotary.amplitude
        of_heads = {
            f"{x}_norms": np.array(
                [layer["attn"][f"{x}_norm"]["scale"] for layer in p["layers"] if f"{x}_norm" in layer["attn"]],
                np.float32,
            ).reshape(-1, c.d_head)
            for x in "qk"
        }
        return {
            "head": head,
            "head_scales": scales,
            "norms": np.array([*norms, p["final_norm"]["scale"]], np.float32),
            **of_heads,
            "cos": (amplitude * np.cos(angle)).astype(np.float32),
            "sin": (amplitude * np.sin(angle)).astype(np.float32),
            "windows": np.array([window or self.length for window in c.windows]),
        }

    def _arrays(self) -> dict[str, np.ndarray]:
        c, n = self.config, self.threads
        widest = padded(max(c.d_model, c.d_hidden, c.n_heads * c.d_head))
        products = padded(max(c.d_model, 2 * c.d_hidden, (c.n_heads + 2 * c.n_kv_heads) * c.d_head))

        def floats(*shape: int) -> np.ndarray:
            return aligned(shape)

        return {
            "stream": floats(n, c.d_model),
            "site": floats(n, widest),
            "rotated": floats(2, widest),
            "keys_of": np.zeros((n, widest), np.uint32),
            "rows": np.zeros((n, widest + 1), np.int64),
            "factors": floats(n, widest + 1),
            "out": floats(len(READ), n, products),
            "query": floats(n, products),
            "weights": floats(n, self.length),
            "heads": floats(widest),
            "hidden": floats(widest),
            "keys": floats(c.n_layers, c.n_kv_heads, self.length, c.d_head),
            "values": floats(c.n_layers, c.n_kv_heads, self.length, c.d_head),
            "logits": floats(c.vocab_size),
            "counter": np.zeros(8, np.int64),
            "read": np.zeros(len(READ), np.int64),
        }


def undecodable(model: Model) -> str | None:
    """Why the decode step cannot compute a model; `None` where it can."""
    c = model.config
    lacking = {
        "norms other than RMSNorms in front of both blocks": c.norm != "rms" or c.placement != "pre" or c.parallel,
        "MLPs without a gate": not c.gated,
        f"the activation {c.activation}": c.activation not in _ACTIVATIONS,
        "no head of a causal language model": not (c.causal and c.head),
        "soft caps": c.attention_softcap is not None or c.logit_softcap is not None,
        "rotary pairs of neighbours": c.rotary is not None and c.rotary.interleaved,
        "several rotary embeddings": c.local_rotary is not None,
        "norms over all heads at once": c.wide_qk_norm,
        "attention scaled by layer": c.inverse_layer_scale,
    }
    names = {name.rpartition(".")[2] for name, _ in named(model.params)}
    matrices = {f"{kind}_{letter}" for kind in "wb" for letter in ("q", "k", "v", "o", "gate", "up", "down")}
    allowed = {"embed", "unembed", "scale", *matrices}
    if odd := sorted(names - allowed):
        lacking[f"the parameters {', '.join(odd)}"] = True
    found = [what for what, there in lacking.items() if there]
    if not found:
        return None
    return (
        f"this {c.architecture} model cannot be decoded here, because it has {', '.join(found)}: expected Llama's "
        "family (Llama, Mistral, Qwen 2 and 3, Gemma, Phi-3). models.generate runs every model"
    )
