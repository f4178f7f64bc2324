"""A trained MNIST network, 784-100-100-10 with ReLUs: which of its stages become sparse, which directions are found
again by another start, and which are news?

Stages are single layers and blocks of them: pixels to the first hidden layer, and so on, up to pixels to logits. The
ReLU that ends a stage pins its outputs to its neurons, and the Jacobian `diag(g) W` of a single layer shows the inputs
nothing but the rows of W: output directions of single layers should come out as neurons (a check of the method, no
discovery), and their input directions need not be determined. Blocks are asked whether two layers taken together
determine what one does not.

Pixels are seen through the principal components that hold a share `energy` of their variance (many pixels are always
zero), so "pixels" are coordinates in that subspace; the accuracy behind it is reported. Their entries are scaled by
standard deviations, those of the hidden layers are raw.

For one example alone the singular value decomposition of its Jacobian is the answer: a diagonal. What is that worth on
other examples, and how near does one rotation for all come to it?
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import _common
import jax
import jax.numpy as jnp
import numpy as np
from _verdict import judged
from matplotlib.figure import Figure
from safetensors.numpy import load_file

import rotsparse as rs
from rotsparse.data.moments import covariance
from rotsparse.evaluation.fit_nulls import REDRAWS
from rotsparse.evaluation.nulls import random_weights
from rotsparse.evaluation.verdict import SHARE
from rotsparse.layers.base import Layer

SPACES = ("pixels", "hidden 1", "hidden 2", "logits")
STAGES = {f"{SPACES[i]} → {SPACES[j]}": (i, j) for i, j in ((0, 1), (1, 2), (2, 3), (1, 3), (0, 2), (0, 3))}
SECOND, BLOCK = "hidden 1 → hidden 2", "hidden 1 → logits"
SAME = 0.99
"""From this |cos| on two directions are the same."""
SOURCE = (
    "The network is that of ApolloResearch/rib (MIT), rib_scripts/train_mlp/sample_checkpoints, as safetensors with "
    "its names kept (layers.0.W to layers.2.b, row-vector layout); mnist.npz holds train_x, train_y, test_x, test_y "
    "as uint8."
)


@dataclasses.dataclass(frozen=True)
class Config(_common.Options):
    """Rotations of every stage of an MNIST network."""

    data: Path = _common.DATA
    """The folder with mlp_mnist/model.safetensors and mnist/mnist.npz."""
    quick: bool = False
    """Fewer images, steps, stages and principal components: two minutes."""
    stages: tuple[str, ...] = tuple(STAGES)
    images: tuple[int, int, int] = (20000, 2000, 2000)
    """To fit on, to choose the restart on (both from the training images), and to test on (from the test images)."""
    energy: float = 0.95
    steps: int = 16000
    restarts: int = 4
    pixel_steps: int = 4000
    """Of the stages that begin at the pixels, which are wider; these have two restarts."""
    chain_steps: int = 4000
    """Of the three layers fitted as a chain, separately and jointly."""
    singles: int = 20
    """Images whose own singular vectors are tried on the others."""


def quick(config: Config) -> Config:
    return dataclasses.replace(
        config,
        stages=("pixels → hidden 1", SECOND, BLOCK),
        images=(2000, 500, 500),
        energy=0.9,
        steps=2000,
        restarts=2,
        pixel_steps=800,
        chain_steps=800,
        singles=5,
    )


class Block(Layer):
    """Layers one after the other, `J = J_k ⋯ J_2 J_1`."""

    layers: tuple[Layer, ...]

    def __init__(self, layers):
        self.layers = tuple(layers)

    @property
    def d_in(self) -> int:
        return self.layers[0].d_in

    @property
    def d_out(self) -> int:
        return self.layers[-1].d_out

    def __call__(self, x):
        return functools.reduce(lambda x, layer: layer(x), self.layers, x)

    def jacobian(self, x, r_in=None, r_out=None):
        first, *others = self.layers
        z = first.jacobian(x, r_in)
        for before, layer in zip(self.layers, others, strict=False):
            x = before(x)
            z = layer.jacobian(x, None, r_out if layer is others[-1] else None) @ z
        return z

    def rotate(self, r_in, r_out):
        first, *others, last = self.layers
        return Block((first.rotate(r_in, None), *others, last.rotate(None, r_out)))


class Network:
    """The trained network behind the active subspace of its pixels, and what enters each of its layers."""

    def __init__(self, config: Config):
        w = load_file(config.data / "mlp_mnist/model.safetensors")
        with np.load(config.data / "mnist/mnist.npz") as arrays:
            pixels = {s: arrays[f"{s}_x"].reshape(-1, 784).astype(np.float32) / 255 for s in ("train", "test")}
            labels = arrays["test_y"]
        mean, cov = covariance(pixels["train"])
        variances, axes = np.linalg.eigh(cov)
        share = np.cumsum(variances[::-1]) / variances.sum()
        self.frame = axes.T[::-1][: int(np.searchsorted(share, config.energy)) + 1].astype(np.float32)
        weights = [np.ascontiguousarray(w[f"layers.{i}.W"].T) for i in range(3)]
        biases = [w[f"layers.{i}.b"] for i in range(3)]
        kinds = ("relu", "relu", "identity")
        whole = [rs.Dense(w, b, activation=kind) for w, b, kind in zip(weights, biases, kinds, strict=True)]
        bias = (biases[0] + weights[0] @ mean).astype(np.float32)
        self.layers = (rs.Dense(weights[0] @ self.frame.T, bias), *whole[1:])
        coordinates = {s: ((x - mean) @ self.frame.T).astype(np.float32) for s, x in pixels.items()}
        self.accuracy = {
            "network": _accuracy(Block(whole), pixels["test"], labels),
            "active_subspace": _accuracy(Block(self.layers), coordinates["test"], labels),
        }
        fit, choose, test = config.images
        splits = coordinates["train"][:fit], coordinates["train"][fit : fit + choose], coordinates["test"][:test]
        self.inputs: list[list[np.ndarray]] = [list(splits)]
        for layer in self.layers[:-1]:
            self.inputs.append([np.asarray(layer(jnp.asarray(x))) for x in self.inputs[-1]])

    def stage(self, name: str) -> tuple[Layer, list[np.ndarray]]:
        """A stage as one layer, and its inputs to fit on, to choose on and to test on."""
        begin, end = STAGES[name]
        first, *others = self.layers[begin:end]
        if not others:
            return first, self.inputs[begin]
        if name == BLOCK:  # one hidden layer between linear maps: all nulls of an MLP
            (last,) = others
            return rs.MLP(first.w, first.b, last.w, last.b, activation="relu"), self.inputs[begin]
        return Block((first, *others)), self.inputs[begin]


def redrawn(layer: Layer, key) -> Layer:
    """`random_weights` of a stage, a block's layers one by one."""
    if isinstance(layer, Block):
        return Block(redrawn(each, jax.random.fold_in(key, i)) for i, each in enumerate(layer.layers))
    return random_weights(layer, key=key)


