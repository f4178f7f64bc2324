"""The main job: fit a layer, compare it with every baseline on held-out examples, fold it, and write a run folder."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jaxtyping import Float
from rich.console import Console

from rotsparse._core.files import write_atomically
from rotsparse._core.types import Data
from rotsparse.data.scales import named
from rotsparse.data.sources import Source, in_memory
from rotsparse.engine.solution import Result, Solution
from rotsparse.evaluation.agreement import Agreement, agreements
from rotsparse.evaluation.compare import Comparison, compare_with_baselines
from rotsparse.evaluation.control import Control
from rotsparse.evaluation.fit_nulls import quick_control
from rotsparse.evaluation.numbering import numbered
from rotsparse.evaluation.units import units_of
from rotsparse.evaluation.verdict import verdict
from rotsparse.explain.data import SHARE
from rotsparse.explain.directions import Explanation
from rotsparse.explain.graph import layer_graph
from rotsparse.explain.page import PAGE
from rotsparse.fit.find_rotations import find_rotations
from rotsparse.layers.base import Layer
from rotsparse.layers.fold import fold
from rotsparse.layers.rotations import Rotations
from rotsparse.objectives.floor import floor
from rotsparse.objectives.measures import Measure
from rotsparse.report.data import PictureData, picture_data
from rotsparse.runs import folders, loading
from rotsparse.runs.folders import METRICS as METRICS
from rotsparse.runs.folders import NUMBERED, SOLUTION
from rotsparse.runs.folders import ROTATIONS as ROTATIONS
from rotsparse.runs.folders import TABLE as TABLE
from rotsparse.runs.phases import Phases, Shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Draws figures of the bases that are compared: a figure and its caption by name.
Pictures = Callable[[dict[str, Rotations]], Mapping[str, tuple["Figure", str]]]

# The floor takes a singular value decomposition of every example; so many examples give three digits.
FLOOR_EXAMPLES = 256


def run(
    folder: Path,
    layer: Layer,
    train: Float[Data, "n d_in"] | Source,
    test: Float[Data, "m d_in"],
    *,
    fit: dict[str, Any],
    seed: int,
    config: dict[str, Any],
    console: Console,
    control: bool = True,
    pictures: Pictures | None = None,
    directions: bool = False,
) -> Solution:
    """Fit on `train`, report on `test`, and write `config.json`, `rotations.safetensors`, `metrics.json`, `table.md`,
    `report.html`, `figures/` and their data (`pictures.npz`) into `folder`. Directions are numbered by their influence
    on `test` (`evaluation.numbering`), in all of these.

    `fit` holds the arguments of `find_rotations`, `config` the options of the command. With `control` the layer and its
    null models are fitted once more, by a few hundred steps each (`quick_control`). `pictures` draws further figures
    for the report. `directions`: whether there will be a page of them. Raises `ValueError` for inputs that
    `find_rotations` refuses, and `KeyboardInterrupt` if the fit was interrupted.
    """
    begun = time.perf_counter()
    key = jax.random.key(seed)
    scales: dict[str, Any] = {
        "scale_inputs": fit.get("scale_inputs", True),
        "scale_outputs": fit.get("scale_outputs", False),
    }
    phases = Phases(console)
    solution = find_rotations(layer, train, key=key, **fit)
    phases.add("fit", begun)
    console.print(solution.summary(), highlight=False)
    solution.completed()
    shown = loading.compared(layer, test)
    units = units_of(layer, in_memory(train)[0], **scales)
    solution = numbered(layer, shown, solution, **units)
    # The floor is a bound for unscaled Jacobians between whole spaces.
    whole = not any(scales.values()) and fit.get("active_subspace") is None
    lowest = None if not whole else floor(layer, test[:FLOOR_EXAMPLES], fit["measure"])
    folded = fold(layer, solution.rotations, test)

    solution.save(folder / SOLUTION)
    made = None
    if control:
        with phases.phase("fitting null models") as at:
            made = _control(layer, train, test, fit, key=jax.random.fold_in(key, 4), shown=at)
    config = config | {"seed": seed, "versions": folders.versions(), "device": jax.devices()[0].device_kind}
    folders.write_json(folder / folders.CONFIG, config)
    comparison, data, bases = compared(folder, layer, train, test, solution, seed=seed, units=units, phases=phases)
    said, agreement = write_page(
        folder,
        layer,
        train,
        test,
        solution,
        comparison=comparison,
        data=data,
        config=config,
        units=units,
        floor=lowest,
        function_error=folded.error,
        control=made,
        directions=directions,
        pictures=None if pictures is None else pictures(bases),
        phases=phases,
    )
    about = {"seed": seed, "objective": solution.value}
    about |= {name: named(scale) for name, scale in scales.items()}
    about |= {"measure": _spelled(fit["measure"]), "numbered": NUMBERED}
    solution.rotations.save(folder / ROTATIONS, about | _origin(config) | {"agreement": _lowest(solution, agreement)})
    folders.write_json(
        folder / METRICS,
        {
            "finding": said[0],
            "remarks": said[1:],
            **comparison.to_json(),
            "control": None if made is None else made.to_json(),
            "function_error": folded.error,
            "function_scale": folded.scale,
            "orthogonality_error": solution.rotations.orthogonality_error(),
            "objective": {"start": solution.start_value, "train": solution.value, "floor": lowest},
            "result": solution.result.name,
            "certificate": "" if solution.certificate is None else str(solution.certificate),
            "stages": [stage._asdict() for stage in solution.stages],
            "agreement": _agreement(solution, agreement),
            "fit": solution.stats,
            "seconds": time.perf_counter() - begun,
            "phases": phases.seconds,
        },
    )
    console.print(f"\n{said[0]}\n", style="bold", highlight=False, markup=False)
    for remark in said[1:]:
        console.print(remark, highlight=False)
    console.print(
        f"Function unchanged to {folded.error:.1e} (outputs have root mean square {folded.scale:.2g}); "
        f"‖RRᵀ-I‖ = {solution.rotations.orthogonality_error():.1e}.",
        highlight=False,
    )
    return solution


def compared(
    folder: Path,
    layer: Layer,
    train,
    test: Float[Data, "m d_in"],
    solution: Solution,
    *,
    seed: int,
    units,
    phases: Phases,
) -> tuple[Comparison, PictureData, dict[str, Rotations]]:
    """Compare a solution with every baseline on held-out examples. Writes the table, and the data of the pictures, so
    that they can be drawn again. For a source, baselines are computed on the sample that a fit keeps in memory."""
    sample, _ = in_memory(train)
    test = loading.compared(layer, test)
    phases.console.print(f"comparing with the baselines on {len(test):,} held-out examples ...")
    key = jax.random.key(seed)
    keys = jax.random.fold_in(key, 2), jax.random.fold_in(key, 3)
    found = {"learned": solution.rotations}
    with phases.phase("comparing") as at:
        scales: dict[str, Any] = {name: units[name] for name in ("scale_inputs", "scale_outputs")}
        comparison, bases = compare_with_baselines(layer, sample, test, found, keys=keys, **scales, shown=at)
        at("data of the figures")
        data = picture_data(layer, test, bases, **units)
    phases.console.print(comparison.table())
    write_atomically(folder / TABLE, comparison.markdown().encode())
    data.save(folder / folders.PICTURES)
    return comparison, data, bases


def stored(folder: Path, metrics: Mapping[str, Any]) -> tuple[Comparison, PictureData] | None:
    """What `compared` found when the run was made; `None` if an earlier version did not keep it."""
    if not (folder / folders.PICTURES).exists():
        return None
    try:
        comparison = Comparison.from_json(metrics)
    except (KeyError, TypeError, AttributeError):
        return None
    data = PictureData.load(folder / folders.PICTURES)
    return (comparison, data) if set(data.curves) == set(comparison.metrics) else None


def write_page(
    folder: Path,
    layer: Layer,
    train: Float[Data, "n d_in"] | Source,
    test: Float[Data, "m d_in"],
    solution: Solution,
    *,
    comparison: Comparison,
    data: PictureData,
    config: dict[str, Any],
    units: dict[str, Any],
    floor: float | None,
    function_error: float,
    control: Control | None,
    directions: bool,
    pictures: Mapping[str, tuple["Figure", str]] | None,
    phases: Phases,
) -> tuple[list[str], dict[str, Agreement]]:
    """Write the report. Returns what was found (one sentence, then remarks), and how far the restarts agree.
    `directions`: whether there is, or will be, a page of them."""
    from rotsparse.report import write  # imported here: Matplotlib takes half a second

    sample, source = in_memory(train)
    test = loading.compared(layer, test)
    agreement = agreements(layer, test, solution, **units)
    said = verdict(comparison, layer, solution, control, agreement)
    if source is not None:
        said.append(
            f"The fit drew from {len(source):,} examples on disk; the baselines were fitted on {len(sample):,} of "
            "them, evenly spread."
        )
    with phases.phase("drawing the report") as at:
        at("the graph")
        graph = _graph(layer, test, solution.rotations, units, directions)
        write.write_report(
            folder,
            data=data,
            comparison=comparison,
            solution=solution,
            examples=len(test),
            scale_inputs=units["scale_inputs"],
            scale_outputs=units["scale_outputs"],
            config=config,
            finding=said[0],
            remarks=said[1:],
            control=control,
            graph=graph,
            directions=PAGE if directions else None,
            pictures=pictures,
            floor=floor,
            function_error=function_error,
            agreement=agreement,
            shown=at,
        )
    return said, agreement


def _graph(layer, x, rotations: Rotations, units, directions: bool) -> tuple[str, str]:
    """The strongest edges between the directions as an SVG element, and what it shows."""
    graph = layer_graph(Explanation(layer, x, rotations, units=units), share=SHARE, title="directions").strongest()
    modules = graph.modules()
    caption = (
        f"{graph.stages[0].cut}. Wider edges hold more; numbers are those of the directions. {modules}. Rewired and "
        "reweighted are random graphs of the same degrees and weights: every graph has some modularity."
    )
    return graph.svg(modules, links=graph.links if directions else None, inline=True), caption


def _spelled(measure: Measure) -> str:
    """A measure with all of its parameters, also those that are at their defaults."""
    fields = dataclasses.fields(measure)
    return f"{type(measure).__name__}({', '.join(f'{f.name}={getattr(measure, f.name)}' for f in fields)})"


def _origin(config: Mapping[str, Any]) -> dict[str, Any]:
    """Where rotations come from, for the metadata of their file: the model, layer and site, and the hashes of all
    inputs."""
    names = {"model": "model", "layer": "layer_number", "site": "site", "data": folders.INPUTS}
    return {name: config[key] for name, key in names.items() if config.get(key) is not None}


def _lowest(solution: Solution, agreement: Mapping[str, Agreement]) -> dict[str, list[float | None]]:
    """Of every direction the |cos| with its match in the restart where that is lowest; `None` if it was not fitted."""
    lowest: dict[str, list[float | None]] = {space: [None] * len(solution.bases[space]) for space in agreement}
    for space, of in agreement.items():
        for row, cosine in zip(of.order, of.cosines, strict=True):
            lowest[space][row] = round(float(cosine), 5)
    return lowest


def _control(layer, train, test, fit: dict[str, Any], *, key, shown: Shown) -> Control | None:
    """A quick control of a fit, with its arguments where they decide what is compared."""
    kept = ("measure", "scale_inputs", "scale_outputs", "tie", "hold", "active_subspace", "precision")
    arguments = {name: fit[name] for name in kept if name in fit}
    return quick_control(layer, in_memory(train)[0], test, key=key, shown=shown, **arguments)


def _agreement(solution: Solution, agreement: dict[str, Agreement]) -> dict[str, Any] | None:
    """For every space: how many directions were fitted, the share of them that every other restart found again, the
    |cos| of each direction with its match in each other restart, and their influence. `None` after a single restart."""
    reproduced = solution.reproduced()
    if not reproduced:
        return None
    cosines = solution.agreement()
    return {
        space: {"fitted": len(again), "reproduced": again.mean(), "cosines": cosines[space]}
        | agreement[space].to_json()
        for space, again in reproduced.items()
    }


def succeeded(solution: Solution) -> bool:
    """Whether a command should exit with code 0: no, if the objective became NaN or infinite."""
    return solution.result is not Result.NON_FINITE
