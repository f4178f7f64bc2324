"""One table of what the other benchmarks measured: `make bench` runs it last.

Reads `runs/benchmarks/NAME.json` of every benchmark that has been run and prints a row for each of its claims;
`--publish` puts the table into README.md, between its markers. (The PCA benchmark publishes tables of its own.)
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from _publish import publish
from phase_transition import RECOVERED, needed
from rich.console import Console
from rich.markdown import Markdown

ROOT = Path(__file__).resolve().parents[1]

Row = tuple[str, str, str, str]
"""What is measured, rotsparse's figure, the best peer's, and a remark."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that the benchmarks measured, as one table."""

    results: Path = Path("runs/benchmarks")
    """Where the benchmarks wrote their JSON files."""
    publish: bool = False
    """Write the table into README.md."""


def activation_recovery(rows: list[dict]) -> Iterator[Row]:
    for n in sorted({row["n"] for row in rows}):
        of = {row["method"]: row for row in rows if row["n"] == n}
        ours, peers = of.pop("rotsparse"), of
        error = lambda row: float(np.median(row["errors"]))  # noqa: E731
        warm = lambda row: float(np.median(row["warm_s"]))  # noqa: E731
        p = f"planted activations, n = {n}, p = {ours['p']:,}"
        alone = {name: row for name, row in peers.items() if not name.startswith("FastICA +")}
        best = min(alone, key=lambda name: error(alone[name]))
        yield f"{p}: error", f"{error(ours):.1e}", f"{error(peers[best]):.1e} ({best})", ""
        for name in ("FastICA", "pymanopt CG", "FastICA + pymanopt CG"):
            ratio = warm(peers[name]) / warm(ours)
            said = f"{ratio:.1f}× ours, error {error(peers[name]):.0e}"
            yield f"{p}: seconds, warm", f"{warm(ours):.3f}", f"{warm(peers[name]):.3f} ({name})", said
        for name in ("FastICA", "pymanopt CG"):
            ratio = peers[name]["cold_s"] / ours["cold_s"]
            said = f"{peers[name]['cold_s']:.2f} ({name})"
            yield f"{p}: seconds, whole process", f"{ours['cold_s']:.2f}", said, f"{ratio:.2f}× ours"


def phase_transition(result: dict) -> Iterator[Row]:
    for theta, errors in result["errors"].items():
        needs = {name: needed(result["ratios"], values, RECOVERED) for name, values in errors.items()}
        ours = needs.pop("rotsparse")
        peers = {name: need for name, need in needs.items() if not name.startswith("rotsparse")}
        best = min(peers, key=peers.__getitem__)
        shown = [f"> {result['ratios'][-1]}" if math.isinf(need) else f"{need:.0f}" for need in (ours, peers[best])]
        yield (
            f"examples a dimension to recover, θ = {theta}",
            shown[0],
            f"{shown[1]} ({best})",
            f"{peers[best] / ours:.0f}×",
        )


def robustness(cells: list[dict]) -> Iterator[Row]:
    for cell in cells:
        means = {name: float(np.mean(errors)) for name, errors in cell["errors"].items()}
        ours = means.pop("rotsparse")
        best = min(means, key=means.__getitem__)
        yield f"error, {cell['cell']}, %", f"{ours:.3g}", f"{means[best]:.3g} ({best})", "ε by held-out examples"


def jacobian_recovery(rows: list[dict]) -> Iterator[Row]:
    for n, activation in dict.fromkeys((row["n"], row["activation"]) for row in rows):
        of = {row["method"]: row for row in rows if (row["n"], row["activation"]) == (n, activation)}
        ratio = lambda row: np.divide(row["objective"], row["planted"])  # noqa: E731
        ours = of.pop("rotsparse")
        of.pop("annealing only")
        best = min(of, key=lambda name: float(np.mean(ratio(of[name]))))
        yield (
            f"planted Jacobians, n = {n}, {activation}: objective ÷ planted",
            f"{np.mean(ratio(ours)):.3f} (worst {np.max(ratio(ours)):.3f})",
            f"{np.mean(ratio(of[best])):.3f} ({best})",
            f"{np.mean(ours['s']):.0f} s; {np.mean(of[best]['s']):.0f} s",
        )


def real_layers(rows: list[dict]) -> Iterator[Row]:
    for name, examples in dict.fromkeys((row["layer"], row["examples"]) for row in rows):
        of = [row for row in rows if (row["layer"], row["examples"]) == (name, examples) and row["method"] != "start"]
        ours = [row for row in of if row["method"] == "rotsparse"]
        peers = [row for row in of if row["method"] != "rotsparse"]
        best = min(peers, key=lambda row: row["train"])
        low, high = min(row["train"] for row in ours), max(row["train"] for row in ours)
        said = f"{np.mean([row['seconds'] for row in ours]):.0f} s a fit; {best['seconds']:.0f} s"
        figure = f"{best['train']:.4f} ({best['method']} from {best['start']})"
        yield f"{name}, {examples} examples: objective over starts", f"{low:.4f} to {high:.4f}", figure, said


def objective(results: list[dict]) -> Iterator[Row]:
    for result in results:
        shape = result["shape"]
        name = (
            f"objective and gradient, d = {shape['d']}, hidden {shape['hidden']}{', gated' if shape['gated'] else ''}"
        )
        said = f"{result['speedup_over_autodiff']:.1f}× jacrev and autodiff"
        yield f"{name}: Gflop/s", f"{result['gflops']:.0f}", f"{result['square_gflops']:.0f} (square product)", said


def layers_at_once(rows: list[dict]) -> Iterator[Row]:
    for row in rows:
        ratio = f"{row['vmap_s'] / row['loop_s']:.2f}×"
        yield (
            f"twelve layers, d = {row['d']}: seconds",
            f"{row['loop_s']:.2f} (loop)",
            f"{row['vmap_s']:.2f} (vmap)",
            ratio,
        )


BENCHMARKS = (
    activation_recovery,
    phase_transition,
    robustness,
    jacobian_recovery,
    real_layers,
    objective,
    layers_at_once,
)


def table(results: Path) -> str:
    lines = ["| | rotsparse | best peer, or yardstick | |", "|---|---:|---:|---|"]
    for benchmark in BENCHMARKS:
        path = results / f"{benchmark.__name__}.json"
        if path.is_file():
            content: Any = json.loads(path.read_text())
            lines += ["| " + " | ".join(row) + " |" for row in benchmark(content)]
    return "\n".join(lines) + f"\n\n({os.cpu_count()} CPU cores.)\n"


def main(config: Config) -> None:
    text = table(config.results)
    Console().print(Markdown(text))
    if config.publish:
        publish(ROOT / "README.md", "bench", text)


if __name__ == "__main__":
    main(tyro.cli(Config))
