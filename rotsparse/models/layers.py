"""The MLPs of a transformer as rotsparse layers, and layers put back as its MLPs."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from rotsparse.layers.base import Layer
from rotsparse.layers.gated import GatedMLP
from rotsparse.layers.mlp import MLP
from rotsparse.models.embedding import norm_of
from rotsparse.models.model import Model
from rotsparse.models.transformer import check_point

_PLAIN = ("w_in", "b_in", "w_out", "b_out")
_GATED = ("w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down")


def mlp_layer(model: Model, layer: int, *, norm: bool = False, skip: bool = False) -> MLP | GatedMLP:
    """The MLP of one layer.

    As it is, it maps the site `input` to `output`. With `norm` it starts at `residual`; with `skip` too it ends with
    the stream behind the block (in front of a post-norm).

    Raises `ValueError` if the architecture has no norm in front (BERT, OLMo 2), another norm before the sum (Gemma 2
    and 3, OLMo 2), or the MLP was folded to rotate when it runs, so that its coordinates are no longer the stream's.
    """
    check_point(model.config, (layer, "input"))
    block, config = model.params["layers"][layer], model.config
    options: dict[str, Any] = {"activation": config.activation}
    if norm and config.placement in ("post", "output"):
        already = "Its input is already normalised" if config.placement == "post" else "Its input is the stream itself"
        raise ValueError(
            f"{config.architecture} normalises behind its blocks: there is no norm in front of an MLP. {already}; "
            "leave norm=False"
        )
    if skip and not norm and config.placement in ("pre", "sandwich"):
        raise ValueError(
            "skip=True adds the stream in front of the norm, so the layer must start there: set norm=True too"
        )
    if skip and config.placement in ("sandwich", "output"):
        raise ValueError(
            f"{config.architecture} normalises an MLP's output before adding it to the stream, which no "
            "rotsparse layer does: leave skip=False"
        )
    if (norm or skip) and ("r_in" in block["mlp"] or "r_out" in block["mlp"]):
        raise ValueError(
            f"layer {layer} was folded by fold_mlp: its weights are in coordinates of their own. Take it without "
            "norm and skip, or from the model before folding"
        )
    if norm:
        options["norm"] = norm_of(block["mlp_norm"], config)
    if skip:
        options["skip"] = block.get(_skip_name(model), True)
    weights = {name: block["mlp"].get(name) for name in _fields(model)}
    return (GatedMLP if config.gated else MLP)(**weights, **options)


def with_mlp_layer(model: Model, layer: int, new: Layer) -> Model:
    """The model with these weights in the MLP of one layer: the inverse of `mlp_layer`.

    A norm or skip connection that the layer has is written too; one that it has not stays as it was. This only writes:
    a rotated layer changes the function unless the stream around it is rotated as well (see `fold`).

    Raises `ValueError` if the layer is of another kind or shape, or has a norm that the model cannot have.
    """
    old = mlp_layer(model, layer)
    if not isinstance(new, type(old)) or new.activation is not old.activation:
        phi = getattr(new, "activation", None)
        raise ValueError(
            f"layer {layer} is a {type(old).__name__} with {model.config.activation}, got a {type(new).__name__} with "
            f"{getattr(phi, '__name__', phi)}"
        )
    changed = jax.tree.map(lambda a: a, model.params)  # new dictionaries around the same arrays
    block = changed["layers"][layer]
    for name in _fields(model):
        value = getattr(new, name)
        if value is None:
            block["mlp"].pop(name, None)
            continue
        wanted = getattr(old, name.replace("b_", "w_")).shape[: value.ndim]
        if value.shape != wanted:
            raise ValueError(f"layer {layer}: {name} has shape {list(value.shape)}, the model needs {list(wanted)}")
        block["mlp"][name] = np.asarray(value, model.dtype)
    if new.norm is not None:
        block["mlp_norm"] = _norm_params(new.norm, model, layer)
    if new.skip is not None:
        skip = np.asarray(new.skip, model.dtype)
        block.pop(_skip_name(model), None)
        if not np.array_equal(skip, np.eye(len(skip))):
            block[_skip_name(model)] = skip
    return replace(model, params=changed)


def _fields(model):
    return _GATED if model.config.gated else _PLAIN


def _skip_name(model):
    return "attn_skip" if model.config.parallel else "mlp_skip"


def _norm_params(norm, model, layer):
    old = norm_of(model.params["layers"][layer]["mlp_norm"], model.config)
    new_mean, old_mean = norm.mean_direction, old.mean_direction
    if (new_mean is None) != (old_mean is None) or (new_mean is not None and np.abs(new_mean - old_mean).max() > 1e-6):
        raise ValueError(
            f"layer {layer}: the layer's norm removes another direction than the model's {model.config.norm} norm: "
            "rotate the whole stream with fold_stream instead"
        )
    params = {"scale": np.ones(norm.d, model.dtype) if norm.scale is None else np.asarray(norm.scale, model.dtype)}
    if norm.bias is not None:
        params["bias"] = np.asarray(norm.bias, model.dtype)
    elif old.bias is not None:
        params["bias"] = np.zeros(norm.d, model.dtype)
    return params
