"""A small language model that skips half of its MLP inputs: in which basis does that cost least? And do its MLPs have
Jacobians that rotate into sparse ones?

stories260K (a Llama-type model of five layers, d = 64, SwiGLU) in llama2.c's format. The vector that multiplies W_gate
and W_up is rotated (a rotation folds into both), all but its largest coordinates are set to zero in all five layers at
once, and the change of the cross-entropy is measured on held-out texts of the model's own and on real TinyStories.
Bases are fitted and chosen on other samples of the model: no text is needed for that, and no loss is looked at.

Jacobians: the share of entries below 0.1 rms (inputs scaled by their standard deviations) after `find_rotations`, on
held-out activations, beside that of the same layer with its weights redrawn at the same scale.
"""

import dataclasses
from pathlib import Path
from typing import Any

import _activation_bases
import _common
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from _activation_bases import METHODS, STYLES, Effort
from _verdict import against_nulls, figures
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import rotsparse as rs
from rotsparse import models
from rotsparse._core.intervals import Interval
from rotsparse.evaluation.nulls import random_perturbation
from rotsparse.evaluation.substitution import substitution
from rotsparse.evaluation.verdict import SHARE

SPARSITIES = (25, 40, 50, 60, 75)
"""Per cent of the coordinates that are set to zero."""
RULES = {"top_k": "", "threshold": "_threshold"}
"""Which coordinates stay, and what the names of the methods with that rule end in."""
BLOCK = 32
"""Tokens that are resampled together."""
END = "<|endoftext|>"
SOURCE = (
    "The model and its tokenizer are stories260K and tok512 of karpathy/llama2.c (MIT) in llama2.c's legacy format; "
    "ts_sample.txt is a sample of TinyStories, stories separated by <|endoftext|>."
)


@dataclasses.dataclass(frozen=True)
class Config(_common.Options):
    """Sparse activations and Jacobians of the MLPs of a small language model."""

    data: Path = _common.DATA
    """The folder with stories260k/stories260K.bin, stories260k/tok512.bin and text/ts_sample.txt."""
    quick: bool = False
    """Fewer samples, steps and controls: minutes."""
    samples: tuple[int, int, int] = (256, 64, 128)
    """Texts that the model writes to fit on, to choose on, and to test on."""
    length: int = 256
    """Tokens of each."""
    effort: Effort = Effort(steps=8000, batch=256)  # noqa: RUF009 (immutable)
    jacobian_examples: int = 1000
    """Activations to fit Jacobians on, and half as many to test on."""
    jacobian_steps: int = 2500
    controls: int = 3
    """Draws of each null."""


def quick(config: Config) -> Config:
    effort = Effort(steps=2000, batch=128)
    return dataclasses.replace(
        config,
        samples=(96, 24, 32),
        effort=effort,
        jacobian_examples=500,
        jacobian_steps=800,
        controls=1,
    )


class Network:
    """The model, the texts, and the MLP inputs of every layer."""

    def __init__(self, config: Config):
        folder = config.data / "stories260k"
        self.model = models.load_model(folder / "stories260K.bin")
        tokenizer = models.load_tokenizer(folder / "tok512.bin", self.model)
        self.params = jax.tree.map(jnp.asarray, self.model.params)
        self.layers = [models.mlp_layer(self.model, i) for i in range(self.model.config.n_layers)]
        key = jax.random.key(config.seed)
        begin = tokenizer.prefix[0]
        self.samples = [
            models.generate(self.model, np.full((n, 1), begin), config.length, key=jax.random.fold_in(key, i))
            for i, n in enumerate(config.samples)
        ]
        stories = (config.data / "text/ts_sample.txt").read_text(encoding="utf-8").split(END)
        encoded = [[begin, *tokenizer.encode(story.strip())] for story in stories if story.strip()]
        width = min(max(map(len, encoded)), self.model.config.max_positions)
        real, mask = np.zeros((len(encoded), width), int), np.zeros((len(encoded), width), bool)
        for i, story in enumerate(encoded):
            real[i, : len(story)], mask[i, : len(story)] = story[:width], True
        self.texts = {
            "model_samples": (self.samples[2], np.ones_like(self.samples[2], bool)),
            "real_text": (real, mask),
        }

    def inputs(self, tokens) -> list[np.ndarray]:
        """The MLP inputs of every layer, `[n, d]` each."""
        points = tuple((i, "input") for i in range(len(self.layers)))
        seen = _activation_bases.captured(self.params, self.model.config, tokens, points)
        return [np.asarray(x).reshape(-1, x.shape[-1]) for x in seen]

    def cross_entropy(self, text: str, bases=None, keeps=None, key=None) -> np.ndarray:
        """Nats of every token that is there, in order; with `bases`, every MLP reads what `keeps` leave of its input,
        or, with a key, an input that is as far from the true one in a random direction."""
        tokens, mask = self.texts[text]
        nats = _nats(self.params, self.model.config, tokens, bases, keeps, key)
        return np.asarray(nats)[mask[:, 1:]]

    def blocks(self, text: str) -> np.ndarray:
        """Which block of neighbouring tokens each of them is in."""
        mask = self.texts[text][1][:, 1:]
        rows, columns = np.nonzero(mask)
        return rows * mask.shape[1] + columns // BLOCK


