"""What a transformer computes: one description that covers every architecture the readers know.

The configuration says *how* things are computed; *what exists* (biases, a head of its own, learned positions, norms
over queries and keys) is read from the parameters. So the two cannot contradict each other.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from rotsparse.layers.activations import ACTIVATIONS


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding (Su et al., "RoFormer", 2021): pairs of coordinates of every query and key are turned
    by `position · frequency`.

    `dims`: how many leading coordinates of a head turn (NeoX turns a quarter). `interleaved`: pairs are (0,1), (2,3), …
    as in the original and in llama2.c; otherwise (0, dims/2), (1, dims/2+1), … as in Hugging Face. `factor` divides
    the frequencies; with `low_high` and `context` only the low ones, smoothly, as Llama 3.1 does.
    """

    dims: int
    theta: float = 10000.0
    interleaved: bool = False
    factor: float = 1.0
    low_high: tuple[float, float] | None = None
    context: int = 0

    def frequencies(self) -> np.ndarray:
        """Radians per position of each pair, `[dims/2]`, float64: `θ^(-2i/dims)`."""
        frequency = self.theta ** (-np.arange(0, self.dims, 2) / self.dims)
        if self.low_high is None:
            return frequency / self.factor
        # Llama 3.1: pairs that turn more than `high` times in the trained context keep their frequency, those that
        # turn less than `low` times are slowed by `factor`, and between them the two are mixed linearly.
        low, high = self.low_high
        turns = self.context * frequency / (2 * np.pi)
        keep = np.clip((turns - low) / (high - low), 0, 1)
        return frequency * (keep + (1 - keep) / self.factor)


@dataclass(frozen=True)
class TransformerConfig:
    """A decoder or encoder made of attention and MLP blocks on a residual stream.

    - `norm`: `"rms"` or `"layer"`; a norm has a bias where its parameters do.
    - `placement` of the norms: `"pre"` (`x + f(N(x))`), `"post"` (`N(x + f(x))`, BERT), or `"sandwich"`
      (`x + N'(f(N(x)))`, Gemma 2).
    - `parallel`: attention and MLP both read the stream as it was before either (GPT-NeoX).
    - `windows`: for each layer how many tokens back, itself included, a position may look (`None`: all).
    - `attention_scale` multiplies `q·k`; a soft cap `c` replaces scores or logits s by `c tanh(s/c)` (Gemma 2).
    - `head`: whether there are logits; without one the model's output is its last hidden state. The head is the
      embedding itself ("tied") unless the parameters have an `unembed`.

    Raises `ValueError` where sizes contradict each other.
    """

    architecture: str
    n_layers: int
    d_model: int
    d_hidden: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    vocab_size: int
    max_positions: int
    activation: str
    gated: bool
    norm: Literal["rms", "layer"]
    norm_eps: float
    placement: Literal["pre", "post", "sandwich"] = "pre"
    parallel: bool = False
    causal: bool = True
    head: bool = True
    rotary: Rotary | None = None
    windows: tuple[int | None, ...] = ()
    attention_scale: float = 0.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0

    def __post_init__(self):
        for name in ("n_layers", "d_model", "d_hidden", "n_heads", "n_kv_heads", "d_head", "vocab_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"model config: {name} should be a positive integer, got {getattr(self, name)!r}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"model config: {self.n_heads} query heads cannot be shared out among {self.n_kv_heads} key/value heads"
            )
        if self.rotary is not None and not (0 < self.rotary.dims <= self.d_head and self.rotary.dims % 2 == 0):
            raise ValueError(
                f"model config: rotary dims should be even and at most d_head={self.d_head}, got {self.rotary.dims}"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"model config: unknown activation {self.activation!r}: expected one of {', '.join(ACTIVATIONS)}"
            )
        object.__setattr__(self, "windows", self.windows or (None,) * self.n_layers)
        object.__setattr__(self, "attention_scale", self.attention_scale or self.d_head**-0.5)
        if len(self.windows) != self.n_layers:
            raise ValueError(
                f"model config: {self.n_layers} layers need as many attention windows, got {len(self.windows)}"
            )
