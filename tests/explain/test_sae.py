"""The autoencoder that a rotation is: it loses nothing, also as SAELens reads it."""

import json

import jax
import numpy as np
import pytest

from rotsparse._core.orthogonal import haar
from rotsparse.explain.sae import autoencoder, write_sae


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    r = np.asarray(haar(jax.random.key(0), 12))
    return r, rng.standard_normal((40, 12)).astype(np.float32) + 3, np.full(12, 3.0)


def test_nothing_is_lost_and_features_are_the_coordinates(case):
    r, x, mean = case
    w = autoencoder(r, mean)
    features = np.maximum((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0)
    np.testing.assert_allclose(features @ w["W_dec"] + w["b_dec"], x, atol=1e-5)
    z = (x - mean) @ r.T
    np.testing.assert_allclose(features[:, :12] - features[:, 12:], z, atol=1e-5)
    assert (features > 0).sum(axis=1).max() <= 12, "one of the two features of a direction is zero"


def test_the_folder(case, tmp_path):
    r, _, mean = case
    write_sae(tmp_path / "sae", r, mean, metadata={"hook_name": "blocks.0.hook_mlp_out"})
    config = json.loads((tmp_path / "sae/cfg.json").read_text())
    assert (config["architecture"], config["d_in"], config["d_sae"]) == ("standard", 12, 24)
    with pytest.raises(ValueError, match="exists"):
        write_sae(tmp_path / "sae", r, mean, metadata={})


@pytest.mark.peers
def test_saelens_loads_it(case, tmp_path):
    sae_lens = pytest.importorskip("sae_lens", reason="needs the extra `peers`")
    import torch

    r, x, mean = case
    write_sae(tmp_path / "sae", r, mean, metadata={"hook_name": "blocks.0.hook_mlp_out", "model_name": "m"})
    sae = sae_lens.SAE.load_from_disk(tmp_path / "sae")
    with torch.no_grad():
        features = sae.encode(torch.tensor(x))
        np.testing.assert_allclose(sae.decode(features).numpy(), x, atol=1e-5)
        np.testing.assert_allclose(sae(torch.tensor(x)).numpy(), x, atol=1e-5)
    w = autoencoder(r, mean)
    np.testing.assert_allclose(features.numpy(), np.maximum((x - w["b_dec"]) @ w["W_enc"], 0), atol=1e-5)
    assert sae.cfg.metadata.hook_name == "blocks.0.hook_mlp_out"
