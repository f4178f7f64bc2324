"""A transformer as a function of its parameters, for every architecture that can be read.

Every layer has named *sites*, at which values can be captured or replaced:

    attention  what enters the attention's matrices q, k and v, after the norm   [batch, tokens, d_model]
    heads      what enters its last matrix: the outputs of all heads             [batch, tokens, heads * d_head]
    residual   the stream in front of the MLP (in front of its norm)             [batch, tokens, d_model]
    input      what enters the MLP's first matrix, after the norm                [batch, tokens, d_model]
    hidden     what enters its last matrix, after the nonlinearity               [batch, tokens, d_hidden]
    output     what it adds to the stream (before a post-norm)                   [batch, tokens, d_model]

There is no dropout, because models are not trained here.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer

from rotsparse._core.types import AnyArray
from rotsparse.layers.activations import as_activation
from rotsparse.models.config import TransformerConfig
from rotsparse.models.embedding import affine, embed_image, embed_tokens, norm_of, position_bias
from rotsparse.models.model import Inputs, Params

SITES = ("attention", "heads", "residual", "input", "hidden", "output")
READ = {"attention": ("q", "k", "v"), "heads": ("o",), "input": ("gate", "up", "in"), "hidden": ("down", "out")}
"""The sites that enter linear maps, and the maps that read each (those of them that the architecture has)."""


def read_by(block: Params, site: str) -> tuple[Params, list[str]]:
    """The part of a layer in which the matrices are that read a site, and their names."""
    part = block["attn" if site in ("attention", "heads") else "mlp"]
    return part, [name for name in READ[site] if f"w_{name}" in part]


class Point(NamedTuple):
    """A place in the network: a site of one layer."""

    layer: int
    site: str

    def __str__(self) -> str:
        return f"{self.layer}.{self.site}"


Intervention = Callable[[Array], Array]


def run(
    params: Params,
    config: TransformerConfig,
    tokens: Inputs,
    *,
    mask: Bool[AnyArray, "batch tokens"] | None = None,
    token_types: Integer[AnyArray, "batch tokens"] | None = None,
    capture: tuple[tuple[int, str], ...] = (),
    intervene: Mapping[tuple[int, str], Intervention] | None = None,
) -> tuple[Float[Array, "batch tokens out"], dict[tuple[int, str], Array]]:
    """Logits (the last hidden state where the model has no head), and the values at the points in `capture`. A model
    of images takes their pixels instead of tokens.

    `mask` is False where a token is padding: nobody looks at it. `intervene` maps points to functions that replace the
    value there; a captured value is the replaced one. Everything but `params`, `tokens`, `mask` and `token_types` is
    static under `jax.jit`.

    Raises `ValueError` for a point that is not there, or more tokens than the model has positions.
    """
    probe = _Probe(config, capture, intervene or {})
    x = _embedded(params, config, tokens, mask, token_types)
    x = _blocks(params, config, x, probe, mask=mask)
    return _output(params, config, x), probe.captured


def _embedded(params, config, tokens, mask, token_types) -> Any:  # NumPy or JAX, as the parameters are
    """The stream in front of the first layer. Raises `ValueError` for more tokens than there are positions."""
    if config.patches is not None:
        return embed_image(params, config, tokens)
    if tokens.shape[1] > config.max_positions:
        raise ValueError(
            f"{tokens.shape[1]} tokens a sequence, but the model has {config.max_positions} positions: cut them shorter"
        )
    places = jnp.arange(tokens.shape[1])
    if mask is not None and config.position_offset and config.position_pad is None:
        places = jnp.cumsum(mask, axis=1) * mask - 1  # OPT counts the tokens that are looked at
    return embed_tokens(params, config, tokens, token_types, places)


def stream_before(
    params: Params,
    config: TransformerConfig,
    tokens: Inputs,
    layer: int,
    *,
    mask: Bool[AnyArray, "batch tokens"] | None = None,
) -> Float[Array, "batch tokens d_model"]:
    """The residual stream in front of a layer's attention: where `run_from` goes on."""
    shortened, probe = {**params, "layers": params["layers"][:layer]}, _Probe(config, (), {})
    return _blocks(shortened, config, _embedded(params, config, tokens, mask, None), probe, mask=mask)


