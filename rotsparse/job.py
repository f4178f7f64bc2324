"""The main job: fit a layer, compare with every baseline on held-out examples, fold, and write it all into a run folder."""

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float
from rich.console import Console

from rotsparse import baselines, report, runs
from rotsparse.compare import Comparison, compare
from rotsparse.fit import find_rotations
from rotsparse.floor import floor
from rotsparse.fold import fold
from rotsparse.layers import MLP, Layer
from rotsparse.rotations import Rotations
from rotsparse.solution import Result, Solution
from rotsparse.statistics import covariance

METRICS = "metrics.json"
SOLUTION = "solution.npz"

# The floor needs a singular value decomposition of every example: this many are enough for three digits.
FLOOR_EXAMPLES = 256


def run(
    folder: Path,
    layer: Layer,
    train: Float[Array, "n d_in"],
    test: Float[Array, "m d_in"],
    *,
    fit: dict[str, Any],
    seed: int,
    config: dict[str, Any],
    console: Console,
) -> Solution:
    """Fit on `train`, report on `test`, write `config.json`, `rotations.safetensors`, `metrics.json`, `report.html` and
    `figures/` into `folder`.

    `fit` holds the arguments of `find_rotations`, `config` what the user asked for. Raises `ValueError` where the inputs
    are unfit.
    """
    begun = time.perf_counter()
    key = jax.random.key(seed)
    scale_inputs = fit.get("scale_inputs", True)
    solution = find_rotations(layer, train, key=key, **fit)
    console.print(solution.summary(), highlight=False)
    lowest = None if scale_inputs else floor(layer, test[:FLOOR_EXAMPLES], fit["measure"])
    folded = fold(layer, solution.rotations, test)

    solution.save(folder / SOLUTION)
    solution.rotations.save(folder / "rotations.safetensors", {"seed": seed, "objective": solution.value})
    config = config | {"seed": seed, "versions": runs.versions(), "device": jax.devices()[0].device_kind}
    runs.write_json(folder / runs.CONFIG, config)
    finding, comparison = write_comparison(
        folder,
        layer,
        train,
        test,
        solution,
        config=config,
        scale_inputs=scale_inputs,
        floor=lowest,
        function_error=folded.error,
        console=console,
    )
    runs.write_json(
        folder / METRICS,
        {
            "finding": finding,
            "metrics": comparison.to_json(),
            "function_error": folded.error,
            "function_scale": folded.scale,
            "orthogonality_error": solution.rotations.orthogonality_error(),
            "objective": {"start": solution.start_value, "train": solution.value, "floor": lowest},
            "result": solution.result.name,
            "agreement": _agreement(solution),
            "fit": solution.stats,
            "seconds": time.perf_counter() - begun,
        },
    )
    console.print(f"\n[bold]{finding}[/]\n", highlight=False)
    console.print(
        f"Function unchanged to {folded.error:.1e} (outputs have root mean square {folded.scale:.2g}); "
        f"‖RRᵀ-I‖ = {solution.stats['orthogonality_error']:.1e}.",
        highlight=False,
    )
    return solution


def write_comparison(
    folder: Path,
    layer: Layer,
    train: Float[Array, "n d_in"],
    test: Float[Array, "m d_in"],
    solution: Solution,
    *,
    config: dict[str, Any],
    scale_inputs: bool,
    floor: float | None,
    function_error: float,
    console: Console,
) -> tuple[str, Comparison]:
    """Compare a solution with every baseline on held-out examples, write the report, and say what was found."""
    console.print("comparing with the baselines on held-out examples ...")
    key = jax.random.key(config["seed"])
    bases = {"learned": solution.rotations} | baselines.all_baselines(layer, train, key=jax.random.fold_in(key, 2))
    options = {"scale_inputs": scale_inputs, "covariance": covariance(train)[1]}
    comparison = compare(layer, test, bases, key=jax.random.fold_in(key, 3), **options)
    console.print(comparison.table())
    finding = describe(comparison, layer, solution.rotations)
    report.write_report(
        folder,
        layer=layer,
        x_test=test,
        bases=bases,
        comparison=comparison,
        solution=solution,
        config=config,
        finding=finding,
        floor=floor,
        function_error=function_error,
        **options,
    )
    return finding, comparison


def describe(comparison: Comparison, layer: Layer, learned: Rotations) -> str:
    """What was found: sizes first, then where learned is ahead and where not, and what is no discovery."""
    edges = {basis: of["edges_99"].value for basis, of in comparison.metrics.items()}
    zeros = {basis: of["fraction_below_0.1_rms"].value for basis, of in comparison.metrics.items()}
    rival = min((basis for basis in edges if basis != "learned"), key=lambda basis: edges[basis])
    finding = (
        f"In the learned basis {edges['learned']:.0f} of {layer.d_in * layer.d_out} entries hold 99% of the mean squared "
        f"Jacobian of held-out examples (neurons {edges['neurons']:.0f}, best baseline {rival} {edges[rival]:.0f}), and "
        f"{zeros['learned']:.0%} of all entries are below a tenth of their rms (neurons {zeros['neurons']:.0%}). "
        + comparison.verdict()
    )
    if isinstance(layer, MLP) and layer.w_out is None:
        # A gate pins the outputs of a single layer to its neurons: known truth, so say that it is no news.
        found = int(np.sum(np.max(np.abs(np.asarray(learned.r_out)), axis=1) > 0.99))
        finding += (
            f" {found} of the {layer.d_out} output directions are single neurons (|cos| > 0.99): the nonlinearity pins that "
            "side, so finding it is a check of the method; what the layer was found to read are its input directions."
        )
    return finding


def _agreement(solution: Solution) -> dict[str, Any] | None:
    """Share of the directions of each space that every other restart found again at |cos| > 0.99."""
    if len(solution.candidates) == 1:
        return None
    return {space: {"reproduced": float(np.mean(c.min(0) > 0.99)), "cosines": c} for space, c in solution.agreement().items()}


def succeeded(solution: Solution) -> bool:
    """Whether the command line should exit with success: a run that was cut short or went wrong should not."""
    return solution.result not in (Result.NON_FINITE, Result.INTERRUPTED)
