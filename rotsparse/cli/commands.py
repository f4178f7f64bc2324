"""The subcommands of the command line. Bad input raises `ValueError`, which `cli.main` prints."""

import contextlib
import dataclasses
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from rotsparse._core import checks, files
from rotsparse._core.printable import visible
from rotsparse._core.reading import reading
from rotsparse.cli import (
    demo,
    explain_command,
    export_command,
    graph_command,
    model_commands,
    steer_command,
)
from rotsparse.cli.arguments import again, fit_arguments, plain, recorded, scales, spelled
from rotsparse.cli.output import Console
from rotsparse.data.moments import evenly_spaced
from rotsparse.data.sources import in_memory
from rotsparse.evaluation import baselines
from rotsparse.evaluation.benchmark import benchmark
from rotsparse.evaluation.compare import compare_with_baselines
from rotsparse.evaluation.control import Control
from rotsparse.explain.page import PAGE
from rotsparse.layers.files import open_activations, save_layer
from rotsparse.layers.fold import fold as fold_layer
from rotsparse.layers.rotations import Rotations
from rotsparse.runs import estimate, folders, inputs, layer_run, listing, loading
from rotsparse.runs.opened import LayerRun
from rotsparse.runs.phases import Phases
from rotsparse_command import options as opt

console = Console()

# Folds are checked on at most this many examples.
CHECKED_EXAMPLES = 8192


def run(command: Any) -> int:
    """Run a command and return its exit code."""
    match command:
        case opt.Demo():
            return demo.run(command, console)
        case opt.Fit():
            return fit(command)
        case opt.Compare():
            return comparison(command)
        case opt.Benchmark():
            return benchmarked(command)
        case opt.Fold():
            return fold(command)
        case opt.Report():
            return redraw(command)
        case opt.Explain():
            return explain_command.run(command, console)
        case opt.Graph():
            return graph_command.run(command, console)
        case opt.Export():
            return export_command.run(command, console)
        case opt.Steer():
            return steer_command.run(command, console)
        case opt.Runs():
            console.print(listing.table(command.folder))
            return 0
        case opt.Inspect():
            return model_commands.inspect(command, console)
        case opt.Capture():
            return model_commands.capture(command, console)
        case opt.FitModel():
            return model_commands.fit(command, console)
        case opt.FoldModel():
            return model_commands.fold(command, console)
        case opt.Sparsify():
            from rotsparse.cli import sparsify_command  # which imports Matplotlib and SciPy

            return sparsify_command.run(command, console)
    raise AssertionError(command)