@eqx.filter_jit
def _nats(params, config, tokens, bases, keeps, key):
    def replaced(i):
        def intervention(x):
            z = keeps[i](x @ bases[i].T) @ bases[i]
            return z if key is None else random_perturbation(x, z, key=jax.random.fold_in(key, i))

        return intervention

    intervene = {} if bases is None else {(i, "input"): replaced(i) for i in range(len(bases))}
    return models.cross_entropy(models.run(params, config, tokens, intervene=intervene)[0], tokens)


def activations(network: Network, config: Config) -> dict[str, Any]:
    """Fit every method's bases, and what top-k substitution costs in each."""
    train, held_out, test = (network.inputs(tokens) for tokens in network.samples)
    key = jax.random.key(config.seed + 1)
    bases, chosen = [], []
    for i, x in enumerate(train):
        found, choice = _activation_bases.fit(x, held_out[i], config.effort, key=jax.random.fold_in(key, i))
        bases.append(found)
        chosen.append(choice)
        print(f"layer {i}: {choice}")
    result: dict[str, Any] = {"chosen": chosen, "cross_entropy": {}, "delta_ce": {}}
    result |= {"ours_over_pca": {}, "delta_ce_random_direction": {}}
    for text in network.texts:
        plain = network.cross_entropy(text)
        result["cross_entropy"][text] = float(plain.mean())
        result["delta_ce"][text] = {str(s): {} for s in SPARSITIES}
        result["ours_over_pca"][text] = {}
        for s in SPARSITIES:
            changes = {m: network.cross_entropy(text, *_keepers(m, held_out, bases, s)) - plain for m in METHODS}
            for method, change in changes.items():
                result["delta_ce"][text][str(s)][method] = _interval(network, text, change, config)
            result["ours_over_pca"][text][str(s)] = {
                rule: _interval(network, text, changes["ours" + suffix], config, relative_to=changes["pca" + suffix])
                for rule, suffix in RULES.items()
            }
        # Is the loss explained by the size of the error alone?
        result["delta_ce_random_direction"][text] = {
            method: _interval(
                network, text, network.cross_entropy(text, *_keepers(method, held_out, bases, 50), key) - plain, config
            )
            for method in ("none", "pca", "ours")
        }
    result["layers"] = [
        {
            method: substitution(
                test[i], *_activation_bases.keeper(method, held_out[i], bases[i], 0.5), layer=layer
            )._asdict()
            for method in METHODS
        }
        for i, layer in enumerate(network.layers)
    ]
    return result


def _keepers(method, held_out, bases, sparsity):
    pairs = [_activation_bases.keeper(method, x, b, sparsity / 100) for x, b in zip(held_out, bases, strict=True)]
    return [jnp.asarray(r) for r, _ in pairs], [keep for _, keep in pairs]


def _interval(network: Network, text: str, change, config: Config, relative_to=None) -> dict[str, float]:
    key = jax.random.key(config.seed + 2)
    return _activation_bases.mean_interval(change, network.blocks(text), relative_to, key=key)._asdict()


