"""What the directions of the demo's networks mean: waves over the numbers, or pictures of digits."""

from collections.abc import Sequence

import numpy as np

from rotsparse.examples import addition
from rotsparse.explain.data import Drawing
from rotsparse.explain.directions import IN, Explanation
from rotsparse.explain.examples import Examples
from rotsparse.layers.files import load_activations, load_arrays
from rotsparse.runs import folders, inputs
from rotsparse.runs.opened import LayerRun

LABELS = "labels.json"


def explained(run: LayerRun) -> tuple[Explanation, dict[str, Sequence[Drawing]]]:
    """The directions of a demo, and a drawing of each input direction."""
    x = np.asarray(run.inputs[2])
    labels = folders.read_object(run.folder / LABELS).get("labels") if (run.folder / LABELS).exists() else None
    if labels is not None and not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{run.folder / LABELS} holds no labels")
    pictures, embedding, pixels = (_array(run, name) for name in ("pictures", "embedding", "pixels"))
    examples = Examples(x, labels=labels, pictures=None if pictures is None else pictures[: len(x)])
    of, drawings = run.explained(examples=examples), {}
    r_in = of.basis(IN)
    if embedding is not None:
        drawings[IN] = _waves(embedding, r_in)
    elif pixels is not None:
        read = np.einsum("id,dhw->ihw", r_in, pixels)
        caption = "What it reads from a picture, through the weights of the first layer: orange adds, blue subtracts."
        drawings[IN] = [Drawing(picture, caption) for picture in read]
    return of, drawings


def _waves(embedding: np.ndarray, r_in: np.ndarray) -> list[Drawing]:
    """The coordinate of every number along each direction, and its strongest frequency."""
    found = addition.waves(embedding, r_in)
    power = np.square(found.coordinates).sum(axis=0)
    return [
        Drawing(found.coordinates[:, i], f"{found.frequency[i]}×, {found.purity[i]:.0%} pure: {_SAID}")
        if power[i] > 1e-3 * power.max()
        else Drawing(found.coordinates[:, i], "hardly used by the network")
        for i in range(len(r_in))
    ]


_SAID = f"along it the numbers 0 to {addition.MODULUS - 1} go round so many times; pure is the share of this frequency"


def _array(run: LayerRun, name: str) -> np.ndarray | None:
    """An array that the demo wrote beside its results."""
    path = inputs.located(run.folder, run.config, name) if name in run.config else None
    if path is None:
        return None
    if name == "embedding":
        return load_activations(path, addition.WIDTH)
    (array,) = load_arrays(path).values()
    return array
