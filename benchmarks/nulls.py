"""Claim: of the layers at hand, few are sparser than every null model, and the strictest null is rarely that of random
weights.

Every layer and three draws of each of its nulls (random weights, the same with activity rates matched, the same
spectrum, hidden neurons re-paired) are fitted alike. What counts is the share of the entries of held-out Jacobians
below a tenth of a root mean square: that of all entries, and, so that one large row cannot decide, that of each row.
± is half the 95% prediction interval of one more draw.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from _networks import Case, Missing, cases
from _results import Results, described
from rich.console import Console

import rotsparse as rs
from rotsparse._core.files import MARKDOWN, check_new_file, write_atomically
from rotsparse._core.intervals import Interval
from rotsparse._core.modules import replace_fields
from rotsparse.data.moments import covariance
from rotsparse.evaluation.nulls import random_weights, rate_matched, re_paired, same_spectrum
from rotsparse.evaluation.verdict import another_redraw
from rotsparse.layers.activations import identity
from rotsparse.layers.base import Layer
from rotsparse.layers.jacobians import jacobians

ROOT = Path(__file__).resolve().parents[1]
TRAINED = "trained"
DRAWS = 3


@dataclasses.dataclass(frozen=True)
class Config:
    """Layers against all of their nulls."""

    quick: bool = False
    """Fewer networks, examples and steps."""
    data: Path = ROOT.parent / "shared" / "data"
    """The folder with mnist, mlp_mnist, modular_addition, stories260k and text."""
    minilm: Path = ROOT.parent / "shared" / "data" / "minilm"
    """A Hugging Face folder of all-MiniLM-L6-v2."""
    only: tuple[str, ...] = ()
    """Networks whose names begin like one of these."""
    out: Path = Path("runs/benchmarks/nulls.json")
    """A JSON file for the figures; the table goes beside it, into a Markdown file of the same name."""
    seed: int = 0
    examples: tuple[int, int] = (3000, 500)
    """To fit on, and to test on, at most."""
    steps: int = 2000


def one_block(layer: Layer) -> Layer:
    """Two single layers one after the other, the second of them linear, as the MLP block that they are."""
    match getattr(layer, "layers", ()):
        case (rs.Dense() as first, rs.Dense(activation=last) as second) if last is identity and first.norm is None:
            return replace_fields(rs.MLP(first.w, first.b, second.w, second.b), activation=first.activation)
    return layer


def nulls_of(layer: Layer, x: np.ndarray, key) -> dict[str, list[Layer]]:
    """Some draws of every null that the layer has."""
    kinds: dict[str, Any] = {
        "random weights": lambda k: random_weights(layer, key=k),
        "rates matched": lambda k: rate_matched(layer, x, key=k),
        "same spectrum": lambda k: same_spectrum(layer, key=k),
        "re-paired": lambda k: re_paired(layer, key=k),
    }
    if not layer.weights().keys() & {"w_out", "w_down"}:  # outputs are neurons: nothing to re-pair
        del kinds["re-paired"]
    return {name: [draw(k) for k in jax.random.split(key, DRAWS)] for name, draw in kinds.items()}


def small_entries(layer: Layer, train: np.ndarray, test: np.ndarray, options: dict[str, Any]) -> tuple[float, float]:
    """After a fit: the share of held-out entries below 0.1 rms of all entries, and below 0.1 rms of their row."""
    r = rs.find_rotations(layer, train, **options).completed().rotations
    r_in, r_out = np.asarray(r.r_in, np.float64), np.asarray(r.r_out, np.float64)
    scales = np.ones(layer.d_in)
    if options.get("scale_inputs", True):
        scales = np.sqrt(np.maximum(np.einsum("ij,jk,ik->i", r_in, covariance(train)[1], r_in), 0))
    scaled = (r_in * scales[:, None]).astype(np.float32)
    energy = sum(np.square(z, dtype=np.float64).sum(axis=0) for z in jacobians(layer, test, scaled, r_out))
    energy = energy / len(test)
    row = np.sqrt(np.maximum(energy.mean(axis=1), np.finfo(float).tiny))[None, :, None]
    below = [0, 0]
    for z in jacobians(layer, test, scaled, r_out):
        for i, rms in enumerate((np.sqrt(energy.mean()), row)):
            below[i] += int(np.count_nonzero(np.abs(z) < 0.1 * rms))
    entries = len(test) * layer.d_in * layer.d_out
    return below[0] / entries, below[1] / entries


def run(case: Case, config: Config) -> dict[str, list[tuple[float, float]]]:
    """Both shares of the trained layer and of every draw of every null."""
    rng = np.random.default_rng(config.seed)
    fitted, tested = config.examples
    train, test = (x[rng.permutation(len(x))[:count]] for x, count in ((case.train, fitted), (case.test, tested)))
    trained = one_block(case.layer)
    options = {k: v for k, v in case.options.items() if k in ("scale_inputs", "active_subspace")}
    options |= {"key": jax.random.key(config.seed), "method": rs.Anneal(steps=config.steps)}
    of = {TRAINED: [trained], **nulls_of(trained, train, jax.random.key(config.seed + 1))}
    return {name: [small_entries(layer, train, test, options) for layer in layers] for name, layers in of.items()}


def table(networks: dict[str, dict[str, list[tuple[float, float]]]]) -> str:
    """In Markdown: a network a row, "all entries | row by row" in every cell."""
    kinds = list(dict.fromkeys(kind for of in networks.values() for kind in of))
    lines = ["| network | " + " | ".join(kinds) + " |", "|---|" + "---:|" * len(kinds)]
    for name, of in networks.items():
        cells = []
        for kind in kinds:
            shares = np.array(of.get(kind, []))
            cells.append(" \\| ".join(_shown(column) for column in shares.T) if len(shares) else "–")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _shown(shares: np.ndarray) -> str:
    if len(shares) == 1:
        return f"{shares[0]:.3f}"
    m = another_redraw([Interval(float(s), float(s), float(s)) for s in shares])
    return f"{m.value:.3f} ±{(m.high - m.low) / 2:.3f}"


def main(config: Config) -> None:
    console, results = Console(), Results(config)
    check_new_file(config.out.with_suffix(".md"), overwrite=True)
    config = dataclasses.replace(config, examples=(1000, 200), steps=600) if config.quick else config
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, load in cases(config.data, config.minilm, seed=config.seed, quick=config.quick):
        if config.only and not name.startswith(config.only):
            continue
        try:
            found[name] = run(load(), config)
        except Missing as missing:
            console.print(f"SKIPPED {name}: {missing}", highlight=False)
            continue
        console.print(table({name: found[name]}), highlight=False, markup=False)
        results.write(found)
    if found:
        source = f"\n({results.form} form; {described([results.provenance])})\n"
        write_atomically(config.out.with_suffix(".md"), f"{MARKDOWN}{table(found)}{source}".encode())


if __name__ == "__main__":
    main(tyro.cli(Config))
