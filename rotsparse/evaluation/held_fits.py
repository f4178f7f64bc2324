"""Fits with one side held at the neurons: rivals that cost as much as the fit that they are compared with."""

from typing import Any

from jaxtyping import Float, PRNGKeyArray

from rotsparse._core.types import Data
from rotsparse.data.sources import Source
from rotsparse.fit.find_rotations import find_rotations
from rotsparse.layers.base import Layer
from rotsparse.layers.rotations import Rotations

HELD = {"outputs_held": ("out",), "inputs_held": ("in",)}


def held_fits(
    layer: Layer, x: Float[Data, "n d_in"] | Source, *, key: PRNGKeyArray, **fit: Any
) -> dict[str, Rotations]:
    """The rotations of `find_rotations` with the outputs, and with the inputs, left at the neurons.

    `fit` holds further arguments of `find_rotations`. Raises `KeyboardInterrupt` where a fit was interrupted.
    """
    return {
        name: find_rotations(layer, x, key=key, hold=hold, **fit).completed().rotations for name, hold in HELD.items()
    }
