"""`rotsparse demo`: train a network, and do what `rotsparse fit` does with one of its layers."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from rotsparse._core import checks
from rotsparse._core.printable import visible
from rotsparse.cli import explain_command
from rotsparse.cli.arguments import again, plain
from rotsparse.cli.demo_directions import LABELS
from rotsparse.cli.output import Console
from rotsparse.engine.run import Run
from rotsparse.evaluation.baselines import pca
from rotsparse.examples import addition, digits
from rotsparse.explain.page import PAGE
from rotsparse.fit.default_method import default_method
from rotsparse.layers.base import Layer
from rotsparse.layers.files import load_activations, save_array, save_layer
from rotsparse.objectives.measures import Log
from rotsparse.runs import folders, inputs, layer_run
from rotsparse.runs.opened import LayerRun
from rotsparse_command import options


class Subject(NamedTuple):
    """A trained network, as the layer that is looked at, its inputs, and what to say of it. `steps` of the fit."""

    layer: Layer
    train: Float[np.ndarray, "n d"]
    test: Float[np.ndarray, "m d"]
    said: str
    steps: int
    scale_inputs: bool
    labels: list[str]  # of the test examples
    embedding: Float[np.ndarray, "modulus d"] | None = None
    pictures: Float[np.ndarray, "m height width"] | None = None  # of the test examples
    pixels: Float[np.ndarray, "d height width"] | None = None  # what each input reads from a picture


def run(command: "options.Demo", console: Console) -> int:
    """Train, fit, report. Returns the exit code."""
    checks.seed(command.seed)
    with folders.new_run(command.out, overwrite=command.overwrite) as folder:
        of = _SUBJECTS[command.network](command.seed, console)
        train, test = of.train[: command.examples], of.test[: command.examples]
        console.print(
            f"{of.said}; {of.layer.d_in} inputs, {of.layer.d_out} outputs; fitting on {len(train):,} examples, "
            f"reporting on {len(test):,} others",
            highlight=False,
        )
        # Everything that `rotsparse fit` needs to do the same again, and `rotsparse report` to draw it.
        save_layer(folder / "layer.safetensors", of.layer)
        save_array(folder / "activations.npy", train)
        save_array(folder / "test_activations.npy", test)
        config: dict[str, Any] = {"command": "demo", **plain(command), "again": again("demo", command)}
        config |= {"layer": "layer.safetensors", "activations": "activations.npy", "activation": "relu"}
        config |= {"test_activations": "test_activations.npy", "input_scale": "std" if of.scale_inputs else "none"}
        names = ["layer", "activations", "test_activations"]
        for name, array in {"embedding": of.embedding, "pictures": of.pictures, "pixels": of.pixels}.items():
            if array is not None:
                save_array(folder / f"{name}.npy", array)
                names, config = [*names, name], config | {name: f"{name}.npy"}
        folders.write_json(folder / LABELS, {"labels": of.labels[: len(test)]})
        config[folders.INPUTS] = inputs.hashes(**{name: folder / config[name] for name in names})
        fit = {"measure": Log(0.1), "scale_inputs": of.scale_inputs, "restarts": 2, "run": Run(progress=True)}
        fit["method"] = default_method(steps=command.steps or of.steps)
        solution = layer_run.run(
            folder,
            of.layer,
            train,
            test,
            fit=fit,
            seed=command.seed,
            config=config,
            control=command.control == "quick",
            pictures=None if of.embedding is None else functools.partial(_pictures, of.embedding),
            directions=True,
            console=console,
        )
        if of.embedding is not None:
            console.print(
                f"The network adds with waves: each learned direction holds {_purity(of, solution.rotations)} of its "
                f"variance in one frequency (principal components: {_purity(of, pca(of.layer, train))}); see "
                "figures/waves.png.",
                highlight=False,
            )
        explain_command.explain(LayerRun(folder, folders.read_object(folder / folders.CONFIG)))
    console.print(f"report: {visible(command.out / 'report.html')}")
    console.print(f"its directions: {visible(command.out / PAGE)}")
    return 0 if layer_run.succeeded(solution) else 1


def pictures(run: Path, config: dict[str, Any]) -> "layer_run.Pictures | None":
    """What the report of a finished demo shows besides the usual figures."""
    path = inputs.located(run, config, "embedding") if "embedding" in config else None
    return None if path is None else functools.partial(_pictures, load_activations(path, addition.WIDTH))


def _pictures(embedding, bases):
    from rotsparse.report import waves  # imported here: Matplotlib takes half a second

    return {"waves": waves.picture(embedding, bases)}


def _purity(of: Subject, rotations) -> str:
    from rotsparse.report import waves

    assert of.embedding is not None
    return f"{waves.purity(of.embedding, rotations):.0%}"


def _addition(seed: int, console: Console) -> Subject:
    console.print(f"training a network to add modulo {addition.MODULUS} ...")
    network = addition.train(seed)
    said = f"{network.accuracy:.1%} right on pairs it has not seen; the MLP block"
    labels = [f"{a} + {b}" for a, b in network.unseen]
    return Subject(network.layer, network.train, network.test, said, 4000, True, labels, network.embedding)


def _digits(seed: int, console: Console) -> Subject:
    console.print("training a 64-64-64-10 ReLU network on handwritten digits ...")
    network = digits.train(seed)
    train, test = (np.asarray(network.layers[0](jnp.asarray(x))) for x in (network.train, network.test))
    return Subject(
        network.layers[1],
        train,
        test,
        f"held-out accuracy {network.accuracy:.1%}; the second layer",
        8000,
        False,
        [f"image {i}" for i in range(len(test))],
        pictures=np.asarray(network.test, np.float32).reshape(-1, 8, 8),
        pixels=np.asarray(network.layers[0].w, np.float32).reshape(-1, 8, 8),
    )


_SUBJECTS: dict[str, Callable[[int, Console], Subject]] = {"addition": _addition, "digits": _digits}
