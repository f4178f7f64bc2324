"""Through a model a layer at a time: what is compiled for one layer serves all that are like it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, Int

from rotsparse._core.precision import full_precision
from rotsparse._core.types import AnyArray
from rotsparse.models.config import TransformerConfig
from rotsparse.models.model import Model, Params
from rotsparse.models.transformer import Intervention, Point, block, stream_before


def through(
    model: Model,
    layer: int,
    x: Float[AnyArray, "batch tokens d"],
    *,
    sites: Sequence[str] = (),
    change: Mapping[str, Intervention] | None = None,
) -> tuple[Float[Array, "batch tokens d"], dict[str, Array]]:
    """The stream behind a layer, from the one in front of it; and the values at its `sites`, changed by `change`."""
    params, alike = _params(model, layer)
    return _through(params, x, dict(change or {}), model.config, alike, tuple(sites))


def on_device(model: Model, layer: int) -> Model:
    """The model with the weights of one layer on the device, for several calls of `through`."""
    layers = list(model.params["layers"])
    layers[layer] = jax.device_put(layers[layer])
    return replace(model, params={**model.params, "layers": layers})


def before(model: Model, tokens: Int[AnyArray, "batch tokens"]) -> Float[Array, "batch tokens d"]:
    """The stream in front of the first layer."""
    return stream_before({**model.params, "layers": []}, model.config, tokens, 0)


def gradients(
    model: Model,
    streams: Sequence[Float[AnyArray, "batch tokens d"]],
    gradient: Float[AnyArray, "batch tokens d"],
    *,
    change: Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Intervention]],
    fixed: Mapping[Point, Any],
    moved: Mapping[Point, Any],
) -> Iterator[tuple[Point, Any]]:
    """The gradients with respect to `moved`, from the last point to the first, where `through` has
    `change=change(fixed, moved)` of each layer's sites. `streams`: in front of every layer; `gradient`: with respect to
    the stream behind the last one. What is inside of a layer is worked out once more, so that nothing but the stream
    between the layers need be kept."""
    for layer in reversed(range(min(at.layer for at in moved), model.config.n_layers)):
        params, alike = _params(model, layer)
        of_layer = (_sites(fixed, layer), _sites(moved, layer))
        gradient, found = _back(params, streams[layer], gradient, *of_layer, model.config, alike, change)
        yield from ((Point(layer, site), of) for site, of in found.items())


def _sites(of: Mapping[Point, Any], layer: int) -> dict[str, Any]:
    return {at.site: value for at, value in of.items() if at.layer == layer}


def head(model: Model) -> Params:
    """What makes logits of the stream behind the last layer."""
    names = ("final_norm", "unembed", "embed")
    return {name: of for name, of in model.params.items() if name in names} | {"layers": []}


def _params(model: Model, layer: int):
    """What a layer needs, in the place of the first one that computes as it does."""
    alike = _first_like(model.config, layer)
    params = {name: model.params[name] for name in ("position_bias",) if name in model.params}
    return params | {"layers": [None] * alike + [model.params["layers"][layer]]}, alike


@eqx.filter_jit
def _through(params, x, change, config, layer, sites):
    with full_precision():
        capture = tuple((layer, site) for site in sites)
        changes = {(layer, site): of for site, of in change.items()}
        x, seen = block(params, config, x, layer, capture=capture, intervene=changes)
    return x, {site: seen[Point(layer, site)] for site in sites}


@eqx.filter_jit
def _back(params, x, gradient, fixed, moved, config, layer, change):
    def behind(x, moved):
        changes = {(layer, site): of for site, of in change(fixed, moved).items()}
        return block(params, config, x, layer, intervene=changes)[0]

    with full_precision():
        return jax.vjp(behind, x, moved)[1](gradient)


def _first_like(config: TransformerConfig, layer: int) -> int:
    """The first layer that computes as this one does, but for its weights."""
    if config.inverse_layer_scale:
        return layer

    def kind(i: int) -> tuple[Any, ...]:
        return config.windows[i], config.rotary_of(i)

    return next(i for i in range(config.n_layers) if kind(i) == kind(layer))
