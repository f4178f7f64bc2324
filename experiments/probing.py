"""Are the directions of a fit more meaningful than those of other bases? Measured, by names that need no judge.

Sparse probes (`evaluation.probing`): how well do 1, 2 or 5 directions of a basis tell, on held-out examples, whether an
image shows a 3, whether a wave of the numbers is high, or whether a token begins a word? The same for neurons, PCA,
ICA, varimax and random rotations, and for twins: the same fit, on the same inputs, of a layer with redrawn weights. All
bases of a space hold the same information, and a fit may look meaningful where nothing was learned: a basis counts as
more meaningful by its lead over its twins.

And an intruder test without a judge (`evaluation.intruder`): are the top examples of a direction more alike than those
of its twins and of random directions? By their token, by the model's last hidden state behind it, or by the image.
"""

import dataclasses
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import _common
import jax
import jax.numpy as jnp
import mnist
import numpy as np
from matplotlib.figure import Figure

import rotsparse as rs
from rotsparse import models
from rotsparse.evaluation.intruder import intruder_rates
from rotsparse.evaluation.nulls import random_weights
from rotsparse.evaluation.probing import SIZES, probe_table
from rotsparse.examples import addition, digits

BASES = ("learned", "twin", "neurons", "pca", "ica", "varimax", "haar")
STORIES = ("stories260k/stories260K.bin", "stories260k/tok512.bin")
MNIST = ("mlp_mnist/model.safetensors", "mnist/mnist.npz")
MNIST_IMAGES = 4000
SOURCE = f"The model and its tokenizer are stories260K and tok512 of karpathy/llama2.c (MIT). {mnist.SOURCE}"


@dataclasses.dataclass(frozen=True)
class Config(_common.Options):
    """Sparse probes of learned directions, of their twins' and of other bases'."""

    data: Path = _common.DATA
    """The folder with stories260k/stories260K.bin, stories260k/tok512.bin, mlp_mnist and mnist."""
    quick: bool = False
    """Fewer steps, a single twin, one layer: minutes."""
    steps: int = 4000
    twins: int = 3
    layers: tuple[int, ...] = (0, 2, 4)
    texts: int = 96
    """That the model writes, of 256 tokens each."""


class Subject(NamedTuple):
    """A layer, its inputs for training and held out, and labels of both for the side that they are about."""

    layer: rs.Layer
    train: np.ndarray
    test: np.ndarray
    labels: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]
    # What held-out examples are compared by in the intruder test, and the text of each.
    vectors: dict[str, np.ndarray] = {}
    texts: np.ndarray = np.zeros(0, int)


def read_digits(config: Config) -> Subject:
    """The block from hidden layer 1 to the logits of a network that reads digits; is it a 0, a 1, ...?"""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    network = digits.train(config.seed)
    first, second, third = network.layers
    layer = rs.MLP(second.w, second.b, third.w, third.b, activation="relu")
    target = load_digits(return_X_y=True)[1]
    y, y_test = (
        np.asarray(part) for part in train_test_split(target, test_size=0.2, random_state=config.seed, stratify=target)
    )
    labels = {str(digit): (y == digit, y_test == digit) for digit in range(10)}
    x, x_test = (np.asarray(first(jnp.asarray(of))) for of in (network.train, network.test))
    images = network.test - network.train.mean(axis=0)
    return Subject(layer, x, x_test, {"in": labels}, {"image": images}, np.arange(len(x_test)))


def read_mnist(config: Config) -> Subject:
    """The block from hidden layer 1 to the logits of the MNIST network; is it a 0, a 1, ...?"""
    network = mnist.Network(mnist.Config(data=config.data))
    _, second, third = network.layers
    layer = rs.MLP(second.w, second.b, third.w, third.b, activation="relu")
    x, _, x_test = (of[:MNIST_IMAGES] for of in network.inputs[1])
    with np.load(config.data / MNIST[1]) as arrays:
        y, y_test = arrays["train_y"][: len(x)], arrays["test_y"][: len(x_test)]
    labels = {str(digit): (y == digit, y_test == digit) for digit in range(10)}
    images = network.inputs[0][2][:MNIST_IMAGES]  # around the mean image
    return Subject(layer, x, x_test, {"in": labels}, {"image": images}, np.arange(len(x_test)))


