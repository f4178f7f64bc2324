"""Through a model a layer at a time: what is compiled for one layer serves all that are like it."""

from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
from jaxtyping import Array, Float

from rotsparse._core.precision import full_precision
from rotsparse._core.types import AnyArray
from rotsparse.models.config import TransformerConfig
from rotsparse.models.model import Model
from rotsparse.models.transformer import Intervention, Point, block


def through(
    model: Model,
    layer: int,
    x: Float[AnyArray, "batch tokens d"],
    *,
    sites: Sequence[str] = (),
    change: Mapping[str, Intervention] | None = None,
) -> tuple[Float[Array, "batch tokens d"], dict[str, Array]]:
    """The stream behind a layer, from the one in front of it; and the values at its `sites`, changed by `change`."""
    alike = _first_like(model.config, layer)
    params = {name: model.params[name] for name in ("position_bias",) if name in model.params}
    params["layers"] = [None] * alike + [model.params["layers"][layer]]
    return _through(params, x, dict(change or {}), model.config, alike, tuple(sites))


@eqx.filter_jit
def _through(params, x, change, config, layer, sites):
    with full_precision():
        capture = tuple((layer, site) for site in sites)
        changes = {(layer, site): of for site, of in change.items()}
        x, seen = block(params, config, x, layer, capture=capture, intervene=changes)
    return x, {site: seen[Point(layer, site)] for site in sites}


def _first_like(config: TransformerConfig, layer: int) -> int:
    """The first layer that computes as this one does, but for its weights."""
    if config.inverse_layer_scale:
        return layer

    def kind(i: int) -> tuple[Any, ...]:
        return config.windows[i], config.rotary_of(i)

    return next(i for i in range(config.n_layers) if kind(i) == kind(layer))
