"""What a run is of, by its config: for its title, and for the list of runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

DEMOS = {
    "addition": "A network that adds modulo 59: its MLP",
    "digits": "A network that reads digits: its second layer",
}


def subject(config: Mapping[str, Any]) -> str:
    """A model and its layers, a layer file, or the network of a demo."""
    if config.get("command") == "demo":
        return str(config.get("network", ""))
    name = "model" if config.get("command") == "fit-model" else "layer"
    of = Path(str(config.get(name) or "")).name
    layers = config.get("layer_number", config.get("layers")) if name == "model" else None
    return of if layers is None else f"{of}, layer {layers}" if layers != "all" else f"{of}, all layers"


def title(config: Mapping[str, Any]) -> str:
    """The title of a page about a run of one layer: the model, the layer, and where it begins and ends."""
    if config.get("command") == "demo":
        return DEMOS.get(config.get("network", ""), "Demo")
    if config.get("layer_number") is None:
        return subject(config) or "A layer"
    begins = {"input": "MLP", "residual": "norm and MLP"}.get(config.get("site", ""), "MLP")
    return f"{subject(config)}: {begins}{' and stream' if config.get('skip') else ''}"
