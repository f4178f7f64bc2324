"""The networks of the PCA benchmark, each as one layer and its inputs: those of the experiments, and the demo's."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import rotsparse as rs
from rotsparse.data.scales import winsorised
from rotsparse.examples import addition, digits
from rotsparse.layers.base import Layer

sys.path.append(str(Path(__file__).resolve().parents[1] / "experiments"))

# Beyond this point modules of the experiments can be imported; each network imports its own.


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer, its inputs to fit on and to test on, arguments of `benchmark`, and the rotations that were planted."""

    layer: Layer
    train: np.ndarray
    test: np.ndarray
    options: dict[str, Any]
    truth: rs.Rotations | None = None

    def sampled(self, examples: tuple[int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
        """At most so many random inputs to fit on, and to test on."""
        rng = np.random.default_rng(seed)
        train, test = (
            x[rng.permutation(len(x))[:count]] for x, count in zip((self.train, self.test), examples, strict=True)
        )
        return train, test


def cases(data: Path, minilm: Path, *, seed: int = 0, quick: bool = False) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Every network by name, not yet loaded: that raises `Missing` where files are not in the folders `data` and
    `minilm`."""
    raw = {"scale_inputs": False}
    yield "addition modulo 59, MLP", _addition
    yield "digits, layer 2 (raw)", lambda: digits_layer(raw)
    yield "digits, hidden 1 → logits", _digits_block
    yield "x², middle layer", lambda: _x_squared()
    yield "planted, n = 32 (raw)", lambda: _planted(seed, raw)
    yield "MNIST, hidden 1 → hidden 2 (raw)", lambda: _mnist(data, seed, "hidden 1 → hidden 2", raw)
    yield "MNIST, hidden 1 → logits (raw)", lambda: _mnist(data, seed, "hidden 1 → logits", raw)
    for n in (0,) if quick else (0, 1, 2):
        yield f"modular addition {n}, MLP and skip", lambda n=n: _modular_addition(data, n)
    for i in (0,) if quick else range(5):
        yield f"stories260K, MLP {i}", lambda i=i: _stories(data, i)
    for i in () if quick else (0, 5):
        yield f"MiniLM, MLP {i}", lambda i=i: _minilm(data, minilm, i)


def smollm2(data: Path, path: Path, layers: Sequence[int], site: str) -> Iterator[tuple[str, Callable[[], Case]]]:
    """MLPs of SmolLM2-135M, a GGUF file at `path`, from their inputs or from the residual stream in front of the norm;
    a fit of one takes minutes."""
    for i in layers:
        name = f"SmolLM2-135M, MLP {i}" if site == "input" else f"SmolLM2-135M, norm and MLP {i}"
        yield name, lambda i=i: _smollm2(data, path, i, site)


def _smollm2(data: Path, path: Path, i: int, site: str) -> Case:
    from rotsparse import models
    from rotsparse.sparse.calibration import sequences, spread

    texts = [data / "text" / name for name in ("wt2_valid.txt", "wt2_test.txt")]
    _require(path, *texts, source="make fetch-smollm2 fetches the model.")
    model, tokenizer = _language_model(path)

    def inputs(text: Path, tokens: int) -> np.ndarray:
        few = spread(sequences(model, models.TextFile(text, tokenizer), 128), tokens)
        return np.asarray(models.run(model.params, model.config, few, capture=((i, site),))[1][i, site])

    train, test = (
        inputs(text, count).reshape(-1, model.config.d_model) for text, count in zip(texts, (8192, 2048), strict=True)
    )
    # In the stream one row in a hundred holds nearly all of the variance.
    options = {"scale_inputs": winsorised} if site == "residual" else {}
    return Case(models.mlp_layer(model, i, norm=site == "residual"), train, test, options)


@functools.cache
def _language_model(path: Path) -> tuple[Any, Any]:
    """A model and its tokenizer, read once for all of its layers."""
    from rotsparse import models

    model = models.load_model(path)
    return model, models.load_tokenizer(path, model)


def _addition() -> Case:
    network = addition.train(0)
    return Case(network.layer, network.train, network.test, {})


def _digits_block() -> Case:
    network = digits.train(0)
    first, second, third = network.layers
    train, test = (np.asarray(first(jnp.asarray(x))) for x in (network.train, network.test))
    return Case(rs.MLP(second.w, second.b, third.w, third.b), train, test, {})


def digits_layer(options, seed: int = 0) -> Case:
    """The second layer of the digits network of this seed."""
    network = digits.train(seed)
    train, test = (np.asarray(network.layers[0](jnp.asarray(x))) for x in (network.train, network.test))
    return Case(network.layers[1], train, test, options)


def _x_squared() -> Case:
    import x_squared

    network = x_squared.train(x_squared.Config(), 0)
    return Case(network.layer, network.train, network.test, {})


def _planted(seed: int, options) -> Case:
    import planted

    of = planted.block(planted.Config(examples=1000), seed=seed)
    return Case(of.layer, of.x[:512], of.x[512:], options, of.truth)


def _mnist(data: Path, seed: int, stage: str, options) -> Case:
    import mnist

    _require(data / "mlp_mnist/model.safetensors", data / "mnist/mnist.npz", source=mnist.SOURCE)
    layer, (train, _, test) = mnist.Network(mnist.Config(data=data)).stage(stage)
    return Case(layer, train, test, options)


def _modular_addition(data: Path, number: int) -> Case:
    import modular_addition
    from _modular_addition import Network

    path = data / f"modular_addition/seed{number}.safetensors"
    _require(path, source=modular_addition.SOURCE)
    network = Network(path, 0)
    x = np.asarray(network.inputs["ln2"])
    return Case(network.layers["ln2"], x[network.train], x[network.test], {"active_subspace": 0.999})


def _stories(data: Path, i: int) -> Case:
    import stories260k

    files = [data / "stories260k" / name for name in ("stories260K.bin", "tok512.bin")]
    _require(*files, data / "text/ts_sample.txt", source=stories260k.SOURCE)
    network = stories260k.Network(stories260k.Config(data=data, samples=(48, 1, 24)))
    train, _, test = (network.inputs(tokens)[i] for tokens in network.samples)
    return Case(network.layers[i], train, test, {})


def _minilm(data: Path, folder: Path, i: int) -> Case:
    import minilm

    from rotsparse import models

    texts = [data / "text" / name for name in ("wt2_valid.txt", "wt2_test.txt")]
    _require(folder / "model.safetensors", *texts, source=minilm.SOURCE)
    network = minilm.Network(minilm.Config(model=folder, data=data, sequences=(48, 1, 8)))
    train, _, test = (network.inputs(tokens, [i])[0] for tokens in network.tokens)
    # 384×384 entries through 1536 neurons: fewer directions and steps, and fewer examples to test on.
    options = {"active_subspace": 0.9, "method": rs.default_method(steps=1000)}
    return Case(models.mlp_layer(network.model, i), train, test[:100], options)


class Missing(Exception):
    """A network's files are not there; the message says where to get them."""


def _require(*paths: Path, source: str) -> None:
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise Missing(f"{', '.join(missing)} not found. {source}")
