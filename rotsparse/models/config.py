"""The configuration of a transformer: one description for every architecture that can be read.

The configuration says *how* things are computed; *what exists* (biases, a head of its own, learned positions, norms
over queries and keys) is read from the parameters. So the two cannot contradict each other.
"""

from dataclasses import dataclass
from typing import Literal

from rotsparse.layers.activations import ACTIVATIONS
from rotsparse.models.rotary import Rotary

MAX_LAYERS = 10_000
_SIZES = ("n_layers", "d_model", "d_hidden", "n_heads", "n_kv_heads", "d_head", "vocab_size", "max_positions")


@dataclass(frozen=True)
class Patches:
    """How an image becomes tokens (ViT): cut into patches, each one mapped by a matrix, behind a class token.

    `image` and `patch` are heights and widths in pixels.
    """

    channels: int
    image: tuple[int, int]
    patch: tuple[int, int]

    @property
    def grid(self) -> tuple[int, int]:
        """How many patches there are, down and across."""
        return self.image[0] // self.patch[0], self.image[1] // self.patch[1]

    @property
    def pixels(self) -> int:
        """How many numbers a patch has."""
        return self.channels * self.patch[0] * self.patch[1]


@dataclass(frozen=True)
class TransformerConfig:
    """A decoder or encoder made of attention and MLP blocks on a residual stream.

    - `norm`: `"rms"` or `"layer"`; a norm has a bias where its parameters do.
    - `placement` of the norms: `"pre"` (`x + f(N(x))`), `"post"` (`N(x + f(x))`, BERT), `"sandwich"`
      (`x + N'(f(N(x)))`, Gemma 2 and 3), or `"output"` (`x + N(f(x))`, OLMo 2).
    - `parallel`: attention and MLP both read the stream as it was before either (GPT-NeoX).
    - `windows`: for each layer how many tokens back, itself included, a position may look (`None`: all). Without
      `causal` it may look so many tokens to either side.
    - `local_rotary`: the rotary embedding of layers with a window, where it is another one (Gemma 3).
    - `attention_scale` multiplies `q·k`, divided by the layer's number from 1 with `inverse_layer_scale` (GPT-2); a
      soft cap `c` replaces scores or logits s by `c tanh(s/c)` (Gemma 2).
    - `wide_qk_norm`: norms over all queries and all keys at once (OLMo 2), not head by head.
    - `position_offset`: the first token's row in the table of positions; with `position_pad` only tokens other than
      this one are counted, and it has its own number's row (RoBERTa).
    - `position_buckets`: rows of a table of biases by distance (MPNet), 0 without one.
    - `d_embedding`: the width of the embeddings, mapped to `d_model` by a matrix (ELECTRA); 0 where it is the same.
    - `patches`: the inputs are images.
    - `head`: whether there are logits; without one the model's output is its last hidden state. The head is the
      embedding itself ("tied") unless the parameters have an `unembed`.

    Raises `ValueError` if sizes contradict each other.
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
    placement: Literal["pre", "post", "sandwich", "output"] = "pre"
    parallel: bool = False
    causal: bool = True
    head: bool = True
    rotary: Rotary | None = None
    local_rotary: Rotary | None = None
    windows: tuple[int | None, ...] = ()
    attention_scale: float = 0.0
    inverse_layer_scale: bool = False
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    wide_qk_norm: bool = False
    position_offset: int = 0
    position_pad: int | None = None
    position_buckets: int = 0
    d_embedding: int = 0
    patches: Patches | None = None

    def __post_init__(self):
        for name in _SIZES:
            size, least = getattr(self, name), 0 if name == "vocab_size" and self.patches else 1
            if type(size) is not int or not least <= size < 1 << 40:
                raise ValueError(f"model config: {name} should be a positive integer, got {size!r}")
        if self.n_layers > MAX_LAYERS:
            raise ValueError(f"model config: n_layers should be at most {MAX_LAYERS}, got {self.n_layers}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"model config: {self.n_heads} query heads cannot be shared out among {self.n_kv_heads} key/value "
                "heads (num_key_value_heads)"
            )
        for rotary in (self.rotary, self.local_rotary):
            if rotary is not None and not (0 < rotary.dims <= self.d_head and rotary.dims % 2 == 0):
                raise ValueError(
                    f"model config: rotary dims should be even and at most d_head={self.d_head}, got {rotary.dims}"
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

    def rotary_of(self, layer: int) -> Rotary | None:
        """The rotary embedding of a layer."""
        local = self.windows[layer] is not None and self.local_rotary is not None
        return self.local_rotary if local else self.rotary
