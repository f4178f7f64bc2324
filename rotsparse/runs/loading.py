"""The layer and the activations that options of the command line, or the config of a run, name."""

from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Float

from rotsparse._core import checks
from rotsparse._core.types import Data
from rotsparse.data.moments import evenly_spaced
from rotsparse.data.sources import RowRange, Source
from rotsparse.layers.activations import ACTIVATIONS
from rotsparse.layers.base import Layer
from rotsparse.layers.files import load_layer, open_activations

# Each basis is compared on evenly spaced examples with so many Jacobian entries in total. For wide layers this takes
# minutes, and the intervals are already narrow.
COMPARED_ENTRIES = 2**26
FEWEST_COMPARED = 100


class LayerFile(Protocol):
    """How a layer is given: its file, and what the file does not say."""

    @property
    def layer(self) -> Path: ...

    @property
    def activation(self) -> str: ...

    @property
    def norm(self) -> str | None: ...

    @property
    def skip(self) -> bool: ...


class InputFiles(LayerFile, Protocol):
    """A layer and its activations. Without `test_activations` a fifth is held out, drawn by `seed`."""

    @property
    def activations(self) -> Path: ...

    @property
    def test_activations(self) -> Path | None: ...

    @property
    def seed(self) -> int: ...


def layer(options: LayerFile) -> Layer:
    """The layer in a file. Raises `ValueError` as `load_layer` does."""
    return load_layer(options.layer, ACTIVATIONS[options.activation], norm=options.norm, skip=options.skip)


def inputs(options: InputFiles) -> tuple[Layer, np.ndarray | Source, np.ndarray]:
    """The layer, the activations to fit on, and the held-out activations (a sample of those that stay on disk). Raises
    `ValueError` for activations that do not fit, or are too few to hold some out."""
    checks.seed(options.seed)
    found = layer(options)
    x = open_activations(options.activations, found.d_in)
    if options.test_activations is not None:
        return found, x, sample(options.test_activations, open_activations(options.test_activations, found.d_in))
    if len(x) < 10:
        raise ValueError(
            f"{options.activations} holds {len(x)} examples, too few to hold a fifth of them out: give at least 10, or "
            "--test-activations"
        )
    held_out = len(x) // 5
    if isinstance(x, Source):
        border = len(x) - held_out
        test = sample(options.activations, RowRange(x, range(border, len(x))))
        return found, RowRange(x, range(border)), test
    order = np.random.default_rng(options.seed).permutation(len(x))
    return found, x[order[held_out:]], x[order[:held_out]]


def sample(path: Path, x: np.ndarray | Source) -> np.ndarray:
    """The sample of activations that is kept in memory. Raises `ValueError` if it is not finite."""
    return np.asarray(checks.activations(str(path), x.resident(), x.shape[1])) if isinstance(x, Source) else x


def compared(layer: Layer, test: Float[Data, "m d_in"]) -> Float[Data, "k d_in"]:
    """The held-out examples on which bases are compared, and directions are numbered."""
    return evenly_spaced(test, max(FEWEST_COMPARED, COMPARED_ENTRIES // (layer.d_in * layer.d_out)))
