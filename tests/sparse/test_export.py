"""A model with sparse inputs as a Hugging Face folder: the dense model is the same function, the sparse one too, and
nothing of the user's is touched."""

import numpy as np
import pytest

from rotsparse._core.errors import CheckError
from rotsparse.models.fold import outputs
from rotsparse.models.load import load_model
from rotsparse.sparse import export
from rotsparse.sparse.export import export_sparse, sparse_outputs
from rotsparse.sparse.file import FILE, read_sparse_inputs
from rotsparse.sparse.fold import fold_heads, group_blocks
from rotsparse.sparse.inputs import SparseInput
from sparse_models import group_rotation, oblique, orthogonal, sparse_inputs
from tiny_models import RAW, inputs, tiny, tiny_llama2c

NAMES = sorted(set(RAW) - {"vit"})


@pytest.mark.parametrize("name", [*NAMES, "llama2c"])
def test_the_folder_has_both_models(name, tmp_path):
    model = tiny_llama2c() if name == "llama2c" else tiny(name)
    sparse = sparse_inputs(model)
    done = export_sparse(model, sparse, tmp_path / "out", tokens=inputs(name))
    assert done.dense_error < 1e-4 * done.scale and done.sparse_error < 1e-9 * done.scale
    again = load_model(tmp_path / "out")
    stored = read_sparse_inputs(tmp_path / "out" / FILE, again)
    np.testing.assert_allclose(outputs(again, inputs(name)), outputs(model, inputs(name)), atol=1e-4 * done.scale)
    assert stored[0, "heads"].rotation is None, "it was folded"
    assert stored[0, "input"].rotation is not None
    sizes = np.abs(sparse_outputs(again, stored, inputs(name)) - sparse_outputs(model, sparse, inputs(name)))
    assert np.median(sizes) < 1e-4 * done.scale  # a few rows may have other coordinates by rounding


@pytest.mark.parametrize("of", [orthogonal, oblique])
@pytest.mark.parametrize("name", ["llama", "gpt2", "olmo2", "qwen2"])
def test_folding_the_heads_is_exact(name, of):
    """In float64, with a threshold that no coordinate is near to: everything stays, or nothing but the mean."""
    model = tiny(name, **({"attention_bias": True} if name == "llama" else {})).astype(np.float64)
    rng = np.random.default_rng(0)
    r = group_rotation(model.config, rng, of)
    shift, inverse = rng.normal(size=len(r)), None if of is orthogonal else np.linalg.inv(r)
    for threshold in (-1.0, 1e9):
        sparse = {(1, "heads"): SparseInput(r, shift, threshold=threshold, inverse=inverse)}
        folded, rest = fold_heads(model, sparse)
        assert rest[1, "heads"].rotation is None
        a, b = sparse_outputs(model, sparse, inputs(name)), sparse_outputs(folded, rest, inputs(name))
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_other_rotations_of_the_heads_stay():
    model = tiny("llama")
    rng = np.random.default_rng(0)
    r = orthogonal(16, rng).astype(np.float32)
    folded, rest = fold_heads(model, {(0, "heads"): SparseInput(r, count=4)})
    assert rest[0, "heads"].rotation is not None
    assert folded.fingerprint() == model.fingerprint()
    own = np.kron(np.eye(4), orthogonal(4, rng))
    own[:4, :4] = orthogonal(4, rng)  # another block for a head of the same group
    assert group_blocks(SparseInput(own, count=4), model.config) is None
    blocks = group_blocks(SparseInput(group_rotation(model.config, rng), count=4), model.config)
    assert blocks is not None and blocks[0].shape == (2, 4, 4)


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        export_sparse(tiny("llama"), {}, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [
        ("fold_heads", lambda model, inputs: (tiny("llama", seed=1).astype(np.float64), inputs)),
        ("fold_heads", lambda model, inputs: (model, {(0, "input"): SparseInput(count=5)})),
        ("read_sparse_inputs", lambda path, model: {(0, "input"): SparseInput(count=5)}),
        ("load_model", lambda path: tiny("llama", seed=1)),
    ],
)
def test_nothing_appears_if_the_written_model_computes_something_else(changed, wrong, tmp_path, monkeypatch):
    monkeypatch.setattr(export, changed, wrong)
    with pytest.raises(CheckError, match="was not written"):
        export_sparse(tiny("llama"), {(0, "input"): SparseInput(count=4)}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_of_llama2c_cannot_go_with_it(tmp_path):
    with pytest.raises(ValueError, match="leave tokenizer_from out"):
        export_sparse(tiny_llama2c(), {}, tmp_path / "out", tokenizer_from="tok512.bin")
    assert list(tmp_path.iterdir()) == []