def jacobians(network: Network, config: Config) -> list[dict[str, Any]]:
    """For every MLP: the held-out share of Jacobian entries below 0.1 rms, learned, in the bases that ignore the
    objective, and of shorter fits of the layer and its nulls; and the conclusion."""
    rng = np.random.default_rng(config.seed)
    n = config.jacobian_examples
    train = [x[rng.choice(len(x), n, replace=False)] for x in network.inputs(network.samples[0])]
    test = [x[rng.choice(len(x), n // 2, replace=False)] for x in network.inputs(network.samples[2])]
    return [
        _jacobian(i, layer, train[i], test[i], config, key=jax.random.fold_in(jax.random.key(config.seed + 3), i))
        for i, layer in enumerate(network.layers)
    ]


def _jacobian(index, layer, x, x_test, config, *, key) -> dict[str, Any]:
    def share(layer, rotations) -> Interval:
        covariance = np.cov(x.astype(np.float64), rowvar=False)
        return rs.evaluate(layer, x_test, rotations, scale_inputs=True, covariance=covariance, key=key)[SHARE]

    b, method = rs.baselines, rs.default_method(steps=config.jacobian_steps)
    learned = rs.find_rotations(layer, x, key=key, method=method).completed().rotations
    svd = {"svd_weights": b.svd_weights, "svd_mean_jacobian": b.svd_mean_jacobian}
    svd |= {"svd_mean_jacobian_weighted": b.svd_mean_jacobian_weighted}
    found = {"learned": share(layer, learned), "neurons": share(layer, b.neurons(layer, x))}
    found |= {name: share(layer, baseline(layer, x)) for name, baseline in svd.items()}
    judged = against_nulls(layer, x, x_test, key=jax.random.fold_in(key, 10), draws=config.controls)
    conclusion = f"layer {index}: {judged.sentence()}"
    print(conclusion)
    return {
        **{name: interval._asdict() for name, interval in found.items()},
        **figures(judged),
        "structure": judged.learned,
        "conclusion": conclusion,
    }


# --- what people read ---------------------------------------------------------------------------------------------


def curves(delta_ce: dict[str, Any]) -> Figure:
    """The rise in cross-entropy against sparsity, a panel for each text."""
    figure = Figure(figsize=(9, 3.6), dpi=160, layout="constrained")
    titles = {"model_samples": "Held-out samples of the model", "real_text": "Real TinyStories"}
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (text, of) in zip(axes, delta_ce.items(), strict=True):
        for method, label in METHODS.items():
            values = np.array([[of[str(s)][method][k] for k in ("value", "low", "high")] for s in SPARSITIES])
            colour, dash = STYLES[method]
            width = 2.6 if method == "ours" else 1.4
            ax.plot(SPARSITIES, values[:, 0], color=colour, ls=dash, lw=width, label=label, marker="o", ms=3)
            ax.fill_between(SPARSITIES, np.maximum(values[:, 1], 1e-4), values[:, 2], color=colour, alpha=0.12, lw=0)
        _log_axis(ax, titles[text])
    axes[0].set_ylabel("rise in cross-entropy (nats a token)")
    _common.legend_beside(axes[-1])
    return figure


def _log_axis(ax: Axes, title: str) -> None:
    ax.set_yscale("log")
    ax.set_ylim(bottom=1e-3)
    ax.set_xticks(SPARSITIES)
    ax.set_xlabel("coordinates set to zero, %")
    _common.style(ax, title)


def small_entries(layers: list[dict[str, Any]]) -> Figure:
    """The share of small Jacobian entries of every layer, learned beside its controls."""
    figure = Figure(figsize=(6.5, 3.2), dpi=160, layout="constrained")
    ax = figure.subplots()
    styles = {
        "learned": ("#d55e00", "o", "learned"),
        "short_fit": ("#e8a56c", "o", "learned, short fit"),
        "strictest_null": ("#8a8a8a", "s", "the same, strictest null"),
        "svd": ("#0072b2", "^", "best SVD"),
        "neurons": ("#222222", "x", "neurons"),
    }
    for offset, (name, (colour, marker, label)) in zip((-0.2, -0.1, 0.0, 0.1, 0.2), styles.items(), strict=True):
        for i, of in enumerate(layers):
            best_svd = max((of[k] for k in of if k.startswith("svd")), key=lambda m: m["value"])
            m = best_svd if name == "svd" else of[name]
            error = [[m["value"] - m["low"]], [m["high"] - m["value"]]]
            ax.errorbar(i + offset, m["value"], error, color=colour, marker=marker, ms=5, lw=1.2, label=label)
    handles, labels = ax.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    _common.legend_beside(ax, list(unique.values()), list(unique))
    ax.set_xticks(range(len(layers)))
    ax.set_xlabel("layer")
    ax.set_ylabel("share of entries below 0.1 rms")
    ax.set_ylim(bottom=0)
    _common.style(ax, grid="y")
    return figure


def report(metrics: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["# stories260K", "", "Rise in cross-entropy (nats a token; half the 95% interval) with the MLP inputs of"]
    lines += ["all five layers cut to their largest rotated coordinates.", ""]
    for text, of in metrics["delta_ce"].items():
        lines += [f"## {text.replace('_', ' ')} (cross-entropy {metrics['cross_entropy'][text]:.3f})", ""]
        lines += ["| zeros | " + " | ".join(METHODS.values()) + " |", "|---:|" + "---:|" * len(METHODS)]
        for s in SPARSITIES:
            cells = [_common.shown(m, 4) for m in of[str(s)].values()]
            lines.append(f"| {s}% | " + " | ".join(cells) + " |")
        ratio = metrics["ours_over_pca"][text]
        for rule in RULES:
            half, quarter = (ratio[s][rule] for s in ("50", "25"))
            lines += [
                "",
                f"Ours / PCA, both with {rule.replace('_', '-')}: {_range(half)} at 50% (wanted: at most 0.5), "
                f"{_range(quarter)} at 25% (wanted: at most 1).",
            ]
        lines += [""]
        random = metrics["delta_ce_random_direction"][text]
        lines += [
            "Errors of the same size at 50% in random directions: "
            + ", ".join(f"{METHODS[m]} {v['value']:.3f}" for m, v in random.items())
            + ".",
            "",
        ]
    shown = ("none", "pca", "log", "ours")
    lines += ["## Layer by layer at 50%, held-out samples: energy lost (output error)", ""]
    lines += ["| layer | " + " | ".join(METHODS[m] for m in shown) + " |", "|---:|" + "---:|" * len(shown)]
    for i, layer in enumerate(metrics["layers"]):
        cells = [f"{layer[m]['energy_lost']:.4f} ({layer[m]['output_error']:.4f})" for m in shown]
        lines.append(f"| {i} | " + " | ".join(cells) + " |")
    lines += ["", "Zeros that the thresholds for 50% leave on held-out samples, all layers: "]
    achieved = {m: np.mean([layer[m]["sparsity"] for layer in metrics["layers"]]) for m in METHODS if "threshold" in m}
    lines[-1] += ", ".join(f"{METHODS[m]} {share:.1%}" for m, share in achieved.items()) + "."
    lines += ["", "## Jacobians of the MLPs", ""] + [f"- {layer['conclusion']}" for layer in metrics["jacobians"]]
    return "\n".join(lines) + "\n"


def _range(m: dict[str, float]) -> str:
    return f"{m['value']:.2f} ({m['low']:.2f} to {m['high']:.2f})"


def main(config: Config) -> None:
    _common.require([config.data / "stories260k" / name for name in ("stories260K.bin", "tok512.bin")], SOURCE)
    _common.require([config.data / "text/ts_sample.txt"], SOURCE)
    config = quick(config) if config.quick else config
    with _common.run("stories260k", config) as run:
        network = Network(config)
        metrics: dict[str, Any] = {**activations(network, config), "jacobians": jacobians(network, config)}
        figures = {"delta_ce": curves(metrics["delta_ce"]), "jacobians": small_entries(metrics["jacobians"])}
        run.finish(metrics, report(metrics), **figures)


if __name__ == "__main__":
    _common.start(main, Config)