def run_from(
    params: Params,
    config: TransformerConfig,
    x: Float[Array, "batch tokens d_model"],
    layer: int,
    *,
    mask: Bool[AnyArray, "batch tokens"] | None = None,
    capture: tuple[tuple[int, str], ...] = (),
    intervene: Mapping[tuple[int, str], Intervention] | None = None,
) -> tuple[Float[Array, "batch tokens out"], dict[tuple[int, str], Array]]:
    """What `run` returns, from the stream in front of a layer on: for many interventions there and behind it, the
    layers in front need to run only once."""
    probe = _Probe(config, capture, intervene or {})
    return _output(params, config, _blocks(params, config, x, probe, mask=mask, first=layer)), probe.captured


def block(
    params: Params,
    config: TransformerConfig,
    x: Float[Array, "batch tokens d_model"],
    layer: int,
    *,
    mask: Bool[AnyArray, "batch tokens"] | None = None,
    capture: tuple[tuple[int, str], ...] = (),
    intervene: Mapping[tuple[int, str], Intervention] | None = None,
) -> tuple[Float[Array, "batch tokens d_model"], dict[tuple[int, str], Array]]:
    """The stream behind a layer, from the one in front of it, and the values at the points of this layer in `capture`:
    a network whose activations do not fit into memory can be walked through a layer at a time. The parameters of other
    layers may be `None`. Arguments as those of `run`."""
    shortened, probe = {**params, "layers": params["layers"][: layer + 1]}, _Probe(config, capture, intervene or {})
    return _blocks(shortened, config, x, probe, mask=mask, first=layer), probe.captured


def _blocks(params, config, x, probe, *, mask, first=0):
    """The stream behind the last layer, from the one in front of the layer `first`."""
    n = x.shape[1]
    positions = jnp.arange(n)
    bias = position_bias(params, n)
    for index, layer in enumerate(params["layers"][first:], start=first):
        visible = _visible(config, index, positions, n)
        visible = visible[None] if mask is None else visible[None] & mask[:, None, :]

        def attend(p, u, index=index, visible=visible):
            return _attention(p, config, index, u, positions, visible, n, probe, bias=bias)

        x = _block(layer, config, x, attend, index, probe)
    return x


def step(
    params: Params,
    config: TransformerConfig,
    token: Int[Array, "batch"],
    position: Int[Array, ""],
    cache: Float[Array, "layers 2 batch tokens heads d"],
    *,
    intervene: Mapping[tuple[int, str], Intervention] | None = None,
) -> tuple[Float[Array, "batch out"], Float[Array, "layers 2 batch tokens heads d"]]:
    """What `run` returns at one position of a causal model, given the keys and values of the positions before it in
    `cache` (zeros of that shape at the start); and the cache with this position's. `intervene` as in `run`."""

    probe = _Probe(config, (), intervene or {})

    def attend(index, p, u):
        def remember(k, v):
            nonlocal cache
            cache = cache.at[index, :, :, position].set(jnp.stack([k[:, 0], v[:, 0]]))
            return cache[index, 0], cache[index, 1]

        n = cache.shape[3]
        visible = _visible(config, index, position[None], n)[None]
        return _attention(p, config, index, u, position[None], visible, n, probe, remember=remember)

    x: Any = embed_tokens(params, config, token[:, None], None, position[None])
    for index, layer in enumerate(params["layers"]):
        x = _block(layer, config, x, partial(attend, index), index, probe)
    return _output(params, config, x)[:, 0], cache


class _Probe:
    """Applies interventions and remembers captures while the network is traced."""

    def __init__(self, config, capture, intervene):
        self.wanted = {check_point(config, point) for point in capture}
        self.intervene = {check_point(config, point): f for point, f in intervene.items()}
        self.captured: dict[tuple[int, str], Array] = {}

    def __call__(self, layer: int, site: str, value: Array) -> Array:
        point = Point(layer, site)
        if point in self.intervene:
            changed = self.intervene[point](value)
            if changed.shape != value.shape:
                raise ValueError(
                    f"the intervention at {point} returned shape {list(changed.shape)}, expected {list(value.shape)}"
                )
            value = changed
        if point in self.wanted:
            self.captured[point] = value
        return value


def check_point(config: TransformerConfig, point: tuple[int, str]) -> Point:
    """The point, if the model has it. Raises `ValueError` that says which it has."""
    layer, site = point
    if site not in SITES or layer not in range(config.n_layers):
        raise ValueError(
            f"no point {layer}.{site} in the model: layers 0 to {config.n_layers - 1}, sites {', '.join(SITES)}"
        )
    return Point(layer, site)


def site_width(config: TransformerConfig, site: str) -> int:
    """The number of values at a site."""
    return {"hidden": config.d_hidden, "heads": config.n_heads * config.d_head}.get(site, config.d_model)


