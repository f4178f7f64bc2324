"""`rotsparse explain`: write the pages of a run's directions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from rotsparse._core.printable import visible
from rotsparse._core.reading import reading
from rotsparse.cli import demo_directions
from rotsparse.data.scales import named
from rotsparse.explain.data import page_data
from rotsparse.explain.page import PAGE, Layer, write_index, write_page
from rotsparse.models.load import load_tokenizer
from rotsparse.models.model import Model
from rotsparse.report.subject import subject, title
from rotsparse.runs import folders
from rotsparse.runs.opened import LayerRun
from rotsparse_command import options


def run(command: "options.Explain", console: Console) -> int:
    """Write the page of every layer, and for a fit-model run the index of them."""
    config = folders.read_object(command.run / folders.CONFIG)
    whole_model = config.get("command") == "fit-model" and "layer_number" not in config
    parts = folders.layer_folders(command.run) if whole_model else [command.run]
    if not parts or config.get("command") not in ("demo", "fit", "fit-model"):
        raise ValueError(f"{command.run} is no run of demo, fit or fit-model: there are no directions to explain")
    model, layers = None, []
    for folder in parts:
        opened = LayerRun(folder, folders.read_object(folder / folders.CONFIG), model=model)
        layers.append(_page(opened, console, command.tokenizer))
        model = vars(opened).get("model")  # read once for all layers
        console.print(f"directions: {visible(folder / PAGE)}", highlight=False)
    if whole_model:
        write_index(command.run, f"{subject(config)}: directions", layers)
        console.print(f"index: {visible(command.run / PAGE)}", highlight=False)
    return 0


def layer(folder: Path, console: Console, *, model: Model) -> Layer:
    """Write the page of a layer of a fit-model run. Returns its line of the index."""
    return _page(LayerRun(folder, folders.read_object(folder / folders.CONFIG), model=model), console, None)


def _page(opened: LayerRun, console: Console, tokenizer: Path | None) -> Layer:
    """Write the page of a run, and say what was left out. Returns a line of the index."""
    with console.status(f"explaining {visible(opened.folder)} ..."), reading(opened.folder):
        missing = explain(opened, tokenizer=tokenizer)
    for reason in missing:
        console.print(f"  left out: {visible(reason)}", highlight=False, soft_wrap=True)
    again = [f"{side} {of['reproduced']:.0%}" for side, of in (opened.metrics.get("agreement") or {}).items()]
    said = f"directions found again: {', '.join(again)}" if again else "one start"
    number = -1 if opened.layer_number is None else opened.layer_number
    return Layer(number, f"{opened.folder.name}/{PAGE}", opened.verdict[0], said)


def explain(opened: LayerRun, *, tokenizer: Path | None = None) -> list[str]:
    """Write the page of one layer. Returns what had to be left out, and why."""
    missing: list[str] = []
    shown: dict[str, Any] = {}
    if opened.config["command"] == "demo":
        of, shown["drawings"] = demo_directions.explained(opened)
    elif tokenizer is not None:
        of = opened.explained(tokenizer=load_tokenizer(tokenizer, opened.model), missing=missing)
    else:
        of = opened.explained(missing=missing)
    links = {"report of the fit": "report.html"} if (opened.folder / "report.html").exists() else {}
    if opened.layer_number is not None and opened.folder.name == f"layer-{opened.layer_number}":
        links["all layers"] = f"../{PAGE}"
    data = page_data(
        of,
        title=title(opened.config),
        facts=facts(opened),
        verdict=opened.verdict,
        missing=missing,
        links=links,
        **shown,
    )
    write_page(opened.folder, data)
    return missing


def facts(opened: LayerRun) -> dict[str, str]:
    """What is told at the foot of a page: where the run comes from."""
    config = opened.config
    names = {
        "model": "model",
        "layer_number": "layer",
        "site": "begins at",
        "store": "activations",
        "measure": "measure",
    }
    told = {label: str(config[name]) for name, label in names.items() if config.get(name) is not None}
    told["widths"] = f"{opened.layer.d_in} inputs, {opened.layer.d_out} outputs"
    told["unit of the Jacobian"] = _unit(opened.units)
    told["fit"] = opened.solution.result.value
    known = config.get(folders.INPUTS)
    if isinstance(known, Mapping):
        told |= {f"hash of {name}": str(value)[:16] for name, value in known.items()}
    return told


def _unit(units: Mapping[str, Any]) -> str:
    scales = {side: units[f"scale_{side}"] for side in ("inputs", "outputs")}
    sides = [side if of is True else f"{side} ({named(of)})" for side, of in scales.items() if of]
    return f"standard deviations of {' and '.join(sides)}" if sides else "raw"
