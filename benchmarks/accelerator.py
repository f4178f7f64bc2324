"""Claim: on an accelerator a step runs at most of the rate of its matrix products, at the widths of GPT-2 and Llama-8B,
and rotations stay orthogonal to float32 at every precision.

Each row is one program that a fit runs, timed on the device: an annealing step of `find_rotations` (16 examples) at
every precision, and one of `find_basis`. Work is counted as the products of the data,
`2·n·(d_out·h·d_in + d_out²·d_in + d_out·d_in²)` flops for Jacobians and `6·n·d²` for activations, and those of staying
orthogonal, five of `2·d³` for each rotation; the rate is compared with that of a large square product at the same
precision. `make gpu` runs it; the printed table can be sent in as it is.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _results import Results, start
from _steps import timed
from objective import Shape, make_layer

import rotsparse as rs
from rotsparse._core.precision import PRECISIONS, lacking
from rotsparse.objectives.base import Objective
from rotsparse.runs.estimate import product_rate

EXAMPLES, STEPS = 16, 20


@dataclasses.dataclass
class Config:
    """Steps of wide fits against the device's matrix-product rate."""

    quick: bool = False
    """Only the smaller shape, at a quarter of its width."""
    out: Path | None = None
    """A JSON file for the figures."""


SHAPES = {"GPT-2": Shape(768, 3072, False), "Llama-8B": Shape(4096, 14336, True)}


def main(config: Config) -> None:
    results = Results(config)
    device = jax.devices()[0]
    shapes = {"GPT-2 ÷ 4": Shape(192, 768, False)} if config.quick else SHAPES
    shapes = shapes if device.platform != "cpu" else dict(list(shapes.items())[:1])
    largest = 1024 if config.quick else 8192 if device.platform != "cpu" else 2048
    rates = {precision: product_rate(largest, precision) for precision in PRECISIONS if not lacking(precision)}
    print(f"{device.device_kind}, jax {jax.__version__}; products of {largest}×{largest}, TFLOP/s:")
    print(", ".join(f"{precision} {rate / 1e12:.4g}" for precision, rate in rates.items()) + "\n")
    headings = (
        "layer",
        "fit",
        "precision",
        "ms a step",
        "share of rate",
        "|RRᵀ-I|",
        "gradient error",
        "peak GiB",
        "compile s",
    )
    print(f"| {' | '.join(headings)} |\n|{'---|' * len(headings)}", flush=True)
    figures: list[dict[str, Any]] = [{"device": device.device_kind, "products": rates}]
    for name, shape in shapes.items():
        for row in steps(shape, rates):
            figures.append({"layer": name, **row})
            cells = (
                name, row["fit"], row["precision"], f"{row['seconds'] * 1e3:.4g}", f"{row['share']:.0%}",
                f"{row['orthogonality_error']:.1e}", f"{row['gradient_error']:.1e}", f"{row['peak_bytes'] / 2**30:.2f}",
                f"{row['compile_seconds']:.1f}",
            )  # fmt: skip
            print(f"| {' | '.join(cells)} |", flush=True)
            results.write(figures)  # a device may be taken away at any time


def steps(shape: Shape, rates: dict[str, float]) -> Iterator[dict[str, Any]]:
    """A row for every precision of `find_rotations`, and one for `find_basis`."""
    rng, d, h = np.random.default_rng(0), shape.d, shape.hidden
    layer = jax.tree.map(jnp.asarray, make_layer(rng, shape))
    x = jnp.asarray(rng.standard_normal((2 * EXAMPLES, d)).astype(np.float32))
    staying = 5 * 2 * d**3
    work = 2 * EXAMPLES * (d * h * d + 2 * d**3) + 2 * staying
    exact = None
    for precision, rate in rates.items():
        objective = rs.JacobianSparsity(layer, x, rs.Log(0.1), precision=precision)
        gradient = gradients(objective)
        row = timed(objective, rs.Anneal(steps=STEPS, batch_size=EXAMPLES), range(STEPS))
        exact = gradient if exact is None else exact
        error = max(float(np.abs(gradient[s] - exact[s]).max() / np.abs(exact[s]).max()) for s in exact)
        yield {"fit": f"{EXAMPLES} Jacobians", "precision": precision, "gradient_error": error, **row} | {
            "share": work / row["seconds"] / rate
        }
    rows = 2 * d
    objective = rs.ActivationSparsity(rng.standard_normal((2 * rows, d)).astype(np.float32), rs.TopK(0.5))
    row = timed(objective, rs.Anneal(steps=STEPS, batch_size=rows, angle=0.1), range(STEPS))
    share = (6 * rows * d**2 + staying) / row["seconds"] / rates["highest"]
    yield {"fit": f"{rows} activations", "precision": "highest", "gradient_error": 0.0, "share": share, **row}


def gradients(objective: Objective) -> dict[str, np.ndarray]:
    """The gradient of all examples at the neurons."""
    bases = {name: jnp.eye(d) for name, d in objective.spaces.items()}
    found = jax.jit(lambda objective, bases: objective.value_and_grad(bases)[1])(objective, bases)
    return {name: np.asarray(g) for name, g in found.items()}


if __name__ == "__main__":
    start(main, Config)
