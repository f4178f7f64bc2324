"""Claim: at equal time fewer examples a step beat parts of the Jacobian, and gathering the active neurons of a ReLU
block pays where they are few. The figures of docs/scaling.md.

Steps: a planted two-sided network (GELU, hidden 2n, 512 examples), annealed with fewer examples or with parts of the
Jacobian, each with as many steps as the same number of Jacobian entries allows. Gathering: objective and gradient of a
ReLU block with a given share of active neurons, with and without, in turn; the fastest of some runs.
"""

import dataclasses
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from _results import Results, start
from jacobian_recovery import KEY, planted
from rich.console import Console
from rich.table import Table

import rotsparse as rs


@dataclasses.dataclass
class Config:
    """What the levers of docs/scaling.md do."""

    quick: bool = False
    """Small layers, few steps."""
    out: Path | None = None
    """A JSON file for the figures."""


def main(config: Config) -> None:
    results = Results(config)
    steps = anneal(32, 400) if config.quick else anneal(128, 1500)
    sizes = [(128, 512, 16)] if config.quick else [(128, 512, 16), (768, 3072, 4)]
    gathered = [gather(d, hidden, n, share) for d, hidden, n in sizes for share in (0.1, 0.2, 0.3)]
    show("one budget, spent in different ways", steps)
    show("active neurons gathered", gathered)
    results.write({"steps": steps, "gathered": gathered})


def anneal(n: int, steps: int) -> list[dict]:
    problem = planted(n, "gelu", 0)
    value = eqx.filter_jit(problem.objective.value)
    rows = []
    for batch, divisor, factor in [(16, 1, 1), (4, 1, 4), (16, 2, 4), (64, 2, 1), (16, 4, 8)]:
        submatrix = None if divisor == 1 else (n // divisor, n // divisor)
        method = rs.Anneal(steps=steps * factor, batch_size=batch, submatrix=submatrix)
        fit = rs.minimize(problem.objective, problem.start, method=method, key=KEY).completed()
        seconds = fit.stats["seconds"] - fit.stats["compile_seconds"]
        row = {"n": n, "examples": batch, "rows and columns": n // divisor, "steps": steps * factor}
        rows.append(
            row | {"seconds": seconds, "objective": float(value(fit.bases)), "planted": float(value(problem.truth))}
        )
    return rows


def gather(d: int, hidden: int, n: int, share: float) -> dict:
    rng = np.random.default_rng(0)
    w_in, w_out = (rng.standard_normal(s).astype(np.float32) / s[1] ** 0.5 for s in ((hidden, d), (d, hidden)))
    x = rng.standard_normal((n, d)).astype(np.float32)
    bias = -np.quantile(x @ w_in.T, 1 - share).astype(np.float32) * np.ones(hidden, np.float32)
    layer, bases = rs.MLP(w_in, bias, w_out, activation="relu"), {"in": jnp.eye(d), "out": jnp.eye(d)}
    evaluate = eqx.filter_jit(lambda objective: objective.value_and_grad(bases))
    gathering = rs.JacobianSparsity(layer, x, rs.Log(0.1), scale_inputs=False)
    everything = eqx.tree_at(lambda o: o.layer, gathering, layer)
    seconds = {"gathered": [], "all": []}
    for _ in range(6):
        for name, objective in (("gathered", gathering), ("all", everything)):
            begun = time.perf_counter()
            jax.block_until_ready(evaluate(objective))
            seconds[name].append(time.perf_counter() - begun)
    ratio = min(seconds["all"]) / min(seconds["gathered"])
    assert isinstance(gathering.layer, rs.MLP)
    return {"d": d, "hidden": hidden, "active": share, "gathered": gathering.layer.active, "times as fast": ratio}


def show(title: str, rows: list[dict]) -> None:
    table = Table(title=title)
    for heading in rows[0]:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)


if __name__ == "__main__":
    start(main, Config)
