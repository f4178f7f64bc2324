"""Claim: on two CPU cores one vmapped program for twelve equal layers gains little over fitting them one after the
other: 0.66 of the time at width 32, and 1.07 to 1.40 times as long at widths of 64 to 256. A loop is what `fit_chain`
does; the layers share a compilation either way. On an accelerator that one small layer cannot fill, the vmapped form
should be the faster one (not measured).

Twelve MLP blocks (GELU, hidden 4d, random weights), raw Jacobians, annealing with 16 examples a step. `compile` is once
for either form; `steps` is the fastest of some runs of the same number of steps of all twelve layers, the two forms in
turn. `objective` is the mean over the layers that each form ends at: the same steps with the same keys, whose rounding
errors the annealing magnifies.
"""

import dataclasses
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from _results import Results, start
from rich.console import Console
from rich.table import Table

import rotsparse as rs
from rotsparse.objectives.base import sampled


@dataclasses.dataclass
class Config:
    """Twelve equal layers: vmapped against a loop."""

    quick: bool = False
    """Two small widths, fewer steps."""
    layers: int = 12
    """How many layers."""
    repeats: int = 3
    """Runs of each form; the fastest counts."""
    out: Path | None = None
    """A JSON file for the figures."""


def main(config: Config) -> None:
    results = Results(config)
    rows = [
        compare(config.layers, d, 50 if config.quick else 200, config.repeats)
        for d in ((32, 64) if config.quick else (32, 64, 128, 256))
    ]
    show(config.layers, rows)
    results.write(rows)


def problem(d: int, seed: int) -> rs.JacobianSparsity:
    rng = np.random.default_rng([d, seed])
    w_in, w_out = (
        rng.standard_normal(shape).astype(np.float32) / shape[1] ** 0.5 for shape in ((4 * d, d), (d, 4 * d))
    )
    layer = rs.MLP(jnp.asarray(w_in), None, jnp.asarray(w_out), activation="gelu")
    x = rng.standard_normal((512, d)).astype(np.float32)
    return rs.JacobianSparsity(layer, x, rs.Log(0.1), scale_inputs=False)


def fit(objective: rs.JacobianSparsity, key, steps: int):
    """The objective on all examples after some steps of annealing, from the neurons."""
    method = rs.Anneal(steps=steps)
    bases = {space: jnp.eye(d) for space, d in objective.spaces.items()}

    def body(i, carry):
        bases, state = carry
        batch = sampled(objective, jax.random.fold_in(key, i), method.batch_size)
        bases, state, _ = method.step(batch, bases, state, i)
        return bases, state

    bases, _ = jax.lax.fori_loop(0, steps, body, (bases, method.init(bases)))
    return objective.value(bases)


def compare(layers: int, d: int, steps: int, repeats: int) -> dict:
    problems = [problem(d, seed) for seed in range(layers)]
    keys = jax.random.split(jax.random.key(0), layers)
    arrays, rest = zip(*(eqx.partition(p, eqx.is_array) for p in problems), strict=True)
    together = eqx.combine(jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays), rest[0])

    one, one_compile = compiled(eqx.filter_jit(lambda p, k: fit(p, k, steps)), problems[0], keys[0])
    many, many_compile = compiled(eqx.filter_jit(eqx.filter_vmap(lambda p, k: fit(p, k, steps))), together, keys)
    forms = {
        "loop": lambda: jnp.stack([one(p, k) for p, k in zip(problems, keys, strict=True)]),
        "vmap": lambda: many(together, keys),
    }
    seconds, values = {name: [] for name in forms}, {}
    for _ in range(repeats):
        for name, form in forms.items():
            begun = time.perf_counter()
            values[name] = np.asarray(form())
            seconds[name].append(time.perf_counter() - begun)
    return {
        "d": d,
        "steps": steps,
        "loop_s": min(seconds["loop"]),
        "vmap_s": min(seconds["vmap"]),
        "loop_compile_s": one_compile,
        "vmap_compile_s": many_compile,
        "loop_objective": float(values["loop"].mean()),
        "vmap_objective": float(values["vmap"].mean()),
    }


def compiled(function, *arguments):
    begun = time.perf_counter()
    program = function.lower(*arguments).compile()
    return program, time.perf_counter() - begun


def show(layers: int, rows: list[dict]) -> None:
    table = Table(title=f"{layers} equal layers on {jax.devices()[0].device_kind}")
    for heading in ("d", "steps", "loop s", "vmap s", "vmap ÷ loop", "loop compile s", "vmap compile s", "objective"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row["d"]),
            str(row["steps"]),
            f"{row['loop_s']:.2f}",
            f"{row['vmap_s']:.2f}",
            f"{row['vmap_s'] / row['loop_s']:.2f}×",
            f"{row['loop_compile_s']:.2f}",
            f"{row['vmap_compile_s']:.2f}",
            f"{row['loop_objective']:.3f}, {row['vmap_objective']:.3f}",
        )
    Console().print(table)


if __name__ == "__main__":
    start(main, Config)
