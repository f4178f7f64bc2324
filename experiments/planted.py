"""Rotations with a known answer: when are planted sparse bases found, how exactly, and does the tool say when not?

Planted networks are sparse in hidden coordinates: `R_out f(R_inᵀ z)` is an MLP block of `3 n` neurons that each read
two inputs and write to two outputs (normal weights), and R_in, R_out are Haar-random. Four sweeps:

- exact: no noise, two activations, several seeds. A fit at ε = 0.1, then short ones with smaller ε, each with pair
  searches: a finite ε prices entries that are not quite zero too low, and may prefer a mixture of two directions;
- noise: normal weights are added to every entry of the sparse ones;
- sample size: from 2 to 512 examples;
- one side: a single layer `relu(W x)`, W sparse (two weights a neuron) and its inputs hidden by R_in. Its Jacobian
  `diag(g(x)) W` shows R_in nothing but the rows of W, however many examples there are: R_in is identifiable only where
  they are many and sparse. With dense normal W nothing is planted in the inputs, and nothing should be found.

Every cell says how far the result is from the truth (mean max |cos| and Amari distance, each side), whether independent
starts agree, and whether the fit beats its nulls: the second and third are all that one has where the truth is not
known, and they should follow the first.
"""

import dataclasses
from typing import Any

import _common
import jax
import jax.numpy as jnp
import numpy as np
from _verdict import judged
from jaxtyping import Float
from matplotlib.figure import Figure

import rotsparse as rs
from rotsparse._core.alignment import chance_cosine
from rotsparse._core.orthogonal import haar
from rotsparse.layers.base import Layer

COSINE, AMARI = 0.999, 1e-3
"""From where on a side counts as recovered exactly."""
HELD_OUT = 300
"""Examples on which the fit, its baselines and its nulls are compared."""
SHARPER = (0.03, 0.01, 0.003)
"""Scales of the measure after the first fit's 0.1."""


@dataclasses.dataclass(frozen=True)
class Config(_common.Options):
    """Recovery of planted rotations under noise, with few examples, and where they are not identifiable."""

    quick: bool = False
    """Fewer cells and steps: two minutes."""
    n: int = 32
    """Inputs and outputs."""
    seeds: int = 3
    """Networks of each kind in the exact sweep."""
    examples: int = 512
    steps: int = 4000
    restarts: int = 3
    noise: tuple[float, ...] = (0.01, 0.03, 0.1, 0.2, 0.3)
    """Standard deviation of the added weights, as a share of the root mean square of the sparse ones' entries that are
    not zero."""
    samples: tuple[int, ...] = (2, 4, 8, 16, 32, 128)
    outputs: tuple[float, ...] = (0.25, 0.5, 1, 2, 4)
    """Of the single layer, in multiples of its inputs."""


def quick(config: Config) -> Config:
    return dataclasses.replace(
        config,
        seeds=1,
        steps=2000,
        restarts=2,
        noise=(0.03, 0.2),
        samples=(2, 8),
        outputs=(0.5, 4),
    )


@dataclasses.dataclass(frozen=True)
class Planted:
    """A layer, its inputs, and the rotations that undo what was done to it."""

    layer: Layer
    x: Float[np.ndarray, "n d_in"]
    test: Float[np.ndarray, "m d_in"]
    truth: rs.Rotations


def block(config: Config, *, activation: str = "relu", noise: float = 0.0, examples: int | None = None, seed: int):
    """An MLP block of 3n neurons with two inputs and two outputs each."""
    n, rng = config.n, np.random.default_rng([config.seed, seed])
    w_in, w_out = _sparse_rows(rng, 3 * n, n), _sparse_rows(rng, 3 * n, n).T
    w_in, w_out = (w + noise * rng.standard_normal(w.shape) for w in (w_in, w_out))
    truth = _haar(config, seed, n, n)
    bias = 0.1 * rng.standard_normal(3 * n)
    examples = config.examples if examples is None else examples
    x = rng.standard_normal((examples + HELD_OUT, n)) @ truth.r_in
    f32 = np.float32
    layer = rs.MLP(
        (w_in @ truth.r_in).astype(f32), bias.astype(f32), (truth.r_out.T @ w_out).astype(f32), activation=activation
    )
    train, test = np.split(x.astype(f32), [examples])
    return Planted(layer, train, test, truth)


