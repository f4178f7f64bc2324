"""Claim: at the width of real models a step of `find_basis` and of `find_rotations` takes at most twice the time of its
matrix products, and the phases of a fit take what `--dry-run` says.

The floor of a step is its floating-point operations at the rate of one large product on this machine: `6·n·d²` for
activations (n rows), `2·n·(d_out·h·d_in + d_out²·d_in + d_out·d_in²)` for Jacobians (n examples), and five products of
`2·d³` for each rotation, which keep it orthogonal. Everything is timed in this one process, in turn.
"""

import dataclasses
import resource
from pathlib import Path
from typing import Any

import numpy as np
from _publish import publish
from _results import Results, start
from _steps import timed
from objective import Shape, make_layer
from rich.console import Console
from rich.table import Table

import rotsparse as rs
from rotsparse.fit.default_method import default_method
from rotsparse.objectives.base import Objective
from rotsparse.runs.estimate import in_words, phases, product_rate
from rotsparse.solvers.anneal import Anneal


@dataclasses.dataclass
class Config:
    """Steps at the width of real models, against their floor."""

    quick: bool = False
    """Only the narrowest shape, and fewer repeats."""
    out: Path | None = None
    """A JSON file for the figures."""
    publish: bool = False
    """Replace the table in docs/scaling.md."""


SHAPES = {
    "SmolLM2-135M": Shape(576, 1536, True),
    "GPT-2": Shape(768, 3072, False),
    "Llama-1B": Shape(2048, 8192, True),
    "Llama-8B": Shape(4096, 14336, True),
}
PAGE = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
ACCELERATOR = 50e12  # flops a second in float32 of an H200, by `benchmarks/accelerator.py`


def main(config: Config) -> None:
    results = Results(config)
    rate = product_rate(2048)
    print(f"products run at {rate / 1e9:.0f} GFLOP/s")
    columns = "width", "fit", "ms a step", "÷ floor", "default fit", "at 50 TFLOP/s", "GB"
    rows: list[list[str]] = []
    figures: list[dict[str, Any]] = [{"product_rate": rate}]
    for name, shape in list(SHAPES.items())[: 1 if config.quick else None]:
        for row in (basis(shape, config.quick), layer(shape, config.quick)):
            figures.append({"model": name, **row})
            step = row["work"] / rate
            whole = row["whole"] / rate * row["seconds"] / step
            rows.append(
                [
                    f"{shape.d} ({name})",
                    row["fit"],
                    f"{row['seconds'] * 1e3:.3g}",
                    f"{row['seconds'] / step:.2f}",
                    in_words(whole),
                    in_words(row["whole"] / ACCELERATOR * 2),
                    f"{row['memory'] / 1e9:.1f}",
                ]
            )
            print(" | ".join(rows[-1]), flush=True)
            results.write(figures)
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    if config.publish:
        lines = [columns, ["---"] * len(columns), *rows]
        publish(PAGE, "width", "\n".join(f"| {' | '.join(line)} |" for line in lines))


def basis(shape: Shape, quick: bool) -> dict[str, Any]:
    """A step of the default of `find_basis`."""
    d, n = shape.d, 2 * shape.d
    objective = rs.ActivationSparsity(np.random.default_rng(0).standard_normal((2 * n, d), np.float32), rs.TopK(0.5))
    work = 6.0 * n * d**2 + 10.0 * d**3
    # Half of the steps begin at an angle of 0.2, half at 0.1: on average they turn by 0.075.
    seconds = seconds_of(objective, Anneal(steps=100, angle=0.15, batch_size=n), quick)
    return {"fit": f"{n} activations", "seconds": seconds, "work": work, "whole": 1000 * work, "memory": memory()}


def layer(shape: Shape, quick: bool) -> dict[str, Any]:
    """A step of the default of `find_rotations`, and what a whole fit takes."""
    rng, d, h = np.random.default_rng(0), shape.d, shape.hidden
    of = make_layer(rng, shape)
    (_, steps, batch), *_ = default_method(of).planned
    assert batch is not None
    objective = rs.JacobianSparsity(of, rng.standard_normal((batch, d), np.float32), rs.Log(0.1))
    work = 2.0 * batch * (d * h * d + 2 * d**3) + 20.0 * d**3
    seconds = seconds_of(objective, Anneal(steps=100, batch_size=batch), quick)
    fit = phases(of, 1000, 200, default_method(of), restarts=1, control=True)
    whole = sum(phase.flops for phase in fit)
    name = f"{batch} Jacobians, {steps:,} steps"
    return {"fit": name, "seconds": seconds, "work": work, "whole": whole, "memory": memory()}


def seconds_of(objective: Objective, method: Anneal, quick: bool) -> float:
    """Seconds of a step in the middle of a fit."""
    return timed(objective, method, range(50, 53 if quick else 57))["seconds"]


def memory() -> float:
    """The most that this process has used so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


if __name__ == "__main__":
    start(main, Config)
