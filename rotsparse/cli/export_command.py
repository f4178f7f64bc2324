"""`rotsparse export`: write what a run found in the format of another library."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from rotsparse._core.printable import visible
from rotsparse._core.reading import reading
from rotsparse.data.sources import in_memory
from rotsparse.explain.directions import IN
from rotsparse.explain.sae import HOOKS, write_sae
from rotsparse.explain.vectors import write_vectors
from rotsparse.layers.jacobians import apply
from rotsparse.models.load import load_model
from rotsparse.runs import folders
from rotsparse.runs.opened import load_run
from rotsparse.sparse.export import export_sparse
from rotsparse.sparse.file import FILE, read_sparse_inputs
from rotsparse_command import options


def run(command: "options.Export", console: Console) -> int:
    """Write one side of a layer's run as an autoencoder of SAELens, or a sparsify run as a Hugging Face folder."""
    config = folders.read_object(command.run / folders.CONFIG)
    formats = ("huggingface",) if config.get("command") == "sparsify" else ("sae", "vectors")
    if command.to not in (None, *formats):
        raise ValueError(
            f"{command.run} is written as {' or '.join(formats)}: a sparsify run holds sparse inputs, others directions"
        )
    return _model(command, config, console) if "huggingface" in formats else _directions(command, console)


def _model(command: "options.Export", config: Mapping[str, Any], console: Console) -> int:
    path, known = config.get("model"), config.get(folders.INPUTS)
    if not isinstance(path, str) or not isinstance(known, Mapping):
        raise ValueError(f"{command.run / folders.CONFIG} names no model")
    model = load_model(path)
    if model.fingerprint() != known.get("model"):
        raise ValueError(f"{command.run} was made for another model than {path} is now")
    inputs = read_sparse_inputs(command.run / FILE, model)
    tokenizer = None if model.format == "llama2c" else path
    done = export_sparse(model, inputs, command.out, tokenizer_from=tokenizer)
    console.print(
        f"wrote {visible(command.out)}: the model, and {FILE} for {len(inputs)} sites; rotsparse.torch.load_sparse "
        f"loads both\nread back: outputs of up to {done.scale:.3g} differ by up to {done.dense_error:.1e} (dense), and "
        f"with coordinates dropped, in float64, by {done.sparse_error:.1e}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _directions(command: "options.Export", console: Console) -> int:
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
    if command.to == "vectors":
        model, hook = (str(metadata.get(name, "")) for name in ("model_name", "hook_name"))
        layer = opened.layer_number or 0
        write_vectors(command.out, np.asarray(r), side=command.side, layer=layer, model_name=model, hook_name=hook)
        console.print(f"wrote {visible(command.out)}: {len(r)} vectors; VectorSet.load of SAEDashboard reads it")
        return 0
    write_sae(command.out, np.asarray(r), values.mean(axis=0, dtype=np.float64), metadata=metadata)
    console.print(
        f"wrote {visible(command.out)}: {len(r)} directions as an autoencoder of {2 * len(r)} features, feature i "
        f"above the mean of direction i and feature i + {len(r)} below it; SAE.load_from_disk reads it",
        highlight=False,
        soft_wrap=True,
    )
    return 0
