"""Every architecture against the transformers library: same tensors, same logits, and back again."""

import numpy as np
import pytest

from rotsparse.models.huggingface import load_huggingface, save_huggingface
from rotsparse.models.transformer import run

pytestmark = pytest.mark.peers
peers = pytest.importorskip("transformers_peers")

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 17))


@pytest.mark.parametrize("name", peers.configurations())
def test_logits_agree(name, tmp_path):
    theirs = peers.save_peer(name, tmp_path / "model")
    model = load_huggingface(tmp_path / "model")
    expected = peers.peer_output(theirs, TOKENS)
    ours = np.asarray(run(model.params, model.config, TOKENS)[0])
    assert np.abs(expected).max() > 0.5  # the comparison would be idle on vanishing logits
    np.testing.assert_allclose(ours, expected, atol=1e-4)


@pytest.mark.parametrize("name", peers.configurations())
def test_export_loads_again(name, tmp_path):
    theirs = peers.save_peer(name, tmp_path / "model")
    save_huggingface(load_huggingface(tmp_path / "model"), tmp_path / "again", shard_bytes=20_000)
    again = type(theirs).from_pretrained(tmp_path / "again", attn_implementation="eager").eval()
    np.testing.assert_allclose(peers.peer_output(again, TOKENS), peers.peer_output(theirs, TOKENS), atol=2e-5)
