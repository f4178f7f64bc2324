"""Claim: no choice of units and measure tells every learned layer best from its null models.

Every layer, and a draw of each of its nulls (`draw_nulls`), is fitted and measured with raw Jacobians, with inputs in
units of their standard deviation, with outputs so, and with both; by `Log(0.1)`, and without outputs' units by
`GemanMcClure(0.3)`, too. What tells a layer from chance is the ratio of the odds of a small entry (below a tenth of the
rms in these units), trained against the strictest null; of a planted layer it is the mean |cos| of its directions.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from _networks import Case, Missing, cases
from _publish import publish
from _results import Results, described, read, start
from nulls import PAGE, ROOT
from rich.console import Console

import rotsparse as rs
from rotsparse._core.alignment import mean_max_cosine
from rotsparse._core.files import MARKDOWN, check_new_file, write_atomically
from rotsparse.evaluation.nulls import draw_nulls
from rotsparse.evaluation.units import units_of
from rotsparse.evaluation.verdict import EDGES, REWIRED, SHARE
from rotsparse.layers.base import Layer

LOG, GEMAN_MCCLURE = "Log(0.1)", "GemanMcClure(0.3)"
MEASURES = {LOG: rs.Log(0.1), GEMAN_MCCLURE: rs.GemanMcClure(0.3)}
UNITS = {
    "raw": {"scale_inputs": False, "scale_outputs": False},
    "inputs": {"scale_inputs": True, "scale_outputs": False},
    "outputs": {"scale_inputs": False, "scale_outputs": True},
    "both": {"scale_inputs": True, "scale_outputs": True},
}
COLUMNS = (*((units, LOG) for units in UNITS), ("raw", GEMAN_MCCLURE), ("inputs", GEMAN_MCCLURE))


@dataclasses.dataclass(frozen=True)
class Config:
    """Which units and measure set learned layers apart."""

    quick: bool = False
    """Fewer networks, examples and steps."""
    data: Path = ROOT.parent / "shared" / "data"
    """The folder with mnist, mlp_mnist, modular_addition, stories260k and text."""
    minilm: Path = ROOT.parent / "shared" / "data" / "minilm"
    """A Hugging Face folder of all-MiniLM-L6-v2."""
    only: tuple[str, ...] = ("addition", "digits", "planted", "MNIST, hidden 1 → logits", "modular addition 0",
                             "stories260K, MLP 0")  # fmt: skip
    """Networks whose names begin like one of these."""
    out: Path = Path("runs/benchmarks/units.json")
    """A JSON file for the figures; the table goes beside it, into a Markdown file of the same name. Networks that it
    has are not fitted again."""
    seed: int = 0
    examples: tuple[int, int] = (1000, 200)
    """To fit on, and to test on, at most."""
    steps: int = 500
    publish: bool = False
    """Put the table into docs/results.md."""


def run(case: Case, config: Config) -> dict[str, dict[str, Any]]:
    """For each column: small entries and edges@99 of the trained layer, the strictest null, small entries of each null,
    the ratio of the odds, and the alignment with planted directions, if there are any."""
    train, test = case.sampled(config.examples, config.seed)
    layer = case.layer
    nulls = draw_nulls(layer, train, key=jax.random.key(config.seed + 1), draws=1)
    found = {}
    for units, measure in COLUMNS:
        scales = UNITS[units]

        def metrics(layer: Layer, scales=scales, measure=measure) -> tuple[dict[str, float], rs.Rotations]:
            options: dict[str, Any] = {"measure": MEASURES[measure], "method": rs.Anneal(steps=config.steps)}
            options |= {name: case.options[name] for name in ("active_subspace",) if name in case.options}
            rotations = rs.find_rotations(layer, train, key=jax.random.key(config.seed), **options, **scales).rotations
            of = rs.evaluate(layer, test, rotations, key=jax.random.key(0), resamples=2,
                             **units_of(layer, train, **scales))  # fmt: skip
            return {metric: of[metric].value for metric in (SHARE, EDGES)}, rotations

        learned, rotations = metrics(layer)
        others = {name: metrics(draw)[0][SHARE] for name, (draw,) in nulls.items()}
        strictest = max(others, key=others.__getitem__)
        cell: dict[str, Any] = {"small": learned[SHARE], "edges": learned[EDGES], "strictest": strictest}
        cell |= {"nulls": others, "odds": _odds(learned[SHARE]) / _odds(others[strictest])}
        if case.truth is not None:
            sides = ((rotations.r_in, case.truth.r_in), (rotations.r_out, case.truth.r_out))
            cell["cosine"] = float(np.mean([mean_max_cosine(np.asarray(r), np.asarray(of)) for r, of in sides]))
        found[f"{units}, {measure}"] = cell
    return found


def _odds(share: float) -> float:
    return share / (1 - share)


def table(networks: dict[str, dict[str, Any]]) -> str:
    """In Markdown: a network a row, and in every cell "small entries | edges@99 | ratios of the odds"; of a planted one
    the mean |cos|, too. The first ratio is that against nulls whose weights are redrawn or shuffled, the second (where
    it differs) against those as well that re-pair neurons."""
    heads = [f"{units}, {measure}" for units, measure in COLUMNS]
    lines = [f"| layer | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for name, of in networks.items():
        lines.append(f"| {name} | {' | '.join(_cell(of['columns'][head]) for head in heads)} |")
    return "\n".join(lines) + "\n"


def _cell(of: dict[str, Any]) -> str:
    redrawn = max(share for null, share in of["nulls"].items() if null not in REWIRED)
    odds = _odds(of["small"]) / _odds(redrawn), of["odds"]
    words = [
        f"{of['small']:.3f}".lstrip("0"),
        f"{of['edges']:,.0f}",
        ", ".join(f"{o:.2f}" for o in dict.fromkeys(odds)),
    ]
    return " \\| ".join([*words, f"cos {of['cosine']:.3f}"] if "cosine" in of else words)


def main(config: Config) -> None:
    check_new_file(config.out.with_suffix(".md"), overwrite=True)
    console, results = Console(), Results(config)
    config = dataclasses.replace(config, only=config.only[:1], steps=200) if config.quick else config
    found: dict[str, Any] = read(config.out)["results"] if config.out.exists() else {}
    for name, load in cases(config.data, config.minilm, seed=config.seed, quick=config.quick):
        if name in found or not name.startswith(config.only):
            continue
        try:
            found[name] = {"provenance": results.provenance, "columns": run(load(), config)}
        except Missing as missing:
            console.print(f"SKIPPED {name}: {missing}", highlight=False)
            continue
        console.print(table({name: found[name]}), highlight=False, markup=False)
        results.write(found)
    if found:
        text = f"{table(found)}\n({results.form} form; {described([of['provenance'] for of in found.values()])})\n"
        if config.publish:
            publish(PAGE, "units", text)
        else:
            write_atomically(config.out.with_suffix(".md"), f"{MARKDOWN}{text}".encode())


if __name__ == "__main__":
    start(main, Config)
