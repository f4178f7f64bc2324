"""Question: does what the Jacobian says of small changes hold for finite ones? How many output directions does an input
direction move, and had the Jacobian named them?

Of every basis, for moves of single input directions by 0.25 to 2 of their standard deviations: how many output
directions move by more than a tenth of theirs, and what the Jacobian had named (`named_effects`). Two of the bases are
learned: with inputs scaled, as by default, and with outputs scaled, too.
"""

import dataclasses
from pathlib import Path

import jax
from _networks import Case, Missing, cases
from _publish import publish
from _results import Results, described, start
from nulls import PAGE, ROOT
from rich.console import Console

import rotsparse as rs
from rotsparse._core.files import MARKDOWN, PNG, check_new_file, write_atomically, writing
from rotsparse.evaluation.finite_effects import NamedEffects, named_effects
from rotsparse.evaluation.names import basis_name

SIZES = (0.25, 0.5, 1.0, 2.0)
SCALED = "learned, outputs scaled"
COLOURS = {"learned": "#0072b2", SCALED: "#56b4e9", "neurons": "#999999", "pca": "#d55e00", "sparse_weights": "#009e73"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Finite moves of single directions, in five bases."""

    quick: bool = False
    """Fewer networks, examples and steps."""
    data: Path = ROOT.parent / "shared" / "data"
    """The folder with mnist, mlp_mnist, modular_addition, stories260k and text."""
    minilm: Path = ROOT.parent / "shared" / "data" / "minilm"
    """A Hugging Face folder of all-MiniLM-L6-v2."""
    only: tuple[str, ...] = ("addition", "stories260K, MLP 0")
    """Networks whose names begin like one of these."""
    out: Path = Path("runs/benchmarks/finite_moves.json")
    """A JSON file for the figures; the table goes beside it, into a Markdown file of the same name, and the curves into
    a picture."""
    seed: int = 0
    examples: tuple[int, int] = (2000, 200)
    """To fit on, and to move, at most."""
    steps: int = 2000
    publish: bool = False
    """Put the table into docs/results.md, and the picture beside it."""


def run(case: Case, config: Config) -> dict[str, list[NamedEffects]]:
    """What moves in every basis, for every size."""
    train, test = case.sampled(config.examples, config.seed)
    layer, key = case.layer, jax.random.key(config.seed)

    def learned(scale_outputs: bool) -> rs.Rotations:
        method = rs.Anneal(steps=config.steps)
        return rs.find_rotations(layer, train, key=key, method=method, scale_outputs=scale_outputs).rotations

    bases = {
        "learned": learned(False),
        SCALED: learned(True),
        "neurons": rs.Rotations.identity(layer.d_in, layer.d_out),
        "pca": rs.baselines.pca(layer, train),
        "sparse_weights": rs.baselines.sparse_weights(layer, train),
    }
    return {name: named_effects(layer, test, r, sizes=SIZES) for name, r in bases.items()}


def table(networks: dict[str, dict[str, list[NamedEffects]]]) -> str:
    """In Markdown: a basis a row, "share of outputs that move | of these named | of the named moving" for each size."""
    heads = " | ".join(f"moved by {size:g} sd" for size in SIZES)
    lines = [f"| layer | basis | named | {heads} |", "|---|---|" + "---:|" * (1 + len(SIZES))]
    for name, bases in networks.items():
        for basis, of in bases.items():
            cells = " | ".join(_shown(e.moved, e.named_of_moved, e.moved_of_named) for e in of)
            lines.append(f"| {name} | {basis_name(basis)} | {_shown(of[0].named)} | {cells} |")
    return "\n".join(lines) + "\n"


def _shown(*shares: float) -> str:
    return " \\| ".join(f"{share:.3f}".lstrip("0") for share in shares)


def draw(path: Path, networks: dict[str, dict[str, list[NamedEffects]]]) -> None:
    """The share of output directions that move, and the share of these that the Jacobian had named, against size."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(3.4 * len(networks), 4.6), layout="constrained")
    axes = drawn.subplots(2, len(networks), sharex=True, sharey="row", squeeze=False)
    for column, (name, bases) in zip(axes.T, networks.items(), strict=True):
        for basis, of in bases.items():
            for ax, values in zip(column, ([e.moved for e in of], [e.named_of_moved for e in of]), strict=True):
                ax.plot(SIZES, values, "o-", ms=3, color=COLOURS[basis], label=basis_name(basis))
        column[0].set_title(name, fontsize=10)
        column[1].set(xscale="log", xticks=SIZES, xticklabels=[f"{s:g}" for s in SIZES], xlabel="moved by (sd)")
        column[1].minorticks_off()
        for ax in column:
            ax.set_ylim(0, 1)
            ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("outputs that move")
    axes[1, 0].set_ylabel("of these, named")
    drawn.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    with writing(path) as file:
        drawn.savefig(file, format="png", dpi=150, metadata=PNG)


def main(config: Config) -> None:
    check_new_file(config.out.with_suffix(".md"), overwrite=True)
    console, results = Console(), Results(config)
    config = dataclasses.replace(config, only=config.only[:1], steps=300) if config.quick else config
    found: dict[str, dict[str, list[NamedEffects]]] = {}
    for name, load in cases(config.data, config.minilm, seed=config.seed, quick=config.quick):
        if not name.startswith(config.only):
            continue
        try:
            found[name] = run(load(), config)
        except Missing as missing:
            console.print(f"SKIPPED {name}: {missing}", highlight=False)
            continue
        console.print(table({name: found[name]}), highlight=False, markup=False)
        plain = {n: {b: [e._asdict() for e in of] for b, of in bases.items()} for n, bases in found.items()}
        results.write(plain)
    if found:
        text = f"{table(found)}\n({results.form} form; {described([results.provenance])})\n"
        if config.publish:
            publish(PAGE, "finite", text)
            draw(PAGE.with_name("finite_moves.png"), found)
        else:
            write_atomically(config.out.with_suffix(".md"), f"{MARKDOWN}{text}".encode())
            draw(config.out.with_suffix(".png"), found)


if __name__ == "__main__":
    start(main, Config)
