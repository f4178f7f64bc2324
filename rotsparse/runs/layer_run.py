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
from rotsparse.data.moments import scale_covariance
from rotsparse.data.sources import Source, in_memory
from rotsparse.engine.solution import Result, Solution
from rotsparse.evaluation.agreement import Agreement, agreements
from rotsparse.evaluation.compare import Comparison, compare_with_baselines
from rotsparse.evaluation.control import Control
from rotsparse.evaluation.fit_nulls import quick_control
from rotsparse.evaluation.numbering import numbered
from rotsparse.evaluation.verdict import verdict
from rotsparse.fit.find_rotations import find_rotations
from rotsparse.layers.base import Layer
from rotsparse.layers.fold import fold
from rotsparse.layers.rotations import Rotations
from rotsparse.objectives.floor import floor
from rotsparse.objectives.measures import Measure
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
) -> Solution:
    """Fit on `train`, report on `test`, and write `config.json`, `rotations.safetensors`, `metrics.json`, `table.md`,
    `report.html` and `figures/` into `folder`. Directions are numbered by their influence on `test`
    (`evaluation.numbering`), in all of these.

    `fit` holds the arguments of `find_rotations`, `config` the options of the command. With `control` the layer and its
    null models are fitted once more, by a few hundred steps each (`quick_control`). `pictures` draws further figures
    for the report. Raises `ValueError` for inputs that `find_rotations` refuses, and `KeyboardInterrupt` if the fit was
    interrupted.
    """
    begun = time.perf_counter()
    key = jax.random.key(seed)
    scale_inputs = fit.get("scale_inputs", True)
    phases = Phases(console)
    solution = find_rotations(layer, train, key=key, **fit)
    phases.add("fit", begun)
    console.print(solution.summary(), highlight=False)
    solution.completed()
    shown = loading.compared(layer, test)
    units = {"scale_inputs": scale_inputs, "covariance": scale_covariance(in_memory(train)[0])}
    solution = numbered(layer, shown, solution, **units)
    # The floor is a bound for unscaled Jacobians between whole spaces.
    whole = not scale_inputs and fit.get("active_subspace") is None
    lowest = None if not whole else floor(layer, test[:FLOOR_EXAMPLES], fit["measure"])
    folded = fold(layer, solution.rotations, test)

    solution.save(folder / SOLUTION)
    made = None
    if control:
        with phases.phase("fitting null models") as at:
            made = _control(layer, train, test, fit, key=jax.random.fold_in(key, 4), shown=at)
    config = config | {"seed": seed, "versions": folders.versions(), "device": jax.devices()[0].device_kind}
    folders.write_json(folder / folders.CONFIG, config)
    said, comparison, agreement = write_comparison(
        folder,
        layer,
        train,
        test,
        solution,
        config=config,
        scale_inputs=scale_inputs,
        floor=lowest,
        function_error=folded.error,
        control=made,
        pictures=pictures,
        phases=phases,
    )
    about = {"seed": seed, "objective": solution.value, "scale_inputs": scale_inputs}
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


def write_comparison(
    folder: Path,
    layer: Layer,
    train: Float[Data, "n d_in"] | Source,
    test: Float[Data, "m d_in"],
    solution: Solution,
    *,
    config: dict[str, Any],
    scale_inputs: bool,
    floor: float | None,
    function_error: float,
    control: Control | None,
    pictures: Pictures | None = None,
    phases: Phases,
) -> tuple[list[str], Comparison, dict[str, Agreement]]:
    """Compare a solution with every baseline on held-out examples, and its restarts with each other, and write the
    report. Returns what was found (one sentence, then remarks), the comparison and the agreement. For a source,
    baselines and the standard deviations that scale inputs are computed on the sample that a fit keeps in memory."""
    from rotsparse.report import write  # imported here: Matplotlib takes half a second

    sample, source = in_memory(train)
    test = loading.compared(layer, test)
    console = phases.console
    console.print(f"comparing with the baselines on {len(test):,} held-out examples ...")
    key = jax.random.key(config["seed"])
    keys = jax.random.fold_in(key, 2), jax.random.fold_in(key, 3)
    learned = {"learned": solution.rotations}
    with phases.phase("comparing") as at:
        comparison, bases = compare_with_baselines(
            layer, sample, test, learned, keys=keys, scale_inputs=scale_inputs, shown=at
        )
    console.print(comparison.table())
    write_atomically(folder / TABLE, comparison.markdown().encode())
    scales: dict[str, Any] = {"scale_inputs": scale_inputs, "covariance": scale_covariance(sample)}
    agreement = agreements(layer, test, solution, **scales)
    said = verdict(comparison, layer, solution, control, agreement)
    if source is not None:
        said.append(
            f"The fit drew from {len(source):,} examples on disk; the baselines were fitted on {len(sample):,} of "
            "them, evenly spread."
        )
    with phases.phase("drawing the report"):
        write.write_report(
            folder,
            layer=layer,
            x_test=test,
            bases=bases,
            comparison=comparison,
            solution=solution,
            config=config,
            finding=said[0],
            remarks=said[1:],
            control=control,
            pictures=None if pictures is None else pictures(bases),
            floor=floor,
            function_error=function_error,
            agreement=agreement,
            **scales,
        )
    return said, comparison, agreement


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
    kept = ("measure", "scale_inputs", "tie", "hold", "active_subspace", "precision")
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
