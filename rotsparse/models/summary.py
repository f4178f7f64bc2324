"""A summary of a model and of the rotations that can be folded into it, as plain data."""

from typing import Any

from rotsparse.models.fold import obstacle
from rotsparse.models.model import Model
from rotsparse.models.stream import stream_places


def summarize(model: Model) -> dict[str, Any]:
    """Sizes, the MLP of every layer, and which rotations can be folded where (or why not).

    `export`: which rotations of the whole stream leave the model in the format that it came in.
    """
    config, reason = model.config, obstacle(model)
    kept = "that keeps the mean direction (keep_mean)" if config.norm == "layer" else "of the whole stream"
    return {
        "architecture": config.architecture,
        "format": model.format,
        "parameters": model.n_parameters(),
        "vocabulary": config.vocab_size,
        "positions": config.max_positions,
        "head": "none" if not config.head else "tied" if model.tied else "untied",
        "norm": f"{config.norm}, {config.placement}",
        "layers": [
            {
                "layer": i,
                "mlp": f"{'gated ' if config.gated else ''}{config.activation}",
                "d_in": config.d_model,
                "d_hidden": config.d_hidden,
                "d_out": config.d_model,
            }
            for i in range(config.n_layers)
        ],
        "stream": {
            "foldable": reason is None,
            "reason": reason,
            "places": stream_places(config),
            "export": f"any rotation {kept}" if reason is None else None,
        },
    }
