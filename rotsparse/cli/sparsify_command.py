"""`rotsparse sparsify`: bases, thresholds and budgets for the inputs of a model's linear maps."""

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from rotsparse import models
from rotsparse._core import checks
from rotsparse._core.files import make_folder, write_atomically
from rotsparse._core.printable import visible
from rotsparse.cli.arguments import again, check_positive, layer_numbers, plain
from rotsparse.models.model import Model
from rotsparse.report import sparsity
from rotsparse.runs import folders, inputs, layer_run, sparse_run
from rotsparse.runs.phases import Phases
from rotsparse.sparse.calibration import sequences, spread
from rotsparse_command import options


def run(command: "options.Sparsify", console: Console) -> int:
    """Find, measure, and write it down."""
    _check(command)
    model = models.load_model(command.model)
    settings = sparse_run.Settings(
        sites=command.sites,
        rotate=command.rotate,
        layers=tuple(layer_numbers(command.layers, model.config.n_layers)),
        keep=command.keep,
        shares=tuple(sorted({command.keep, *command.shares}, reverse=True)),
        methods=command.methods,
        absorb=command.absorb,
        train_shifts=command.train_shifts,
        steps=command.steps,
        seed=command.seed,
    )
    train, test = _texts(command, model)
    config = {"command": "sparsify", **plain(command), folders.INPUTS: {"model": model.fingerprint()}}
    config[folders.INPUTS] |= inputs.hashes(text=command.text, test_text=command.test_text)
    phases, out = Phases(console), command.out
    with folders.new_run(out, config=config, overwrite=command.overwrite, resume=command.resume) as folder:
        sparse_run.calibrate(folder, model, train, spread(train, command.fisher_tokens), settings, phases)
        test = spread(test, command.test_tokens)
        results = sparse_run.compare(folder, model, train, test, settings, phases)
        results |= sparse_run.written(folder, model, train, test, settings, results, phases)
        config |= {"versions": folders.versions(), "again": again("sparsify", command), "train_tokens": int(train.size)}
        make_folder(folder / "figures")
        drawn = sparsity.figures(results)
        for name, png in drawn.items():
            write_atomically(folder / "figures" / f"{name}.png", png)
        write_atomically(folder / "report.html", sparsity.page(results, config, drawn).encode())
        write_atomically(folder / layer_run.TABLE, sparsity.table(results).encode())
        folders.write_json(folder / folders.CONFIG, config)
        folders.write_json(folder / layer_run.METRICS, results | {"seconds": phases.seconds})
    _show(results, console)
    console.print(f"report: {visible(out / 'report.html')}", highlight=False, soft_wrap=True)
    return 0


def _check(command: "options.Sparsify") -> None:
    """Raises `ValueError` for options that make no sense."""
    checks.seed(command.seed)
    for name in ("length", "tokens", "fisher_tokens", "test_tokens", "steps"):
        check_positive(name, getattr(command, name))
    if command.train_shifts < 0:
        raise ValueError(f"--train-shifts is a number of steps: expected 0 or more, got {command.train_shifts}")
    for keep in (command.keep, *command.shares):
        if not 0.05 <= keep < 1:
            raise ValueError(f"--keep and --shares are shares of the weights to read: expected .05 to 1, got {keep:g}")
    for name in ("shares", "sites", "methods"):
        if not getattr(command, name) or len(set(getattr(command, name))) < len(getattr(command, name)):
            raise ValueError(f"--{name} needs at least one, each of them once")


def _texts(command: "options.Sparsify", model: Model) -> tuple[np.ndarray, np.ndarray]:
    """The sequences to find the bases on, and those to measure on."""
    train = sequences(model, _source(command, command.text, model), command.length)
    if command.test_text is None:
        border = len(train) - max(1, len(train) // 5)
        train, test = train[:border], train[border:]
    else:
        test = sequences(model, _source(command, command.test_text, model), command.length)
    return spread(train, command.tokens), test


def _source(command: "options.Sparsify", path: Path, model: Model) -> models.TextFile | models.TokenFile:
    if path.suffix == ".npy":
        return models.TokenFile(path)
    if command.tokenizer is None and not (command.model.is_dir() or command.model.suffix == ".gguf"):
        raise ValueError(f"{command.model} comes without a tokenizer: name its file with --tokenizer")
    return models.TextFile(path, models.load_tokenizer(command.tokenizer or command.model, model))


def _show(results, console: Console) -> None:
    head, *rows = sparsity.rows(results)
    table = Table(*head, title=sparsity.title(results))
    for row in rows:
        table.add_row(*row)
    console.print(table)