def _block(layer, config, x, attend, index, probe):
    def pre(name, x):
        return norm_of(layer[name], config)(x) if config.placement in ("pre", "sandwich") else x

    def attention(x):
        return attend(layer["attn"], probe(index, "attention", pre("attn_norm", x)))

    def mlp(x):
        return _mlp(layer["mlp"], config, pre("mlp_norm", x), index, probe)

    if config.parallel:
        x = probe(index, "residual", x)
        return _skip(layer, "attn_skip", x) + attention(x) + mlp(x)
    x = probe(index, "residual", _add(layer, config, "attn", x, attention(x)))
    return _add(layer, config, "mlp", x, mlp(x))


def _add(layer, config, name, x, y):
    """A block's output joins the stream, with the norms that come after it in some architectures."""
    if config.placement in ("sandwich", "output"):
        y = norm_of(layer[f"{name}_post_norm"], config)(y)
    x = _skip(layer, f"{name}_skip", x) + y
    return norm_of(layer[f"{name}_norm"], config)(x) if config.placement == "post" else x


def _skip(layer, name, x):
    return x @ layer[name].T if name in layer else x


def _mlp(p, config, u, index, probe):
    phi = as_activation(config.activation)
    u = probe(index, "input", u @ p["r_in"].T if "r_in" in p else u)
    if config.gated:
        h = phi(affine(p, "gate", u)) * affine(p, "up", u)
    else:
        h = phi(affine(p, "in", u))
    y = probe(index, "output", affine(p, "down" if config.gated else "out", probe(index, "hidden", h)))
    return y @ p["r_out"] if "r_out" in p else y  # r_out is undone: R⁻¹ = Rᵀ


def _attention(p, config, index, u, positions, visible, n, probe, *, bias=None, remember=lambda k, v: (k, v)):
    q, k, v = (affine(p, name, u) for name in "qkv")
    if "q_norm" in p and config.wide_qk_norm:
        q, k = norm_of(p["q_norm"], config)(q), norm_of(p["k_norm"], config)(k)
    q, k, v = (a.reshape(*u.shape[:2], -1, config.d_head) for a in (q, k, v))
    if "q_norm" in p and not config.wide_qk_norm:
        q, k = norm_of(p["q_norm"], config)(q), norm_of(p["k_norm"], config)(k)
    if (rotary := config.rotary_of(index)) is not None:
        q, k = _rotate(rotary, q, positions, n), _rotate(rotary, k, positions, n)
    k, v = remember(k, v)
    # Grouped-query attention: each key/value head serves `group` consecutive query heads.
    q = q.reshape(*q.shape[:2], config.n_kv_heads, -1, config.d_head)
    scale = config.attention_scale / (index + 1 if config.inverse_layer_scale else 1)
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k) * scale
    if bias is not None:
        scores = scores + bias.reshape(config.n_kv_heads, -1, *bias.shape[1:])
    scores = _soft_cap(scores, config.attention_softcap)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, jnp.finfo(scores.dtype).min), axis=-1)
    mixed = jnp.einsum("bkgts,bskd->btkgd", weights, v)
    return affine(p, "o", probe(index, "heads", mixed.reshape(*u.shape[:2], -1)))


def _rotate(rotary, x, positions, n):
    """Turn the pairs of every head of `x` `[batch, tokens, heads, d]` by their position's angles; the model sees `n`
    tokens."""
    angle = positions[:, None] * jnp.asarray(rotary.frequencies(n), x.dtype)
    cos, sin = (rotary.amplitude * f(angle)[:, None] for f in (jnp.cos, jnp.sin))
    turned, rest = x[..., : rotary.dims], x[..., rotary.dims :]
    if rotary.interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        pairs = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(turned.shape)
    else:
        a, b = jnp.split(turned, 2, axis=-1)
        pairs = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return jnp.concatenate([pairs, rest], axis=-1)


def _visible(config, layer, positions, n):
    """`[query, key]`: which of the n tokens each position may look at."""
    back = positions[:, None] - jnp.arange(n)[None, :]
    window = config.windows[layer]
    if not config.causal:
        return jnp.ones_like(back, bool) if window is None else abs(back) <= window
    return back >= 0 if window is None else (back >= 0) & (back < window)


def _output(params, config, x):
    if "final_norm" in params:
        x = norm_of(params["final_norm"], config)(x)
    if not config.head:
        return x
    logits = x @ params.get("unembed", params["embed"]).T
    return _soft_cap(logits, config.logit_softcap)


def _soft_cap(s, cap):
    return s if cap is None else cap * jnp.tanh(s / cap)
