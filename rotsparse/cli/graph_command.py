"""`rotsparse graph`: write the graph of a run, and print its modules."""

from typing import Any

import numpy as np
from rich.console import Console

from rotsparse._core import checks
from rotsparse._core.printable import visible
from rotsparse._core.reading import reading
from rotsparse.cli.arguments import layer_numbers
from rotsparse.cli.steer_command import tokenizer_of
from rotsparse.explain.chain_graph import Needed, Share
from rotsparse.explain.graph import DRAWN
from rotsparse.models.words import vocabulary
from rotsparse.runs import folders
from rotsparse.runs.graph import graph
from rotsparse.runs.opened import LayerRun, load_run
from rotsparse_command import options

# Directions of a module that are printed.
SHOWN = 16


def run(command: "options.Graph", console: Console) -> int:
    """Write the files of the graph."""
    checks.seed(command.seed)
    with console.status(f"reading {visible(command.run)} ...") as status, reading(command.run):
        runs = _opened(command)
        arguments: dict[str, Any] = {"example": command.example}
        arguments["cut"] = (
            Share(command.share) if command.tolerance is None else Needed(command.tolerance, share=command.share)
        )
        if command.prompt is not None:
            tokenizer = tokenizer_of(runs[0], command.tokenizer)
            arguments["prompt"] = np.array([*tokenizer.prefix, *tokenizer.encode(command.prompt)], int)
            arguments["words"] = vocabulary(tokenizer, runs[0].model)
        status.update("computing Jacobians ...")
        made = graph(runs, **arguments)
        status.update("looking for modules ...")
        found = made.modules(seed=command.seed, draws=command.draws)
        written = made.write(command.run if command.out is None else command.out, found)
    console.print(made.summary, highlight=False, soft_wrap=True)
    console.print(str(found), highlight=False, soft_wrap=True)
    for number, group in enumerate(found.groups[:10]):
        more = f" and {len(group) - SHOWN} more" if len(group) > SHOWN else ""
        console.print(f"  module {number}: {' '.join(group[:SHOWN])}{more}", highlight=False, soft_wrap=True)
    for path in written:
        console.print(f"wrote {visible(path)}", highlight=False)
    if made.strongest(DRAWN).edges != made.edges:
        console.print(f"(the picture has at most {DRAWN} edges between two places)", highlight=False)
    return 0


def _opened(command: "options.Graph") -> list[LayerRun]:
    """The run, or those of all layers that are asked for."""
    config = folders.read_object(command.run / folders.CONFIG)
    if config.get("command") != "fit-model" or "layer_number" in config:
        return [load_run(command.run)]
    parts = folders.layer_folders(command.run)
    if not parts:
        raise ValueError(f"{command.run} holds no layers")
    if command.layers != "all":
        numbers = layer_numbers(command.layers, int(parts[-1].name.removeprefix("layer-")) + 1)
        parts = [folder for folder in parts if int(folder.name.removeprefix("layer-")) in numbers]
    first = load_run(parts[0])
    return [first, *(LayerRun(f, folders.read_object(f / folders.CONFIG), model=first.model) for f in parts[1:])]