def study(network: Network, name: str, config: Config) -> tuple[dict[str, Any], rs.Solution]:
    """Everything about one stage."""
    layer, (x, choose, test) = network.stage(name)
    begin, end = STAGES[name]
    key = jax.random.key(config.seed)
    options = {
        "key": key,
        "scale_inputs": begin == 0,
        "method": rs.default_method(steps=config.steps if begin else config.pixel_steps),
        "restarts": config.restarts if begin else 2,
        "validation": choose,
    }
    solution = rs.find_rotations(layer, x, **options).completed()
    bases = {"learned": solution.rotations} | rs.baselines.all_baselines(layer, x, key=jax.random.fold_in(key, 2))
    scaled = {"scale_inputs": begin == 0, "covariance": covariance(x)[1]}
    comparison = rs.compare(layer, test, bases, **scaled, key=jax.random.fold_in(key, 3))
    nulls = None
    if isinstance(layer, Block):
        keys = jax.random.split(jax.random.fold_in(key, 1), REDRAWS)
        nulls = {"random weights": [redrawn(layer, each) for each in keys]}
    result = {
        "entries": layer.d_in * layer.d_out,
        **comparison.to_json(),
        **judged(
            layer, x, test, solution, comparison, key=jax.random.fold_in(key, 4), nulls=nulls, scale_inputs=begin == 0
        ),
        "held_out_objective": solution.candidate_values,
        # Where a side is a layer of ReLU neurons, how many of them are directions of the fit?
        "neurons": {
            side: int(np.sum(np.max(np.abs(np.asarray(r)), axis=1) > SAME))
            for side, r, space in (("in", solution.rotations.r_in, begin), ("out", solution.rotations.r_out, end))
            if space in (1, 2)
        },
        "seconds": solution.stats["seconds"],
    }
    if begin:
        result["single_examples"] = single_examples(layer, x[: config.singles], test, key=key)
    said = {k: round(result["metrics"]["learned"][k]["value"], 3) for k in ("edges_99", SHARE)}
    print(f"{name}: {said}, reproduced {result['reproduced']}, neurons {result['neurons']}", flush=True)
    return result, solution