def add_numbers(config: Config) -> Subject:
    """The MLP of a network that adds modulo 59; is the wave of a frequency high at a and b, or at their sum?"""
    network = addition.train(config.seed)
    pairs = np.stack(np.divmod(np.random.default_rng(config.seed).permutation(59**2), 59), axis=1)
    parts = pairs[: len(network.train)], network.unseen
    labels: dict[str, dict[str, Any]] = {"in": {}, "out": {}}
    for k in range(1, 30):
        for name, shift in (("cos", 0.0), ("sin", np.pi / 2)):
            waves = [np.cos(2 * np.pi * k * of / 59 - shift) for of in parts]
            labels["in"][f"{name} {k}"] = tuple(wave.sum(axis=1) > 0 for wave in waves)
            labels["out"][f"{name} {k}"] = tuple(
                np.cos(2 * np.pi * k * of.sum(axis=1) / 59 - shift) > 0 for of in parts
            )
    return Subject(network.layer, network.train, network.test, labels)


def read_stories(config: Config) -> dict[str, Subject]:
    """MLPs of stories260K, on texts that it writes; what is the token, what was the one before, where is it?"""
    model_file, tokenizer_file = (config.data / name for name in STORIES)
    model = models.load_model(model_file)
    tokenizer = models.load_tokenizer(tokenizer_file, model)
    start = np.full((config.texts, 1), tokenizer.prefix[0])
    tokens = models.generate(model, start, 256, key=jax.random.key(config.seed))
    with tempfile.TemporaryDirectory() as place:
        np.save(f"{place}/tokens.npy", tokens)
        source = models.TokenFile(f"{place}/tokens.npy")
        points = [(layer, "input") for layer in config.layers]
        stores = models.capture(model, source, points, f"{place}/store", length=256)
        inputs = [store.read(range(len(store))) for store in stores]
    border = len(inputs[0]) - len(inputs[0]) // 5
    words = [tokenizer.decode([tokenizer.encode("a")[-1], t])[1:] for t in range(model.config.vocab_size)]
    labels = {n: (of[:border], of[border:]) for n, of in text_labels(tokens, words).items()}
    found = {}
    _, seen = models.run(model.params, model.config, tokens, capture=((model.config.n_layers - 1, "residual"),))
    (last,) = (np.asarray(of).reshape(-1, of.shape[-1])[border:] for of in seen.values())
    vectors = {"token": np.eye(model.config.vocab_size, dtype=np.float32)[tokens.ravel()[border:]]}
    vectors["hidden state"] = last - last.mean(axis=0)
    texts = np.repeat(np.arange(len(tokens)), tokens.shape[1])[border:]
    for layer, x in zip(config.layers, inputs, strict=True):
        parts = x[:border], x[border:], {"in": labels, "out": labels}, vectors, texts
        found[f"stories260K, layer {layer}"] = Subject(models.mlp_layer(model, layer), *parts)
    return found


def text_labels(tokens: np.ndarray, words: list[str], frequent: int = 12) -> dict[str, np.ndarray]:
    """Labels of every token of some texts `[texts, positions]`, in one line."""
    text = np.array(words, object)[tokens]
    of = np.vectorize
    labels = {
        "begins a word": of(lambda w: bool(re.match(r"[ \n]\w", w)), otypes=[bool])(text),
        "part of a word": of(str.isalpha, otypes=[bool])(text),
        "capital": of(lambda w: w.strip()[:1].isupper(), otypes=[bool])(text),
        "punctuation": of(lambda w: bool(re.fullmatch(r"\s*[^\w\s]+", w)), otypes=[bool])(text),
        "line break": of(lambda w: "\n" in w, otypes=[bool])(text),
    }
    quotes = of(lambda w: w.count('"'), otypes=[int])(text)
    labels["inside quotes"] = (np.cumsum(quotes, axis=1) - quotes) % 2 == 1
    labels["among the first 16"] = np.broadcast_to(np.arange(tokens.shape[1]) < 16, tokens.shape)
    labels["first line"] = np.cumsum(labels["line break"], axis=1) == 0
    before = np.concatenate([np.full((len(tokens), 1), -1), tokens[:, :-1]], axis=1)
    for token in np.argsort(-np.bincount(tokens.ravel()), kind="stable")[:frequent]:
        labels[f"is {words[token]!r}"] = tokens == token
        labels[f"is behind {words[token]!r}"] = before == token
    return {name: np.ascontiguousarray(label).ravel() for name, label in labels.items()}