def single_layer(config: Config, outputs: int, *, seed: int, dense: bool = False) -> Planted:
    """`relu(W x + b)` with two weights a neuron (or all of them), its inputs rotated; the outputs' truth is the
    neurons."""
    n, rng = config.n, np.random.default_rng([config.seed, seed])
    r_in = _haar(config, seed, n, n).r_in
    w = rng.standard_normal((outputs, n)) if dense else _sparse_rows(rng, outputs, n)
    w = (w @ r_in).astype(np.float32)
    x = (rng.standard_normal((config.examples + HELD_OUT, n)) @ r_in).astype(np.float32)
    layer = rs.Dense(w, (0.1 * rng.standard_normal(outputs)).astype(np.float32))
    train, test = np.split(x, [config.examples])
    return Planted(layer, train, test, rs.Rotations(r_in, np.eye(outputs, dtype=np.float32)))


def measure(planted: Planted, config: Config, *, seed: int) -> dict[str, Any]:
    """Fit a planted network and its nulls; how near is the truth, and what can be known without it?"""
    key = jax.random.key(config.seed + seed)
    options = {"scale_inputs": False, "method": rs.default_method(steps=config.steps), "restarts": config.restarts}
    solution = rs.find_rotations(planted.layer, planted.x, key=key, **options).completed()
    rotations = sharpened(planted, solution, config, key=key)
    bases = {"learned": solution.rotations, "neurons": rs.baselines.neurons(planted.layer, planted.x)}
    comparison = rs.compare(planted.layer, planted.test, bases, scale_inputs=False, key=jax.random.fold_in(key, 2))
    said = judged(
        planted.layer,
        planted.x,
        planted.test,
        solution,
        comparison,
        key=jax.random.fold_in(key, 1),
        scale_inputs=False,
    )
    sharpest = rs.JacobianSparsity(planted.layer, planted.x, rs.Log(SHARPER[-1]), scale_inputs=False)
    result: dict[str, Any] = {
        **said,
        "metrics": comparison.to_json()["metrics"],
        "objective": _value(sharpest, rotations),
        "planted_objective": _value(sharpest, planted.truth),
    }
    for side in ("in", "out"):
        found, truth = getattr(rotations, f"r_{side}"), getattr(planted.truth, f"r_{side}")
        cosine, amari = rs.mean_max_cosine(found, truth), rs.amari_distance(found, truth)
        result[side] = {
            "cosine": cosine,
            "chance": chance_cosine(len(truth), key=key, draws=5).value,
            "amari": amari,
            "recovered": bool(cosine >= COSINE and amari < AMARI),
            "reproduced": said["reproduced"][side],
        }
    return result


