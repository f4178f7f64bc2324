"""Sparse models in PyTorch: the same logits and perplexity as here, and text from `generate`."""

import jax.numpy as jnp
import numpy as np
import pytest

from rotsparse.models.language import cross_entropy
from rotsparse.models.load import load_model
from rotsparse.sparse.export import export_sparse, sparse_outputs
from rotsparse.sparse.file import FILE, read_sparse_inputs
from rotsparse.sparse.inputs import SparseInput
from rotsparse.torch import load_sparse, sparsify_
from sparse_models import sparse_inputs
from tiny_models import STORIES, message, needs_stories, tiny

pytestmark = pytest.mark.peers
peers = pytest.importorskip("transformers_peers")
torch = peers.torch

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 17))


def nearly(ours, theirs, share=0.9):
    """But for positions whose coordinates rounding moved across a threshold."""
    close = np.abs(ours - theirs).max(axis=-1) < 2e-4 * np.abs(ours).max()
    assert close.mean() > share, close.mean()


@pytest.mark.parametrize("name", [n for n in peers.configurations() if n != "vit"])
def test_logits_agree(name, tmp_path):
    peers.save_peer(name, tmp_path / "model")
    model = load_model(tmp_path / "model")
    export_sparse(model, sparse_inputs(model), tmp_path / "out", tokens=TOKENS)
    theirs = load_sparse(tmp_path / "out", attn_implementation="eager")
    again = load_model(tmp_path / "out")
    ours = sparse_outputs(again, read_sparse_inputs(tmp_path / "out" / FILE, again), TOKENS)
    nearly(ours, peers.peer_output(theirs, TOKENS))
    dense = type(theirs).from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert np.abs(peers.peer_output(dense, TOKENS) - ours).max() > 0.01 * np.abs(ours).max()
    sparsify_(dense, tmp_path / "out" / FILE)
    np.testing.assert_array_equal(peers.peer_output(dense, TOKENS), peers.peer_output(theirs, TOKENS))


@pytest.fixture
def exported(tmp_path):
    peers.save_peer("llama", tmp_path / "model")
    model = load_model(tmp_path / "model")
    export_sparse(model, sparse_inputs(model), tmp_path / "out", tokens=TOKENS)
    return tmp_path / "out"


def test_generate(exported):
    """With a cache, the tokens that are likeliest without one."""
    model = load_sparse(exported)
    text = torch.as_tensor(TOKENS[:1, :5])
    written = model.generate(text, max_new_tokens=8, do_sample=False, pad_token_id=0)
    for _ in range(8):
        with torch.no_grad():
            text = torch.cat([text, model(text, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert written.tolist() == text.tolist()


def test_other_weights_are_refused(exported, tmp_path):
    model = peers.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="belongs to another model"):  # the heads were folded
        sparsify_(model, exported / FILE)
    rounded = peers.transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"type is torch.bfloat16: was it rounded") as error:
        sparsify_(rounded, exported / FILE)
    assert "SHA-256" in message(error)
    model.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / FILE).write_bytes((exported / FILE).read_bytes())
    with pytest.raises(ValueError, match="belongs to another model"):
        load_sparse(tmp_path / "other")


def test_half_precision_and_saving(exported, tmp_path):
    """The folder may be loaded in half precision, and saving the model leaves what drops coordinates out."""
    model = load_sparse(exported, dtype=torch.bfloat16)
    assert model(torch.as_tensor(TOKENS)).logits.dtype == torch.bfloat16
    assert not any("sparse_input" in name for name in model.state_dict())
    model.save_pretrained(tmp_path / "saved")
    peers.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_what_is_unknown_or_done_already_is_refused(exported):
    with pytest.raises(ValueError, match="unknown family of models None"):
        sparsify_(torch.nn.Linear(3, 3), exported / FILE)
    model = load_sparse(exported)
    with pytest.raises(ValueError, match="drops coordinates already"):
        sparsify_(model, exported / FILE)
    model.model.layers[1].mlp.up_proj = torch.nn.Sequential(model.model.layers[1].mlp.up_proj)
    with pytest.raises(ValueError, match=r"up_proj of this llama model is no single plain linear layer"):
        sparsify_(model, exported / FILE)
    del model.model.layers[1].mlp.up_proj
    with pytest.raises(ValueError, match="has 20 of the linear layers"):
        sparsify_(model, exported / FILE)


@needs_stories
def test_perplexity_of_stories260k(tmp_path):
    """Half of every input dropped by thresholds, on 1,000 tokens."""
    model = load_model(STORIES / "stories260K.bin")
    tokens = np.random.default_rng(0).integers(3, 512, (4, 256))
    inputs = {
        point: SparseInput(s.rotation, s.shift, threshold=0.3, inverse=s.inverse)
        for point, s in sparse_inputs(model).items()
    }
    export_sparse(model, inputs, tmp_path / "out", tokens=tokens[:, :64])
    theirs = peers.peer_output(load_sparse(tmp_path / "out"), tokens)
    ours = sparse_outputs(model, inputs, tokens)
    dense, *sparse = (
        float(cross_entropy(jnp.asarray(x), tokens).mean()) for x in (sparse_outputs(model, {}, tokens), ours, theirs)
    )
    assert abs(sparse[0] - dense) > 0.01 and sparse[0] == pytest.approx(sparse[1], abs=1e-3)


def test_tiny_models_have_both(tmp_path):
    """A model that was made here, not by transformers."""
    model = tiny("gpt2")
    export_sparse(model, sparse_inputs(model), tmp_path / "out")
    assert load_sparse(tmp_path / "out").config.model_type == "gpt2"