def study(subject: Subject, config: Config, seed: int) -> dict[str, Any]:
    """The probes and intruder rates of every basis on every side that has labels."""
    key = jax.random.key(seed)
    layer, x = subject.layer, subject.train
    fit = {"method": rs.default_method(steps=config.steps), "restarts": 2}
    bases = {"learned": rs.find_rotations(layer, x, key=key, **fit).completed().rotations}
    known = rs.baselines.methods(layer, key=jax.random.fold_in(key, 1))
    statistics = rs.baselines.LayerStatistics(layer, x)
    bases |= {name: known[name](statistics) for name in ("neurons", "pca", "ica", "varimax")}
    for draw in range(config.twins):
        twin = random_weights(layer, key=jax.random.fold_in(key, 10 + draw))
        bases[f"twin {draw}"] = rs.find_rotations(twin, x, key=key, **fit).completed().rotations
        bases[f"haar {draw}"] = rs.Rotations.haar(jax.random.fold_in(key, 20 + draw), layer.d_in, layer.d_out)
    y, y_test = (np.asarray(layer(jnp.asarray(of))) for of in (x, subject.test))
    values = {"in": (x, subject.test), "out": (y, y_test)}
    table = {}
    for side, labels in subject.labels.items():
        rows = {name: r.r_in if side == "in" else r.r_out for name, r in bases.items()}
        x, x_test = values[side]
        coordinates = {name: (x @ np.asarray(r).T, x_test @ np.asarray(r).T) for name, r in rows.items()}
        table[side] = summary(probe_table(coordinates, labels))
        rates = {
            what: {name: intruder_rates(z, v, subject.texts, key=key) for name, (_, z) in coordinates.items()}
            for what, v in subject.vectors.items()
        }
        table[side]["intruders"] = {what: intruder_summary(of) for what, of in rates.items()}
    return table