def single_examples(layer: Layer, x, test, *, key) -> dict[str, float]:
    """The singular vectors of single examples: what they do to their own Jacobian, and to those of all others. Means
    over the examples; raw entries."""
    own, others = [], []
    for j in np.asarray(layer.jacobian(jnp.asarray(x))):
        left, singular, right = np.linalg.svd(j)
        square = np.square(singular) / np.square(singular).sum()
        above = np.count_nonzero(square * j.size >= 0.01)  # at least a tenth of the root mean square entry
        own.append((np.searchsorted(np.cumsum(square), 0.99) + 1, 1 - above / j.size))
        of = rs.evaluate(layer, test[:500], rs.Rotations(right, left.T), scale_inputs=False, key=key, resamples=2)
        others.append((of["edges_99"].value, of[SHARE].value))
    names = [f"{where}_{what}" for where in ("own", "others") for what in ("edges_99", SHARE)]
    return dict(zip(names, np.concatenate([np.mean(own, axis=0), np.mean(others, axis=0)]).tolist(), strict=True))


def chain(network: Network, config: Config) -> dict[str, Any]:
    """The three layers fitted one by one, and with shared rotations; inputs scaled by their standard deviations."""
    result: dict[str, Any] = {}
    x, _, test = network.inputs[0]
    key = jax.random.key(config.seed + 1)
    for name, joint in {"separate": False, "joint": True}.items():
        solution = rs.fit_chain(network.layers, x, key=key, joint=joint, method=rs.Anneal(steps=config.chain_steps))
        found = rs.evaluate_chain(network.layers, test, solution, key=key)
        shares = [
            rs.evaluate(layer, of[2], r, scale_inputs=True, covariance=covariance(of[0])[1], key=key)[SHARE]._asdict()
            for layer, of, r in zip(network.layers, network.inputs, rs.layer_rotations(solution), strict=True)
        ]
        result[name] = {"held_out_objective": found.values, "neurons": found.neuron_values, SHARE: shares}
        result[name] |= {"random": found.random_values, "matches": [str(match) for match in found.matches]}
        print(f"{name}: {found.summary()}", flush=True)
    return result


# --- what people read ---------------------------------------------------------------------------------------------


def figure(stages: dict[str, Any]) -> Figure:
    """The share of small entries of every stage: learned, its control, and bases that ignore the objective."""
    fig = Figure(figsize=(7.5, 3.6), dpi=160, layout="constrained")
    ax = fig.subplots()
    styles = {
        "learned": ("#d55e00", "o", "learned"),
        "short": ("#e8a56c", "o", "learned, short fit"),
        "null": ("#8a8a8a", "s", "the same, strictest null"),
        "best": ("#0072b2", "^", "best baseline"),
        "neurons": ("#222222", "x", "neurons"),
    }
    for i, of in enumerate(stages.values()):
        rivals = [m[SHARE] for name, m in of["metrics"].items() if name != "learned"]
        values = {"learned": of["metrics"]["learned"][SHARE], "short": of["short_fit"], "null": of["strictest_null"]}
        values |= {"best": max(rivals, key=lambda m: m["value"]), "neurons": of["metrics"]["neurons"][SHARE]}
        for (name, m), offset in zip(values.items(), (-0.2, -0.1, 0.0, 0.1, 0.2), strict=True):
            colour, marker, label = styles[name]
            error = [[m["value"] - m["low"]], [m["high"] - m["value"]]]
            label = label if i == 0 else None
            ax.errorbar(i + offset, m["value"], error, color=colour, marker=marker, ms=5, ls="", lw=1.2, label=label)
    ax.set_xticks(range(len(stages)), [name.replace(" → ", "\n→ ") for name in stages], fontsize=8)
    ax.set_ylabel("share of entries below 0.1 rms")
    ax.set_ylim(0, 1.03)
    _common.style(ax, grid="y")
    _common.legend_beside(ax)
    return fig


def pictures(network: Network, rotations: rs.Rotations) -> Figure:
    """The input directions of the first layer that move its outputs most, as images."""
    x = network.inputs[0][0]
    r_in = np.asarray(rotations.r_in)
    j = np.asarray(network.layers[0].jacobian(jnp.asarray(x[:500]), rotations.r_in, rotations.r_out))
    strength = np.sqrt(np.square(j).mean(axis=0).sum(axis=0)) * (x @ r_in.T).std(axis=0)
    fig = Figure(figsize=(8, 3.4), dpi=160, layout="constrained")
    for ax, i in zip(fig.subplots(3, 8).ravel(), np.argsort(-strength)[:24], strict=True):
        image = (r_in[i] @ network.frame).reshape(28, 28)
        limit = np.abs(image).max()
        ax.imshow(image, cmap="RdBu_r", vmin=-limit, vmax=limit)
        ax.set_axis_off()
    fig.suptitle("Input directions that the first layer responds to most", fontsize=10)
    return fig


