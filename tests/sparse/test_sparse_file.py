"""The file of a model's sparse inputs: what is written comes back, and only with the weights it was written for."""

import jax
import numpy as np
import pytest

from rotsparse._core.files import is_recorded
from rotsparse.models.huggingface import load_huggingface
from rotsparse.models.huggingface_writer import save_huggingface
from rotsparse.models.transformer import SITES
from rotsparse.sparse.file import read_sparse_inputs, write_sparse_inputs
from rotsparse.sparse.inputs import SparseInput
from rotsparse.sparse.readers import reading_weights, weights_hash
from sparse_models import sparse_inputs
from tiny_models import RAW, message, tiny, tiny_llama2c


def same(a: SparseInput, b: SparseInput) -> bool:
    ours, theirs = jax.tree.leaves(a), jax.tree.leaves(b)
    return bool(a.count == b.count) and len(ours) == len(theirs) and all(map(np.array_equal, ours, theirs))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "llama2c"])
def test_what_is_written_is_read(name, tmp_path):
    model = tiny_llama2c() if name == "llama2c" else tiny(name)
    inputs = sparse_inputs(model)
    write_sparse_inputs(tmp_path / "s.safetensors", inputs, model)
    again = read_sparse_inputs(tmp_path / "s.safetensors", model)
    assert again.keys() == inputs.keys()
    for point, sparse in inputs.items():
        stored = again[point]
        if sparse.threshold is not None:
            assert stored.threshold == np.float32(sparse.threshold)
            stored = SparseInput(stored.rotation, stored.shift, stored.scores, sparse.threshold, inverse=stored.inverse)
        assert same(stored, sparse)


def test_other_weights_are_refused(tmp_path):
    model = tiny("llama")
    write_sparse_inputs(tmp_path / "s.safetensors", sparse_inputs(model), model)
    with pytest.raises(ValueError, match="belongs to another model") as error:
        read_sparse_inputs(tmp_path / "s.safetensors", tiny("llama", seed=1))
    for hashed in (model, tiny("llama", seed=1)):
        assert weights_hash(reading_weights(hashed))[:16] in message(error)


@pytest.mark.parametrize("name", sorted(set(RAW) - {"vit"}))
def test_every_weight_that_reads_a_site_is_bound(name):
    """A change in the last bit of any of them changes the hash; of others, none."""
    model = tiny(name)
    before = weights_hash(reading_weights(model))
    for part in ("attn", "mlp"):
        for key, array in model.params["layers"][1][part].items():
            if isinstance(array, np.ndarray):
                old = array.flat[-1]
                array.flat[-1] = np.nextafter(old, np.float32(9))
                assert (weights_hash(reading_weights(model)) != before) == key.startswith("w_"), key
                array.flat[-1] = old
    model.params["embed"].flat[0] += 1
    assert weights_hash(reading_weights(model)) == before


def test_the_hash_does_not_depend_on_the_type_in_which_the_weights_were_loaded():
    import ml_dtypes

    weights = dict(reading_weights(tiny("gpt2").astype(ml_dtypes.bfloat16)))
    assert weights_hash(weights) == weights_hash({n: a.astype(np.float32) for n, a in weights.items()})


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gpt_neox"])
def test_a_model_and_its_folder_have_one_hash(name, tmp_path):
    save_huggingface(tiny(name), tmp_path / "model")
    again = load_huggingface(tmp_path / "model")
    assert weights_hash(reading_weights(again)) == weights_hash(reading_weights(tiny(name)))


def test_bad_inputs_are_refused(tmp_path):
    model, path = tiny("llama"), tmp_path / "s.safetensors"
    half = np.eye(8, dtype=np.float32)
    wrong = {
        "no matrix reads 0.output": {(0, "output"): SparseInput(count=3)},
        "no point 9.input": {(9, "input"): SparseInput(count=3)},
        "layers.1.input.rotation should have shape": {(1, "input"): SparseInput(half, count=3)},
        "layers.1.input.rotation is not orthogonal": {
            (1, "input"): SparseInput(2 * np.eye(16, dtype=np.float32), count=3)
        },
        "layers.1.input.inverse is not that of layers.1.input.rotation": {
            (1, "input"): SparseInput(np.eye(16, dtype=np.float32), count=3, inverse=2 * np.eye(16, dtype=np.float32))
        },
        "layers.1.hidden.shift should have shape": {(1, "hidden"): SparseInput(shift=half[0], count=3)},
        "of 16 coordinates 17 cannot stay": {(1, "input"): SparseInput(count=17)},
    }
    for text, inputs in wrong.items():
        with pytest.raises(ValueError, match=text):
            write_sparse_inputs(path, inputs, model)
    assert not path.exists() and "output" in SITES
    with pytest.raises(ValueError, match="needs the rotation that it undoes"):
        SparseInput(count=3, inverse=np.eye(16, dtype=np.float32))


def test_damaged_and_foreign_files_are_refused(tmp_path):
    model, path = tiny("llama"), tmp_path / "s.safetensors"
    write_sparse_inputs(path, sparse_inputs(model), model)
    payload = bytearray(path.read_bytes())
    payload[-1] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(payload)
    with pytest.raises(ValueError, match="damaged"):
        read_sparse_inputs(tmp_path / "damaged.safetensors", model)
    save_huggingface(model, tmp_path / "model")
    with pytest.raises(ValueError, match="holds no sparse inputs"):
        read_sparse_inputs(tmp_path / "model/model.safetensors", model)
    assert not is_recorded(path)


def test_an_identity_is_not_stored(tmp_path):
    model, path = tiny("llama"), tmp_path / "s.safetensors"
    write_sparse_inputs(path, {(0, "input"): SparseInput(np.eye(16, dtype=np.float32), count=4)}, model)
    assert read_sparse_inputs(path, model)[0, "input"].rotation is None
