"""The autoencoder that a rotation is: it loses nothing, also as SAELens reads it."""

import json

import jax
import numpy as np
import pytest

from rotsparse._core.orthogonal import haar
from rotsparse.explain.sae import autoencoder, write_sae
from rotsparse.explain.vectors import write_vectors


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


def test_vectors_are_the_directions_by_name(case, tmp_path):
    r, *_ = case
    write_vectors(tmp_path / "vectors.json", r, side="in", hook_name="blocks.3.hook_resid_mid", layer=3)
    written = json.loads((tmp_path / "vectors.json").read_text())
    np.testing.assert_array_equal(np.asarray(written["vectors"], np.float32), r)
    assert written["config"]["vector_names"][11] == "in 11" and written["config"]["hook_layer"] == 3
    with pytest.raises(ValueError, match="exists"):
        write_vectors(tmp_path / "vectors.json", r, side="in")


@pytest.mark.peers
def test_saedashboard_loads_them(case, tmp_path):
    """It needs older versions of other libraries than the extra `peers` has: install it by itself for this test."""
    vector_set = pytest.importorskip("sae_dashboard.neuronpedia.vector_set", reason="needs sae-dashboard")
    import torch

    r, x, _ = case
    write_vectors(tmp_path / "vectors.json", r, side="out", model_name="m", hook_name="blocks.0.hook_mlp_out")
    loaded = vector_set.VectorSet.load(tmp_path / "vectors.json")
    np.testing.assert_allclose(loaded.encode(torch.tensor(x)).numpy(), x @ r.T, atol=1e-5)
    assert loaded.cfg.d_vectors == 12 and loaded.names[3] == "out 3"
