"""`rotsparse export`: write the directions of a run in the format of another library."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from rotsparse._core.printable import visible
from rotsparse._core.reading import reading
from rotsparse.data.sources import in_memory
from rotsparse.explain.directions import IN
from rotsparse.explain.sae import HOOKS, write_sae
from rotsparse.layers.jacobians import apply
from rotsparse.runs.opened import load_run
from rotsparse_command import options


def run(command: "options.Export", console: Console) -> int:
    """Write one side of a run as an autoencoder of SAELens."""
    with reading(command.run):
        opened = load_run(command.run)
        r = opened.rotations.r_in if command.side == IN else opened.rotations.r_out
        x = np.asarray(in_memory(opened.inputs[1])[0])
        values = x if command.side == IN else np.asarray(apply(opened.layer, jnp.asarray(x)))
        metadata = {"made_by": "rotsparse", "side": command.side}
        if opened.layer_number is not None:
            point = opened.point(command.side)
            metadata |= {"model_name": Path(str(opened.config["model"])).name, "hook_layer": opened.layer_number}
            if point is not None and point[1] in HOOKS:
                metadata["hook_name"] = HOOKS[point[1]].format(layer=point[0])
    write_sae(command.out, np.asarray(r), values.mean(axis=0, dtype=np.float64), metadata=metadata)
    console.print(
        f"wrote {visible(command.out)}: {len(r)} directions as an autoencoder of {2 * len(r)} features, feature i "
        f"above the mean of direction i and feature i + {len(r)} below it; SAE.load_from_disk reads it",
        highlight=False,
        soft_wrap=True,
    )
    return 0
