"""Directions as a set of named vectors that SAEDashboard loads (`VectorSet.load`): one JSON file."""

import json
from pathlib import Path

import numpy as np
from jaxtyping import Float

from rotsparse._core.files import check_new_file, write_atomically
from rotsparse._core.types import AnyArray


def write_vectors(
    path: Path,
    r: Float[AnyArray, "k d"],
    *,
    side: str,
    model_name: str = "",
    hook_name: str = "",
    layer: int = 0,
    context_size: int = 128,
) -> None:
    """Write the rows of `r`, named by their side and number, such as "in 17". Their products with activations at the
    hook are the coordinates. The text to show and where it is are SAEDashboard's own options. Raises `ValueError` if
    the file exists."""
    check_new_file(path, overwrite=False)
    vectors = np.asarray(r, np.float32)
    config = {
        "d_in": vectors.shape[1],
        "d_vectors": len(vectors),
        "vector_names": [f"{side} {i}" for i in range(len(vectors))],
        "model_name": model_name,
        "hook_name": hook_name,
        "hook_layer": layer,
        "hook_head_index": None,
        "prepend_bos": False,
        "context_size": context_size,
        "dataset_path": "",
        "dtype": "float32",
        "device": "cpu",
        "model_from_pretrained_kwargs": {},
    }
    write_atomically(path, (json.dumps({"vectors": vectors.tolist(), "config": config}) + "\n").encode())