def sharpened(planted: Planted, solution: rs.Solution, config: Config, *, key) -> rs.Rotations:
    """The rotations of a fit, followed as ε falls."""
    bases, polish = solution.bases, rs.Anneal(steps=config.steps // 4, angle=0.02)
    for eps in SHARPER:
        objective = rs.JacobianSparsity(planted.layer, planted.x, rs.Log(eps), scale_inputs=False)
        for method in (polish, rs.Refine(polish, examples=128)):
            bases = rs.minimize(objective, bases, method=method, key=key).completed().bases
    return rs.Rotations(bases["in"], bases["out"])


def study(config: Config) -> dict[str, dict[str, Any]]:
    """`[sweep][cell]`: what `measure` says of each."""
    layers = {f"{m:g}n": single_layer(config, int(m * config.n), seed=0) for m in config.outputs}
    layers["n, dense"] = single_layer(config, config.n, seed=0, dense=True)
    cells = {
        "exact": {
            f"{activation}, seed {seed}": block(config, activation=activation, seed=seed)
            for activation in ("relu", "gelu")
            for seed in range(config.seeds)
        },
        "noise": {str(s): block(config, noise=s, seed=0) for s in config.noise},
        "samples": {str(n): block(config, examples=n, seed=0) for n in config.samples},
        "outputs of a single layer": layers,
    }
    found: dict[str, dict[str, Any]] = {}
    for sweep, of in cells.items():
        found[sweep] = {}
        for seed, (cell, planted) in enumerate(of.items()):
            found[sweep][cell] = result = measure(planted, config, seed=seed)
            print(f"{sweep} {cell}: " + _cosines(result) + f"; {result['verdict']}", flush=True)
    return found


def _cosines(result: dict[str, Any]) -> str:
    return ", ".join(f"{side} {result[side]['cosine']:.4f} ({result[side]['amari']:.1e})" for side in ("in", "out"))


def report(sweeps: dict[str, dict[str, Any]], config: Config) -> str:
    """The results as Markdown."""
    lines = ["# Planted rotations", ""]
    lines += [f"n = {config.n}; mean max |cos| with the truth (Amari distance), and the share of directions that all"]
    lines += [
        f"restarts found (|cos| > 0.99). Exact means |cos| ≥ {COSINE} and an Amari distance below {AMARI}. Where the"
    ]
    lines += ["objective is below that of the planted bases, these are not its optimum."]
    for sweep, cells in sweeps.items():
        lines += ["", f"## {sweep[0].upper()}{sweep[1:]}", "", "| cell | inputs | reproduced | outputs | reproduced |"]
        lines[-1] += " objective (planted) | short fit, strictest null | exact | what it says without the truth |"
        lines += ["|---|---|---:|---|---:|---:|---|---|---|"]
        for cell, of in cells.items():
            row = [cell]
            for side in ("in", "out"):
                row += [f"{of[side]['cosine']:.4f} ({of[side]['amari']:.0e})", f"{of[side]['reproduced']:.0%}"]
            exact = [name for name, side in {"inputs": "in", "outputs": "out"}.items() if of[side]["recovered"]]
            row += [f"{of['objective']:.3f} ({of['planted_objective']:.3f})"]
            small = f"{of['short_fit']['value']:.3f}, {of['strictest']} {of['strictest_null']['value']:.3f}"
            row += [small, " and ".join(exact) or "no", of["verdict"]]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def figure(sweeps: dict[str, dict[str, Any]]) -> Figure:
    """Distance from the truth beside the agreement of restarts, along every sweep but the exact one."""
    shown = {name: cells for name, cells in sweeps.items() if name != "exact"}
    fig = Figure(figsize=(11, 3.2), dpi=160, layout="constrained")
    axes = fig.subplots(1, len(shown), sharey=True)
    titles = {
        "noise": "noise in the weights",
        "samples": "examples",
        "outputs of a single layer": "outputs of a single ReLU layer",
    }
    for ax, (sweep, cells) in zip(axes, shown.items(), strict=True):
        for side, colour, label in (("in", "#0072b2", "inputs"), ("out", "#d55e00", "outputs")):
            ax.plot(list(cells), [of[side]["cosine"] for of in cells.values()], color=colour, marker="o", label=label)
            again = [of[side]["reproduced"] for of in cells.values()]
            ax.plot(list(cells), again, color=colour, ls="--", marker="s", ms=4, label=f"{label}: restarts agree")
        _common.style(ax, titles[sweep])
    axes[0].set_ylabel("mean max |cos| with the truth;\nshare of directions found again")
    axes[0].set_ylim(0, 1.03)
    _common.legend_beside(axes[-1])
    return fig


def _value(objective: rs.JacobianSparsity, rotations: rs.Rotations) -> float:
    return float(objective.value({"in": jnp.asarray(rotations.r_in), "out": jnp.asarray(rotations.r_out)}))


def _sparse_rows(rng: np.random.Generator, rows: int, d: int) -> np.ndarray:
    """Two normal weights a row."""
    w = np.zeros((rows, d))
    for row in w:
        row[rng.choice(d, 2, replace=False)] = rng.standard_normal(2)
    return w


def _haar(config: Config, seed: int, d_in: int, d_out: int) -> rs.Rotations:
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), seed))
    return rs.Rotations(*(np.asarray(haar(k, d)) for k, d in zip(keys, (d_in, d_out), strict=True)))


def main(config: Config) -> None:
    config = quick(config) if config.quick else config
    with _common.run("planted", config) as run:
        sweeps = study(config)
        run.finish({"sweeps": sweeps}, report(sweeps, config), sweeps=figure(sweeps))


if __name__ == "__main__":
    _common.start(main, Config)
