"""One table of what the other benchmarks measured: `make bench` runs it last.

Reads `runs/benchmarks/NAME.json` of every benchmark that has been run and prints its main figures, with the form that
they are of, and which machines, commits and versions they come from; `--publish` puts the table into
docs/benchmarks.md, between its markers. Every benchmark has rows but `pca.py`, which publishes tables of its own.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from _publish import publish
from _results import described, read, start
from phase_transition import RECOVERED, needed
from rich.console import Console
from rich.markdown import Markdown

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"

Row = tuple[str, str, str, str]
"""What is measured, rotsparse's figure, the best peer's, and a remark."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that the benchmarks measured, as one table."""

    results: Path = Path("runs/benchmarks")
    """Where the benchmarks wrote their JSON files."""
    publish: bool = False
    """Write the table into docs/benchmarks.md."""


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
        for name in ("annealing only", "from the weights"):
            of.pop(name, None)
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


def levers(result: dict) -> Iterator[Row]:
    fits = result["steps"]
    n, planted = fits[0]["n"], fits[0]["planted"]
    whole = min((fit for fit in fits if fit["rows and columns"] == n), key=lambda fit: fit["objective"])
    part = min((fit for fit in fits if fit["rows and columns"] < n), key=lambda fit: fit["objective"])
    ours, peer = (f"{fit['objective']:.3f} (batches of {fit['examples']})" for fit in (whole, part))
    said = f"planted {planted:.3f}; {whole['seconds']:.1f} s; {part['seconds']:.1f} s"
    yield f"planted Jacobians, n = {n}: objective of whole Jacobians a step", ours, f"{peer}, parts of them", said
    for of in result["gathered"]:
        name = f"ReLU block, d = {of['d']}, {of['active']:.0%} of the neurons active: gathering them"
        yield name, f"{of['times as fast']:.2f}× as fast", "1 (all neurons)", ""


def precision(figures: dict) -> Iterator[Row]:
    for name, of in figures.items():
        eps, kind = name.split()
        if kind != "highest":
            ours, exact = (f"{np.mean(f['objective']):.4f}" for f in (of, figures[f"{eps} highest"]))
            yield f"digits, ε = {eps}: objective reached", f"{ours} ({kind})", f"{exact} (float32)", "products emulated"


def checkpointing(figures: dict) -> Iterator[Row]:
    share, difference = (
        figures[f"once a minute: {how}"] for how in ("waiting and background", "by the difference of processor time")
    )
    said = f"{difference:.1%} of the processor time by the difference"
    yield f"a checkpoint a minute, width {figures['width']}", f"{share:.1%} of the time", "2% (aim)", said


def streaming(figures: dict) -> Iterator[Row]:
    ours, memory = (f"{figures[f'{where}_ms_per_step']:.1f}" for where in ("streamed", "in_memory"))
    said = f"{figures['speed_ratio']:.0%} of its speed; peak {figures['peak_gigabytes']:.2f} GB"
    yield f"a store of {figures['gigabytes']:.0f} GB: ms a step", ours, f"{memory} (from memory)", said


def capture(figures: dict) -> Iterator[Row]:
    ours, product = (f"{figures[name]:.0f}" for name in ("gflops", "product_gflops"))
    yield "capture of SmolLM2-135M: Gflop/s", ours, f"{product} (its products)", f"{figures['share']:.0%} of the rate"


BENCHMARKS = (
    capture,
    activation_recovery,
    phase_transition,
    robustness,
    jacobian_recovery,
    real_layers,
    objective,
    layers_at_once,
    levers,
    precision,
    checkpointing,
    streaming,
)


def table(results: Path) -> str:
    """The Markdown table, and where its figures are from. Raises `ValueError` where there are none."""
    lines = ["| | rotsparse | best peer, or yardstick | | form |", "|---|---:|---:|---|---|"]
    provenances = []
    for benchmark in BENCHMARKS:
        path = results / f"{benchmark.__name__}.json"
        if path.is_file():
            content = read(path)
            provenances.append(content["provenance"])
            lines += ["| " + " | ".join([*row, content["form"]]) + " |" for row in benchmark(content["results"])]
    if not provenances:
        raise ValueError(f"no results of any benchmark in {results}")
    return "\n".join(lines) + f"\n\n({described(provenances)})\n"


def main(config: Config) -> None:
    text = table(config.results)
    Console().print(Markdown(text))
    if config.publish:
        publish(PAGE, "bench", text)


if __name__ == "__main__":
    start(main, Config)