def report(metrics: dict[str, Any]) -> str:
    """The results as Markdown."""
    network, subspace = metrics["accuracy"].values()
    lines = [
        "# MNIST",
        "",
        f"Accuracy {network:.4f}; behind the {metrics['pixels']} principal components {subspace:.4f}.",
    ]
    lines += ["", "| stage | basis | edges@99 | entries < 0.1 rms |", "|---|---|---:|---:|"]
    for name, of in metrics["stages"].items():
        rivals = {k: m for k, m in of["metrics"].items() if k != "learned"}
        best = max(rivals, key=lambda k: rivals[k][SHARE]["value"])
        rows = {"learned": of["metrics"]["learned"], f"best baseline: {best}": rivals[best]}
        rows |= {"PCA": rivals["pca"], "neurons": rivals["neurons"]}
        for basis, m in rows.items():
            cells = f"{_common.shown(m['edges_99'], 0)} | {_common.shown(m[SHARE])}"
            lines.append(f"| {name} ({of['entries']}) | {basis} | {cells} |")
        short, null = (_common.shown(of[which]) for which in ("short_fit", "strictest_null"))
        lines += [f"| | short fit | | {short} |", f"| | the same, {of['strictest']} | | {null} |"]
    lines += ["", "Single examples (raw): a mean over images of edges@99 and small entries in the image's own singular"]
    lines += ["vectors, of its own Jacobian, and of the other images'; and the learned basis, one for all:", ""]
    for name, of in metrics["stages"].items():
        if s := of.get("single_examples"):
            learned = of["metrics"]["learned"]
            lines.append(
                f"- {name}: own {s['own_edges_99']:.0f}, {s[f'own_{SHARE}']:.3f}; others {s['others_edges_99']:.0f}, "
                f"{s[f'others_{SHARE}']:.3f}; learned {learned['edges_99']['value']:.0f}, {learned[SHARE]['value']:.3f}"
            )
    lines += ["", f"Directions that all restarts found (|cos| > {SAME}), and those that are neurons:", ""]
    for name, of in metrics["stages"].items():
        again = ", ".join(f"{share:.0%} of '{side}'" for side, share in of["reproduced"].items())
        neurons = "; neurons: " + ", ".join(f"{k} of 100 '{side}'" for side, k in of["neurons"].items())
        lines.append(f"- {name}: {again}{neurons if of['neurons'] else ''}. {of['verdict']} {of['agreement']}")
    if {SECOND, BLOCK} <= set(metrics["stages"]):
        alone, both = (metrics["stages"][name]["reproduced"]["in"] for name in (SECOND, BLOCK))
        lines += [
            "",
            f"Input directions of hidden layer 1 that are found again: {alone:.0%} with the second layer alone,",
        ]
        lines += [f"{both:.0%} with the second and third taken together."]
    lines += [
        "",
        "Layers as a chain (inputs scaled), share of small entries layer by layer, and how sparse outputs match",
    ]
    lines += ["the next layer's sparse inputs:", ""]
    for name, of in metrics["chain"].items():
        lines.append(f"- {name}: " + ", ".join(map(_common.shown, of[SHARE])) + ". " + " ".join(of["matches"]))
    return "\n".join(lines) + "\n"


def _accuracy(layer: Layer, x, labels) -> float:
    return float(np.mean(np.argmax(np.asarray(layer(jnp.asarray(x))), axis=1) == labels))


def main(config: Config) -> None:
    _common.require([config.data / "mlp_mnist/model.safetensors", config.data / "mnist/mnist.npz"], SOURCE)
    config = quick(config) if config.quick else config
    with _common.run("mnist", config) as run:
        network = Network(config)
        studies = {name: study(network, name, config) for name in config.stages}
        metrics = {
            "accuracy": network.accuracy,
            "pixels": len(network.frame),
            "stages": {name: result for name, (result, _) in studies.items()},
            "chain": chain(network, config),
        }
        figures = {"small_entries": figure(metrics["stages"])}
        if "pixels → hidden 1" in studies:
            figures["directions"] = pictures(network, studies["pixels → hidden 1"][1].rotations)
        run.finish(metrics, report(metrics), **figures)


if __name__ == "__main__":
    _common.start(main, Config)