def fit(command: "opt.Fit") -> int:
    """`rotsparse fit`."""
    layer, train, test = loading.inputs(command.layer)
    options = fit_arguments(command.fit, scales(command.layer))
    options |= {"start": None if command.start is None else _rotations(command.start)}
    if command.dry_run:
        found, used = estimate.estimated(layer, train, test, options, control=command.control == "quick")
        console.print(estimate.table(found, estimate.product_rate(), used))
        return 0
    config = {"command": "fit", **plain(command), folders.INPUTS: _hashes(command.layer, start=command.start)}
    run, known = command.run, {"again": again("fit", command)}
    with folders.new_run(run.out, config=config, overwrite=run.overwrite, resume=run.resume) as folder:
        options = recorded(options, run, folder)
        solution = layer_run.run(
            folder, layer, train, test, fit=options, seed=command.layer.seed, config=config | known,
            console=console,
            control=command.control == "quick",
        )  # fmt: skip
    console.print(f"report: {visible(run.out / 'report.html')}")
    known = {field.name: getattr(command.layer, field.name) for field in dataclasses.fields(opt.LayerOptions)}
    rest = f"--rotations {shlex.quote(str(run.out))} --out {shlex.quote(str(run.out / 'folded.safetensors'))}"
    console.print(
        f"to write the layer in these coordinates: rotsparse fold {spelled(opt.LayerOptions(**known))} {rest}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return 0 if layer_run.succeeded(solution) else 1


def comparison(command: "opt.Compare") -> int:
    """`rotsparse compare`."""
    layer, train, test = loading.inputs(command.layer)
    if command.out is not None:
        files.check_new_file(command.out, command.overwrite)
    train, _ = in_memory(train)
    key = jax.random.key(command.layer.seed)
    key_baselines = jax.random.fold_in(key, 2)
    for path in command.rotations:
        _check_layer(path, command.layer.layer)
    given = _named(command.rotations)
    for name in given.keys() & baselines.methods(layer, key=key_baselines).keys():
        raise ValueError(
            f"{given[name]} would be called {name!r} after its folder, as a baseline is: rename the folder"
        )
    bases = {name: _rotations(path) for name, path in given.items()}
    table, _ = compare_with_baselines(
        layer,
        train,
        test,
        bases,
        keys=(key_baselines, jax.random.fold_in(key, 3)),
        **scales(command.layer),
    )
    console.print(table.table())
    if command.out is not None:
        config = plain(command) | {folders.INPUTS: _hashes(command.layer)}
        content = {"config": config, "versions": folders.versions(), **table.to_json()}
        folders.write_json(command.out, {"format": "rotsparse comparison 1", **content})
    return 0


def benchmarked(command: "opt.Benchmark") -> int:
    """`rotsparse benchmark`."""
    layer, train, test = loading.inputs(command.layer)
    options = fit_arguments(command.fit, scales(command.layer))
    with contextlib.ExitStack() as stack:
        folder = command.out and stack.enter_context(folders.new_run(command.out, overwrite=command.overwrite))
        found = benchmark(layer, train, test, key=jax.random.key(command.layer.seed), **options)
        console.print(found.table())
        console.print(found.conclusion, highlight=False)
        if folder:
            config = {"command": "benchmark", **plain(command), folders.INPUTS: _hashes(command.layer)}
            folders.write_json(folder / folders.CONFIG, config)
            folders.write_json(folder / layer_run.METRICS, {"versions": folders.versions(), **found.to_json()})
            files.write_atomically(folder / layer_run.TABLE, f"{found.markdown()}\n{found.conclusion}\n".encode())
            found.solution.rotations.save(folder / layer_run.ROTATIONS, {"seed": command.layer.seed})
    return 0 if layer_run.succeeded(found.solution) else 1


def fold(command: "opt.Fold") -> int:
    """`rotsparse fold`."""
    if command.out.suffix != ".safetensors":
        raise ValueError(
            f"--out {command.out}: a layer is written as safetensors, so give a name that ends in .safetensors"
        )
    _check_layer(command.rotations, command.layer.layer)
    layer, rotations = loading.layer(command.layer), _rotations(command.rotations)
    x = loading.sample(command.layer.activations, open_activations(command.layer.activations, layer.d_in))
    files.check_new_file(command.out, command.overwrite)
    folded = fold_layer(layer, rotations, evenly_spaced(x, CHECKED_EXAMPLES))
    save_layer(command.out, folded.layer)
    console.print(
        f"wrote {visible(command.out)}: the same function in rotated coordinates, to {folded.error:.1e} "
        f"(outputs have root mean square {folded.scale:.2g})",
        highlight=False,
    )
    return 0


def redraw(command: "opt.Report") -> int:
    """`rotsparse report`: compute everything but the fit again, from the files that the run's config names."""
    config = folders.read_object(command.run / folders.CONFIG)
    match config.get("command"):
        case "demo" | "fit":
            _redraw(command.run, config)
        case "fit-model" if "layer_number" in config:
            _redraw(command.run, config)
        case "fit-model":
            for folder in folders.layer_folders(command.run):
                console.rule(folder.name)
                _redraw(folder, folders.read_object(folder / folders.CONFIG))
        case "benchmark":
            raise ValueError(f"a benchmark has no page to draw: its table is {command.run / layer_run.TABLE}")
        case _:
            raise ValueError(
                f"{command.run / folders.CONFIG} was not written by a run of rotsparse: there is nothing to draw"
            )
    return 0


def _redraw(run: Path, config: dict[str, Any]) -> None:
    """Draw the figures and the page of one fit, from what it stored; what an earlier version did not store is computed
    again."""
    phases = Phases(console)
    with reading(run):
        opened, arguments = _drawn(run, config)
        known = layer_run.stored(run, opened.metrics)
    parts = arguments["layer"], arguments["train"], arguments["test"], arguments["solution"]
    if known is None:
        console.print(f"{visible(run)} is of an earlier version, which kept no data of its figures", soft_wrap=True)
        comparison, data, bases = layer_run.compared(
            run, *parts, seed=config["seed"], units=opened.units, phases=phases
        )
    else:
        comparison, data = known
        bases = {"neurons": Rotations.identity(opened.layer.d_in, opened.layer.d_out), "learned": opened.rotations}
    pictures = demo.pictures(run, config) if config["command"] == "demo" else None
    if pictures is not None and known is not None:
        bases["pca"] = baselines.pca(opened.layer, in_memory(arguments["train"])[0])
    layer_run.write_page(
        run,
        **arguments,
        comparison=comparison,
        data=data,
        config=config,
        units=opened.units,
        directions=(run / PAGE).exists(),
        pictures=None if pictures is None else pictures(bases),
        phases=phases,
    )
    console.print(f"report: {visible(run / 'report.html')}")


def _drawn(folder: Path, config: dict[str, Any]) -> tuple[LayerRun, dict[str, Any]]:
    """A run, and the arguments of `write_page` that it holds. Raises `ValueError`, and other exceptions for files of a
    run that rotsparse did not write."""
    run = LayerRun(folder, config)
    if not isinstance(config.get("versions", {}), dict):
        raise ValueError(f"{folder / folders.CONFIG} does not say which versions the run had")
    function_error, floor = run.metrics["function_error"], run.metrics["objective"]["floor"]
    layer, train, test = run.inputs
    checks.seed(config["seed"])
    return run, {
        "layer": layer,
        "train": train,
        "test": test,
        "solution": run.solution,
        "floor": None if floor is None else float(floor),
        "function_error": float(function_error),
        "control": None if run.metrics.get("control") is None else Control.from_json(run.metrics["control"]),
    }


def _rotations(path: Path) -> Rotations:
    """Read rotations from a file or a run folder. Raises `ValueError` if there are none."""
    if path.is_dir() and not (path / layer_run.ROTATIONS).exists():
        layers = folders.layer_folders(path)
        advice = f"choose one of its layers, such as {layers[0]}" if layers else "is it the folder of a complete run?"
        raise ValueError(f"{path} holds no {layer_run.ROTATIONS}: {advice}")
    return Rotations.load(path / layer_run.ROTATIONS if path.is_dir() else path)[0]


def _check_layer(rotations: Path, layer: Path) -> None:
    """Raise `ValueError` if `rotations` is a run folder that was fitted to another layer. A rotations file is accepted
    as it is."""
    if rotations.is_dir():
        inputs.check_layer(rotations, layer)


def _hashes(options: "opt.EvaluationOptions", **others: Path | None) -> dict[str, str]:
    """The hashes of a layer file, of its activations, and of further inputs."""
    rotations = {
        name: path / layer_run.ROTATIONS if path is not None and path.is_dir() else path
        for name, path in others.items()
    }
    return inputs.hashes(
        layer=options.layer,
        activations=options.activations,
        test_activations=options.test_activations,
        **rotations,
    )


def _named(paths: Sequence[Path]) -> dict[str, Path]:
    """Name each rotations file after its folder, with as many parent folders as it takes to tell them apart; if one
    folder holds several of the files, after folder and file. Raises `ValueError` if a file is given twice."""
    files = [Path(os.path.abspath(path / layer_run.ROTATIONS if path.is_dir() else path)) for path in paths]
    places = [file.parent.parts for file in files]
    if len(set(places)) < len(places):
        places = [file.with_suffix("").parts for file in files]
    if len(set(places)) < len(places):
        raise ValueError(f"--rotations names the same rotations twice: {', '.join(map(str, paths))}")
    depth = 1
    while len({place[-depth:] for place in places}) < len(places):
        depth += 1
    return {"/".join(place[-depth:]): path for place, path in zip(places, paths, strict=True)}
