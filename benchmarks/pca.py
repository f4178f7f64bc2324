"""Claim: on trained layers of real networks the learned basis leaves more of the held-out Jacobian's entries near zero
than principal components, and than every other basis that ignores the objective.

`rotsparse benchmark` for one layer after another: learned, all baselines, the same fit of every null, and
how many directions other restarts find again. Digits, x² and the planted network are trained or made here; the others
need the experiments' data (`--data`) and, for MiniLM, its folder (`--minilm`), and are skipped, visibly, without them.

Inputs are scaled by their standard deviations, except where a network's row says raw. `--publish` writes the tables
into docs/results.md, between its markers.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from _networks import Case, Missing, cases
from _publish import publish
from _results import Results, described, read, start
from rich.console import Console

import rotsparse as rs
from rotsparse._core.files import MARKDOWN, check_new_file, write_atomically
from rotsparse._core.intervals import Interval
from rotsparse.evaluation.benchmark import LEARNED, Benchmark, benchmark
from rotsparse.evaluation.control import Control
from rotsparse.evaluation.metrics import HIGHER_IS_SPARSER
from rotsparse.evaluation.names import LABELS, heading, shown
from rotsparse.evaluation.verdict import SHARE, WITHOUT_TOP

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"
METRICS = (SHARE, "small_by_row", WITHOUT_TOP, "edges_99")
"""What the published tables show; the JSON file has every metric."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The learned basis of every network at hand against PCA and every other baseline."""

    quick: bool = False
    """Fewer networks, examples and steps: three minutes."""
    data: Path = ROOT.parent / "shared" / "data"
    """The folder with mnist, mlp_mnist, modular_addition, stories260k and text."""
    minilm: Path = ROOT.parent / "shared" / "data" / "minilm"
    """A Hugging Face folder of all-MiniLM-L6-v2."""
    only: tuple[str, ...] = ()
    """Networks whose names begin like one of these."""
    out: Path = Path("runs/benchmarks/pca.json")
    """A JSON file for the figures (in which networks of earlier runs of the same form are kept, each with its own
    commit and versions); the tables go beside it, into a Markdown file of the same name."""
    publish: bool = False
    """Write the tables into docs/results.md."""
    seed: int = 0
    examples: tuple[int, int] = (3000, 500)
    """To fit on, and to test on, at most."""
    steps: int = 4000


def run(case: Case, config: Config) -> Benchmark:
    """Benchmark one network."""
    train, test = case.sampled(config.examples, config.seed)
    options: dict[str, Any] = {"method": rs.default_method(steps=config.steps), "restarts": 2, **case.options}
    return benchmark(case.layer, train, test, key=jax.random.key(config.seed), **options)


def tables(networks: dict[str, dict[str, Any]], metrics: tuple[str, ...]) -> str:
    """A Markdown table for each metric: a network a row."""
    parts = []
    for metric in metrics:
        columns = ["network", f"learned: {heading(metric)}", "PCA", "best baseline", "neurons", "strictest null"]
        lines = ["| " + " | ".join(columns) + " |", "|---|---:|---:|---|---:|---:|"]
        for name, of in networks.items():
            m = {basis: Interval(**values[metric]) for basis, values in of["metrics"].items()}
            learned = m.pop(LEARNED)
            sign = 1 if HIGHER_IS_SPARSER[metric] else -1
            best = max(m, key=lambda basis: sign * m[basis].value)
            ahead = not learned.overlaps(m[best]) and sign * (learned.value - m[best].value) > 0
            row = [name, shown(metric, learned, bold=ahead), shown(metric, m["pca"])]
            row += [f"{best.replace('_', ' ')} {shown(metric, m[best])}", shown(metric, m["neurons"])]
            control = of["control"] and Control.from_json(of["control"])
            nulls = {null: control.another(null, metric) for null in control.nulls} if control else {}
            strictest = max(nulls, key=lambda null: sign * nulls[null].value, default=None)
            row += [f"{strictest} {shown(metric, nulls[strictest])}" if strictest else "–"]
            lines.append("| " + " | ".join(row) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def evidence(networks: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of what does not fit into the others: restarts, seconds, and the metrics that are behind."""
    lines = ["| network | inputs, outputs found again | fit, s: learned | PCA | slowest baseline | behind on |"]
    lines += ["|---|---|---:|---:|---|---|"]
    for name, of in networks.items():
        seconds = {basis: s for basis, s in of["seconds"].items() if not basis.startswith(LEARNED)}
        slowest = max(seconds, key=seconds.__getitem__)
        behind = []
        for metric in filter(of["metrics"][LEARNED].__contains__, HIGHER_IS_SPARSER):
            sign = 1 if HIGHER_IS_SPARSER[metric] else -1
            best = max(of["metrics"], key=lambda basis: sign * of["metrics"][basis][metric]["value"])
            if best != LEARNED:
                behind.append(f"{LABELS[metric]} ({best.replace('_', ' ')})")
        # A side of which nothing was fitted (a single active direction) has no share.
        again = ", ".join(f"{of['reproduced'][s]:.0%}" if s in of["reproduced"] else "–" for s in ("in", "out"))
        row = [name, again, f"{of['seconds'][LEARNED]:.1f}", f"{seconds['pca']:.1f}"]
        row += [f"{slowest.replace('_', ' ')} {seconds[slowest]:.1f}", ", ".join(behind) or "nothing"]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def main(config: Config) -> None:
    console, results = Console(), Results(config)
    check_new_file(config.out.with_suffix(".md"), overwrite=True)
    config = dataclasses.replace(config, examples=(1000, 200), steps=1500) if config.quick else config
    found = read(config.out)["results"] if config.out.exists() else {}
    everything = list(cases(config.data, config.minilm, seed=config.seed, quick=config.quick))
    for name, load in everything:
        if config.only and not name.startswith(config.only):
            continue
        try:
            case = load()
        except Missing as missing:
            console.print(f"SKIPPED {name}: {missing}", highlight=False)
            continue
        result = run(case, config)
        result.solution.completed()
        console.print(result.comparison.table(name, seconds=result.seconds))
        console.print(f"{result.conclusion}\n", highlight=False)
        # Networks of one file may be of different days and commits.
        found[name] = result.to_json() | {"provenance": results.provenance}
        results.write(found)
    networks = {name: found[name] for name, _ in everything if name in found}
    if not networks:
        return
    source = f"\n({results.form} form; {described(of['provenance'] for of in networks.values())})\n"
    text = tables(networks, METRICS) + "\n" + evidence(networks) + source
    conclusions = "\n".join(f"- {name}: {of['conclusion']}" for name, of in networks.items())
    write_atomically(config.out.with_suffix(".md"), f"{MARKDOWN}{text}\n{conclusions}\n".encode())
    if config.publish:
        publish(PAGE, "pca", text)


if __name__ == "__main__":
    start(main, Config)
