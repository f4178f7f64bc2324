"""A rotation as a sparse autoencoder that SAELens loads: an orthogonal one, without any error.

A direction becomes two features, one for each sign, because the features of these autoencoders are not negative:

    f = relu([R; -R] (x - b)),    x = [Rᵀ, -Rᵀ] f + b

with b the mean, so that feature i (i + d) is how far the coordinate of direction i lies above (below) its mean. The
reconstruction is exact, because `relu(z) - relu(-z) = z` and `RᵀR = I`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from rotsparse._core.files import SIGNATURE, new_folder, write_atomically
from rotsparse._core.reading import safetensors
from rotsparse._core.types import AnyArray

# The names that SAELens reads.
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"

# The version of SAELens whose format this is: without one it takes the file for an earlier format.
_SPOKEN = "6.0.0"

# Where the sites of an MLP are in TransformerLens. It has no name for the input behind a norm with a scale.
HOOKS = {"residual": "blocks.{layer}.hook_resid_mid", "output": "blocks.{layer}.hook_mlp_out"}


def autoencoder(r: Float[AnyArray, "d d"], mean: Float[AnyArray, "d"]) -> dict[str, np.ndarray]:
    """The weights, in float32: `W_enc` `[d, 2d]`, `b_enc` `[2d]`, `W_dec` `[2d, d]`, `b_dec` `[d]`."""
    both = np.concatenate([np.asarray(r), -np.asarray(r)]).astype(np.float32)
    mean = np.asarray(mean, np.float32)
    weights = {"W_enc": both.T, "b_enc": np.zeros(len(both), np.float32), "W_dec": both, "b_dec": mean}
    return {name: np.ascontiguousarray(w) for name, w in weights.items()}


def write_sae(
    folder: Path, r: Float[AnyArray, "d d"], mean: Float[AnyArray, "d"], *, metadata: Mapping[str, Any]
) -> None:
    """Write the new folder of an autoencoder of the architecture "standard". Raises `ValueError` if it exists."""
    config = {
        "format": f"{SIGNATURE} sae 1",
        "architecture": "standard",
        "d_in": len(r),
        "d_sae": 2 * len(r),
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": _SPOKEN, **metadata},
    }
    with new_folder(folder) as work:
        write_atomically(work / WEIGHTS, safetensors(autoencoder(r, mean), **{SIGNATURE: "sae"}))
        write_atomically(work / CONFIG, (json.dumps(config, indent=1) + "\n").encode())
