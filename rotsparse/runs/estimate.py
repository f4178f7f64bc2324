"""What a fit will take, phase by phase, before it starts: its floating-point operations at the rate at which this
machine multiplies matrices."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from rotsparse._core.precision import products
from rotsparse._core.types import Rows
from rotsparse.data.sources import Source
from rotsparse.engine.method import Method
from rotsparse.engine.steps import CHECKING
from rotsparse.evaluation import baselines
from rotsparse.evaluation.fit_nulls import QuickControl
from rotsparse.fit.default_method import default_method
from rotsparse.layers.base import ClosedForm, Layer
from rotsparse.layers.jacobians import jacobian_flops
from rotsparse.objectives.jacobian import looked_at
from rotsparse.runs.loading import compared

# What phases reach of the rate of one large product (`benchmarks/width.py` measures both).
STEPS_REACH, COMPARISON_REACH = 0.7, 0.25


class Phase(NamedTuple):
    """A part of a fit, its floating-point operations, and how much of the product rate it reaches."""

    name: str
    flops: float
    reach: float


def phases(layer: Layer, train: int, test: int, method: Method, *, restarts: int, control: bool) -> list[Phase]:
    """The phases of `rotsparse fit`, for so many examples to fit on and to compare on."""
    f, d_in, d_out = jacobian_flops(layer), layer.d_in, layer.d_out
    staying = 10.0 * (d_in**3 + d_out**3)  # five products for each rotation
    look = 0.6 * f * min(train, looked_at(layer))
    found = []
    for name, steps, batch in method.planned:
        examples = min(train, train if batch is None else batch)
        work = restarts * steps * (examples * f + staying)
        found.append(Phase(f"{name}, {steps:,} steps of {examples}", work, STEPS_REACH))
        found.append(Phase("  looks at the objective", 4 * restarts * look + CHECKING * work, STEPS_REACH))
    if control and isinstance(layer, ClosedForm):
        quick = QuickControl.of(layer)
        work = quick.fits * (quick.steps * (quick.batch * f + staying) + 2.4 * f * min(train, quick.looks))
        name = f"null models, {quick.fits} fits of {quick.steps} steps"
        found.append(Phase(name, work, STEPS_REACH))
    bases = 1 + len(baselines.methods(layer, key=jax.random.key(0)))
    found.append(Phase(f"comparison, {bases} bases on {test:,} examples", 2 * bases * test * 0.6 * f, COMPARISON_REACH))
    return found


def memory(layer: Layer, train: int, restarts: int) -> float:
    """Bytes, about: Python and its libraries, weights, examples, and for each restart six matrices a rotation."""
    weights = sum(np.size(leaf) for leaf in jax.tree.leaves(layer) if hasattr(leaf, "shape"))
    squares = layer.d_in**2 + layer.d_out**2
    return 0.7e9 + 4.0 * (2 * weights + 2 * train * layer.d_in + 6 * restarts * squares + 30 * layer.d_in * layer.d_out)


def product_rate(d: int = 1024, precision: str = "highest") -> float:
    """Floating-point operations a second of a d×d product, the best of five."""
    with products(precision):
        product, a = jax.jit(jnp.matmul), jnp.ones((d, d))
        jax.block_until_ready(product(a, a))
        seconds = []
        for _ in range(5):
            begun = time.perf_counter()
            jax.block_until_ready(product(a, a))
            seconds.append(time.perf_counter() - begun)
    return 2 * d**3 / min(seconds)


def estimated(
    layer: Layer, train: Rows | Source, test: Rows, fit: dict[str, Any], *, control: bool
) -> tuple[list[Phase], float]:
    """The phases of `layer_run.run` with these arguments, and the bytes of memory."""
    method = default_method(layer) if fit.get("method") is None else fit["method"]
    restarts, n = fit.get("restarts", 1), len(train)
    found = phases(layer, n, len(compared(layer, test)), method, restarts=restarts, control=control)
    return found, memory(layer, n, restarts)


def table(found: list[Phase], rate: float, used: float) -> Table:
    """The phases with their times at this rate."""
    title = f"about {used / 1e9:.1f} GB of memory; products run at {rate / 1e9:.0f} GFLOP/s here"
    shown = Table("phase", "TFLOP", "time", title=title)
    seconds = [phase.flops / (rate * phase.reach) for phase in found]
    for phase, s in zip(found, seconds, strict=True):
        shown.add_row(phase.name, f"{phase.flops / 1e12:.3g}", in_words(s))
    shown.add_row("all", f"{sum(phase.flops for phase in found) / 1e12:.3g}", in_words(sum(seconds)), style="bold")
    return shown


def in_words(seconds: float) -> str:
    """A duration to two digits."""
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.2g} {unit}"
    return f"{seconds:.2g} s"