def intruder_summary(rates: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """How often the intruder is found, on average over directions, their ends and draws; and the lead of the learned
    basis over its twins and over random rotations, with standard errors over directions."""
    ends = {name: of.mean(axis=0) for name, of in rates.items()}
    kinds = {kind: np.mean([of for name, of in ends.items() if name.split()[0] == kind], axis=0) for kind in BASES}
    error = {kind: of.std(ddof=1) / np.sqrt(len(of)) for kind, of in kinds.items()}
    leads = {}
    for other in ("twin", "haar"):
        lead = float(kinds["learned"].mean() - kinds[other].mean())
        leads[other] = lead, float(np.hypot(error["learned"], error[other]))
    return {"rates": {kind: float(of.mean()) for kind, of in kinds.items()}, "leads": leads}


def summary(table: Mapping[str, Mapping[str, list[float]]]) -> dict[str, Any]:
    """The mean area over labels of every basis (over draws, too), for each number of directions; and the lead of the
    learned one over its twins, with its standard error over labels."""
    labels = list(table["learned"])
    areas = {name: np.array([table[name][label] for label in labels]) for name in table}
    drawn = {kind: np.mean([a for n, a in areas.items() if n.split()[0] == kind], axis=0) for kind in BASES}
    lead = drawn["learned"] - drawn["twin"]
    error = lead.std(axis=0, ddof=1) / np.sqrt(len(labels))
    return {
        "labels": labels,
        "areas": {kind: of.mean(axis=0).tolist() for kind, of in drawn.items()},
        "lead": lead.mean(axis=0).tolist(),
        "lead_error": error.tolist(),
        "single": {kind: dict(zip(labels, of[:, 0].tolist(), strict=True)) for kind, of in drawn.items()},
    }


def report(found: Mapping[str, Mapping[str, Any]]) -> str:
    """One table: the mean area for one direction and for five, and the lead over the twins."""
    heads = ["layer", "side", "labels", *(f"{basis}" for basis in BASES), "lead over twins, k = 1", "k = 5"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, sides in found.items():
        for side, of in sides.items():
            cells = [f"{of['areas'][basis][0]:.3f} ({of['areas'][basis][-1]:.3f})" for basis in BASES]
            leads = [f"{of['lead'][k]:+.3f} ±{of['lead_error'][k]:.3f}" for k in (0, -1)]
            lines.append(f"| {' | '.join([name, side, str(len(of['labels'])), *cells, *leads])} |")
    intruders = [f"| {' | '.join(['layer', 'side', 'alike by', *BASES, 'lead over twins', 'over random'])} |"]
    intruders.append("|---" * (len(BASES) + 5) + "|")
    for name, sides in found.items():
        for side, of in sides.items():
            for what, rates in of.get("intruders", {}).items():
                cells = [f"{rates['rates'][basis]:.3f}" for basis in BASES]
                leads = ["{:+.3f} ±{:.3f}".format(*rates["leads"][other]) for other in ("twin", "haar")]
                intruders.append(f"| {' | '.join([name, side, what, *cells, *leads])} |")
    test = "How often the one of five that is not a top example is least alike to the others; chance is .200. "
    said = "Mean area under the ROC curve over labels, held out, of the best direction (of the best five). "
    return (
        f"# Sparse probes\n\n{said}± is a standard error over labels.\n\n"
        + "\n".join(lines)
        + (f"\n\n# Intruders\n\n{test}± is a standard error over directions.\n\n" + "\n".join(intruders) + "\n")
    )


def figure(found: Mapping[str, Mapping[str, Any]]) -> Figure:
    """The lead over the twins for every number of directions."""
    rows = [(f"{name}: {side}", of) for name, sides in found.items() for side, of in sides.items()]
    drawn = Figure(figsize=(8, 1 + 0.45 * len(rows)), dpi=150, layout="constrained")
    ax = drawn.subplots()
    for k, colour in zip(range(len(SIZES)), ("#0072b2", "#d55e00", "#009e73"), strict=True):
        places = np.arange(len(rows)) + 0.2 * (k - 1)
        leads, errors = (np.array([of[what][k] for _, of in rows]) for what in ("lead", "lead_error"))
        ax.errorbar(leads, places, xerr=2 * errors, fmt="o", ms=4, color=colour, label=f"k = {SIZES[k]}")
    ax.axvline(0, color="#888888", lw=0.8)
    ax.set_yticks(range(len(rows)), [name for name, _ in rows])
    ax.invert_yaxis()
    ax.set_xlabel("lead of the learned directions over their twins, area under the ROC curve")
    _common.style(ax, grid="x")
    _common.legend_beside(ax)
    return drawn


def main(config: Config) -> None:
    _common.require([config.data / name for name in (*STORIES, *MNIST)], SOURCE)
    if config.quick:
        config = dataclasses.replace(config, steps=min(config.steps, 500), twins=1, layers=config.layers[:1], texts=24)
    with _common.run("probing", config) as run:
        subjects = {"digits": read_digits(config), "MNIST": read_mnist(config)}
        subjects |= {"addition modulo 59": add_numbers(config), **read_stories(config)}
        found = {name: study(subject, config, config.seed) for name, subject in subjects.items()}
        run.finish({"probes": found, "sizes": list(SIZES)}, report(found), leads=figure(found))


if __name__ == "__main__":
    _common.start(main, Config)
