"""What the starts that the default looks at, and one that it does not, are worth on real layers."""

import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from _networks import Case, cases, digits_layer
from rich.console import Console
from rich.table import Table

import rotsparse as rs
from rotsparse.engine.solution import judged_value
from rotsparse.evaluation.metrics import evaluate
from rotsparse.fit.weight_bases import absorbed, gram_schmidt, rounded
from rotsparse.layers.jacobians import LayerStatistics
from rotsparse.objectives import JacobianSparsity
from rotsparse.solvers.hinted import entries_left


def started(data: Path, only: tuple[str, ...], *, quick: bool) -> Iterator[tuple[str, Case]]:
    """The digits networks of four seeds, or the networks whose names begin like one of `only`."""
    for seed in () if only else range(1 if quick else 4):
        yield f"digits, layer 2, seed {seed} (raw)", digits_layer({"scale_inputs": False}, seed)
    for name, load in cases(data, data / "minilm"):
        if only and name.startswith(only):
            yield name, load()


def compare_starts(case: Case, steps: int) -> list[dict]:
    """The first look at every start, a fit from it, and the default of so many steps."""
    layer, train, test = case.layer, case.train[:4000], case.test[:1000]
    measure, key, scale = rs.Log(0.1), jax.random.key(0), case.options.get("scale_inputs", True)
    objective, held_out = (JacobianSparsity(layer, x, measure, scale_inputs=scale) for x in (train, test))
    near = rs.Anneal(steps=steps // 2, angle=0.1)
    methods = {"neurons": rs.Anneal(steps=steps), "svd_mean_jacobian": near, "sparse_weights": near}
    starts = {name: getattr(rs.baselines, name)(layer, train) for name in methods}
    if isinstance(layer, rs.Dense):
        methods["hybrid"] = rs.Anneal(steps=steps // 2, angle=0.2)
        mixed = [hybrid(layer, train, k) for k in np.linspace(0, min(layer.d_in, layer.d_out), 17).astype(int)]
        starts["hybrid"] = min(mixed, key=lambda r: judged_value(objective, to_bases(r)))
    rows = []

    def add(start, what, rotations, seconds):
        bases = to_bases(rotations)
        metrics = evaluate(layer, test, rotations, scale_inputs=scale, key=key, resamples=2)
        values = {"train": judged_value(objective, bases), "held_out": judged_value(held_out, bases)}
        left = {"left": entries_left(objective, bases)}
        shown = {name: metrics[name].value for name in ("fraction_below_0.1_rms", "small_by_row", "edges_99")}
        rows.append({"start": start, "what": what, **values, **left, **shown, "seconds": seconds})

    def fit(known, what, **options):
        begun = time.perf_counter()
        found = rs.find_rotations(layer, train, measure=measure, scale_inputs=scale, key=key, **options).completed()
        add(known, what, found.rotations, time.perf_counter() - begun)

    for name, start in starts.items():
        add(name, "look", start, 0.0)
        fit(name, "fit", start=start, method=methods[name])
    fit("chosen", "default", method=rs.default_method(steps=steps))
    return rows


def hybrid(layer: rs.Dense, x, k: int) -> rs.Rotations:
    """The k most active neurons in their singular vectors, the others as they are."""
    order = np.argsort(-LayerStatistics(layer, x).gate_powers[0], kind="stable")
    w, outputs = absorbed(layer, layer.w)[order], np.eye(layer.d_out)
    left, _, right = np.linalg.svd(w[:k])
    outputs[:k, :k] = left.T
    return rounded(gram_schmidt(np.concatenate([right[:k], w[k:]])), outputs @ np.eye(layer.d_out)[order])


def show_starts(name: str, rows: list[dict]) -> None:
    headings = ("train", "held_out", "left", "fraction_below_0.1_rms", "small_by_row", "edges_99", "seconds")
    table = Table("start", "", *headings, title=name)
    for row in rows:
        table.add_row(row["start"], row["what"], *(f"{row[heading]:.4g}" for heading in headings))
    Console(width=130).print(table)


def to_bases(rotations: rs.Rotations) -> dict:
    return {"in": jnp.asarray(rotations.r_in), "out": jnp.asarray(rotations.r_out)}
