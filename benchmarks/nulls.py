"""Claim: of the layers at hand, few are sparser than every null model, and the strictest null is rarely that of random
weights.

Every layer and three draws of each of its nulls (`draw_nulls`) are fitted alike, and `verdict.structure` judges: by the
share of the entries of held-out Jacobians below a tenth of their root mean square, of all entries and without the
strongest 1% of rows and columns.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
from _networks import Case, Missing, cases, smollm2
from _publish import publish
from _results import Results, described, start
from rich.console import Console

import rotsparse as rs
from rotsparse._core.files import MARKDOWN, check_new_file, write_atomically
from rotsparse.evaluation.control import Control, counted
from rotsparse.evaluation.fit_nulls import REDRAWS, measured
from rotsparse.evaluation.nulls import draw_nulls
from rotsparse.evaluation.verdict import EDGES, SHARE, WITHOUT_TOP, Structure, structure
from rotsparse.layers.base import Layer

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"
TRAINED = "trained"
METRICS = (SHARE, WITHOUT_TOP, EDGES)
SMOLLM2 = (0, 5, 10, 15, 20, 25, 29)


@dataclasses.dataclass(frozen=True)
class Config:
    """Layers against all of their nulls."""

    quick: bool = False
    """Fewer networks, examples and steps."""
    data: Path = ROOT.parent / "shared" / "data"
    """The folder with mnist, mlp_mnist, modular_addition, stories260k and text."""
    minilm: Path = ROOT.parent / "shared" / "data" / "minilm"
    """A Hugging Face folder of all-MiniLM-L6-v2."""
    smollm2: Path | None = None
    """Instead of these networks MLPs of SmolLM2-135M, a GGUF file (`make fetch-smollm2`): about 10 minutes each with
    --steps 150 --batch 4 --examples 4000 100."""
    site: Literal["input", "residual"] = "input"
    """Of SmolLM2: an MLP from its inputs, or from the stream in front of its norm, by a robust scale of the stream."""
    only: tuple[str, ...] = ()
    """Networks whose names begin like one of these."""
    out: Path = Path("runs/benchmarks/nulls.json")
    """A JSON file for the figures; the table goes beside it, into a Markdown file of the same name."""
    seed: int = 0
    examples: tuple[int, int] = (3000, 500)
    """To fit on, and to test on, at most."""
    steps: int = 2000
    batch: int = 16
    """Examples a step."""
    draws: int = REDRAWS
    """Draws of each null. One says where a null is at least as sparse; only several say where it is less."""
    scale_outputs: bool = False
    """Fit and measure with outputs in units of their standard deviation, too."""
    publish: bool = False
    """Put the table into docs/results.md."""


def run(case: Case, config: Config) -> Control | None:
    """The metrics of the trained layer and of every draw of every null; `None` where there are no nulls."""
    train, test = case.sampled(config.examples, config.seed)
    layer = case.layer
    nulls = draw_nulls(layer, train, key=jax.random.key(config.seed + 1), draws=config.draws)
    if not nulls:
        return None
    options: dict[str, Any] = {k: v for k, v in case.options.items() if k in ("scale_inputs", "active_subspace")}
    options["scale_outputs"] = config.scale_outputs

    def find(layer: Layer, null: str, number: int) -> rs.Rotations:
        key, method = jax.random.key(config.seed), rs.Anneal(steps=config.steps, batch_size=config.batch)
        return rs.find_rotations(layer, train, key=key, method=method, **options).completed().rotations

    found = measured(
        {TRAINED: [layer], **nulls}, train, test, find, scale_inputs=options.get("scale_inputs", True),
        scale_outputs=config.scale_outputs, key=jax.random.key(config.seed + 2),
    )  # fmt: skip
    return Control(found.pop(TRAINED)[0], found, f"{config.steps} steps")


def table(networks: dict[str, Control]) -> str:
    """In Markdown: a network a row, "small entries | without the strongest | edges@99" in every cell."""
    kinds = list(dict.fromkeys(kind for of in networks.values() for kind in of.nulls))
    lines = ["| layer | trained | " + " | ".join(kinds) + " | verdict |", "|---|" + "---:|" * (len(kinds) + 1) + "---|"]
    for name, of in networks.items():
        cells = [_shown({metric: of.learned[metric].value for metric in METRICS})]
        for kind in kinds:
            known = kind in of.nulls
            cells.append(_shown({m: of.another(kind, m).value for m in METRICS}) if known else "–")
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {_verdict(structure(of))} |")
    return "\n".join(lines) + "\n"


def _shown(values: dict[str, float]) -> str:
    return " \\| ".join(f"{value:,.0f}" if counted(m) else f"{value:.3f}".lstrip("0") for m, value in values.items())


def _verdict(found: Structure) -> str:
    if not found.missed:
        return f"structure; strictest: {found.strictest}"
    if found.learned:
        return "structure in the weights, not in their wiring"
    beaten, missed = ", ".join(found.beaten), ", ".join(found.missed)
    return f"beats {beaten}; not {missed}" if beaten else "nothing beyond chance"


def main(config: Config) -> None:
    check_new_file(config.out.with_suffix(".md"), overwrite=True)
    console, results = Console(), Results(config)
    config = dataclasses.replace(config, examples=(1000, 200), steps=600) if config.quick else config
    found: dict[str, Control] = {}
    networks = cases(config.data, config.minilm, seed=config.seed, quick=config.quick)
    if config.smollm2 is not None:
        networks = smollm2(config.data, config.smollm2, SMOLLM2, config.site)
    for name, load in networks:
        if config.only and not name.startswith(config.only):
            continue
        try:
            control = run(load(), config)
        except Missing as missing:
            console.print(f"SKIPPED {name}: {missing}", highlight=False)
            continue
        if control is None:
            console.print(f"SKIPPED {name}: this layer has no nulls", highlight=False)
            continue
        found[name] = control
        console.print(table({name: control}), highlight=False, markup=False)
        results.write({name: of.to_json() for name, of in found.items()})
    if found:
        source = f"({results.form} form; {described([results.provenance])})\n"
        text = f"{table(found)}\n{source}"
        if config.publish:
            publish(PAGE, "nulls" if config.smollm2 is None else "smollm2", text)
        elif results.out is not None:
            write_atomically(results.out.with_suffix(".md"), f"{MARKDOWN}{text}".encode())


if __name__ == "__main__":
    start(main, Config)
