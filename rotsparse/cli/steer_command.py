"""`rotsparse steer`: how a model goes on with a text when one of its directions is pushed."""

import re
from pathlib import Path

import numpy as np
from rich.console import Console

from rotsparse._core.printable import visible
from rotsparse._core.reading import reading
from rotsparse.cli.arguments import check_positive
from rotsparse.models.interventions import Steer
from rotsparse.models.language import generate
from rotsparse.models.load import Tokenizer, load_tokenizer
from rotsparse.runs.opened import LayerRun, load_run
from rotsparse_command import options

_DIRECTION = re.compile(r"(in|out)-(\d+)")


def run(command: "options.Steer", console: Console) -> int:
    """Print the continuation without and with the push."""
    named = _DIRECTION.fullmatch(command.direction)
    if named is None:
        raise ValueError(f"--direction should be a side and a number, such as out-17, got {command.direction!r}")
    side, number = named[1], int(named[2])
    with reading(command.run):
        opened = load_run(command.run)
        if opened.layer_number is None or opened.site is None:
            raise ValueError(f"{command.run} is no run of a model's layer: there is no text to go on with")
        point = opened.point(side)
        if point is None:
            raise ValueError("the outputs of a layer with its skip connection are the stream: push an input, in-...")
        tokenizer = tokenizer_of(opened, command.tokenizer)
        directions = opened.directions(side)
        if number >= len(directions):
            raise ValueError(f"there are {len(directions)} {side} directions, 0 to {len(directions) - 1}: got {number}")
        direction = directions[number]
        by = command.by * direction.variance**0.5
    prompt = np.asarray([[*tokenizer.prefix, *tokenizer.encode(command.prompt)]])
    if not prompt.size:
        raise ValueError("--prompt has no tokens: give some text")
    check_positive("length", command.length)
    change = {point: Steer(direction.vector[None], by)}
    for name, intervene in {"as it is": {}, f"{command.direction} by {command.by:+g} sd": change}.items():
        text = generate(opened.model, prompt, prompt.shape[1] + command.length, intervene=intervene)[0]
        said = tokenizer.decode([int(token) for token in text[len(tokenizer.prefix) :]])
        console.print(f"{name}:", style="bold", highlight=False, markup=False)
        console.print(visible(said, lines=True), highlight=False, markup=False, soft_wrap=True)
    return 0


def tokenizer_of(opened: LayerRun, path: Path | None) -> Tokenizer:
    """The tokenizer in a file, or the one that comes with the run's model. Raises `ValueError` if there is none."""
    if path is None:
        path = Path(str(opened.config.get("model")))
        if not (path.is_dir() or path.suffix == ".gguf"):
            raise ValueError(f"{path} comes without a tokenizer: name its file with --tokenizer")
    return load_tokenizer(path, opened.model)
