"""A model with sparse inputs as a Hugging Face folder: the dense model, and `rotsparse.safetensors` beside it.

Without that file the folder is a dense model of the same function, which anything that reads such folders loads. What
folds is folded (`fold`); the rest is carried out by whoever loads the file, in PyTorch by `rotsparse.torch`.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from rotsparse._core.errors import CheckError
from rotsparse._core.files import new_folder
from rotsparse._core.precision import full_precision
from rotsparse.models.fold import outputs
from rotsparse.models.load import fill_folder, load_model
from rotsparse.models.model import Inputs, Model
from rotsparse.models.transformer import run
from rotsparse.sparse.file import FILE, SparseInputs, checked_inputs, read_sparse_inputs, write_sparse_inputs
from rotsparse.sparse.fold import exact_heads, fold_heads

# More than this share of the largest output is no rounding, of float32 and of float64.
TOLERANCE, EXACT = 1e-3, 1e-8


@dataclass(frozen=True)
class Exported:
    """How far the outputs of a written folder are at most from the original's, on the tokens that were checked.

    `dense_error`: without dropping anything, as the two models run. `sparse_error`: with coordinates dropped, in
    float64 throughout, so that it is that of what was folded. (In float32 rounding takes some coordinates across their
    threshold, and the outputs of a deep model may then differ by as much as dropping changes them.) `scale`: the
    largest output.
    """

    dense_error: float
    sparse_error: float
    scale: float


def export_sparse(
    model: Model,
    inputs: SparseInputs,
    folder: str | os.PathLike,
    *,
    tokenizer_from: str | os.PathLike | None = None,
    tokens: Inputs | None = None,
) -> Exported:
    """Write a model and its sparse inputs as a new Hugging Face folder, read both again and compare: the folder appears
    when that went well.

    `tokenizer_from`: the model's own folder or GGUF file, whose tokenizer goes with it. `tokens`: a few sequences to
    compare on (default: two of 32 random tokens).

    Raises `ValueError` if the folder exists, the format cannot hold the model, or the points or shapes of the inputs do
    not fit; `CheckError` if what was written computes something else.
    """
    inputs = exact_heads(model, checked_inputs(inputs, model))
    exact, rest = fold_heads(model.astype(np.float64), inputs)
    folded = exact.astype(model.dtype)
    tokens = _some_tokens(model) if tokens is None else np.asarray(tokens)
    dense = outputs(model, tokens)
    with jax.enable_x64(True):
        before = sparse_outputs(model.astype(np.float64), inputs, tokens)
        sparse_error = np.abs(sparse_outputs(exact, rest, tokens) - before).max()
    with new_folder(folder) as target:
        fill_folder(folded, target, tokenizer_from=tokenizer_from)
        again = load_model(target)
        write_sparse_inputs(target / FILE, rest, again)
        rest_again = read_sparse_inputs(target / FILE, again)
        dense_error = np.abs(outputs(again, tokens) - dense).max()
        done = Exported(float(dense_error), float(sparse_error), float(np.abs(dense).max()))
        moved = np.abs(sparse_outputs(again, rest_again, tokens) - sparse_outputs(folded, rest, tokens)).max(axis=-1)
        least_moved = float(np.quantile(moved, 0.1))  # where rounding took no coordinate across its threshold
        if not (max(dense_error, least_moved) <= TOLERANCE * done.scale and sparse_error <= EXACT * done.scale):
            raise CheckError(
                f"{Path(folder)} was not written: of outputs of up to {done.scale:.2g}, those of the dense model read "
                f"again differ by up to {dense_error:.2g}, of the sparse model nearly everywhere by {least_moved:.2g}, "
                f"and by {sparse_error:.2g} in float64. Are all weights finite and of similar size?"
            )
        return done


def _some_tokens(model: Model) -> np.ndarray:
    config = model.config
    if config.patches is not None:
        raise ValueError("a model of images is compared on images: give a few as tokens=")
    return np.random.default_rng(0).integers(0, config.vocab_size, (2, min(32, config.max_positions)))


def sparse_outputs(model: Model, inputs: SparseInputs, tokens: Inputs) -> np.ndarray:
    """What `models.run` returns with these inputs, in full precision."""
    with full_precision():
        return np.asarray(run(model.params, model.config, tokens, intervene=inputs)[0])
