"""What every baseline does on every kind of layer. Add a new one to `NAMES`."""

import jax
import numpy as np
import pytest

from layer_kinds import LAYERS, correlated_inputs
from rotsparse.evaluation import baselines

NAMES = [
    "neurons",
    "haar",
    "pca",
    "pca_uncentred",
    "svd_weights",
    "sparse_weights",
    "svd_mean_jacobian",
    "svd_mean_jacobian_weighted",
    "svd_varimax",
    "triangular",
    "jacobian_gram",
    "ica",
    "varimax",
    "hadamard",
]

OF_WEIGHTS = {"svd_weights", "sparse_weights"}


@pytest.mark.parametrize("kind", LAYERS)
def test_it_is_orthogonal_of_the_layers_size_and_the_same_again(kind, rng):
    layer, x = LAYERS[kind](rng), correlated_inputs(rng)
    bases = baselines.all_baselines(layer, x, key=jax.random.key(3))
    assert list(bases) == [name for name in NAMES if name not in OF_WEIGHTS or kind != "function"]
    again = baselines.all_baselines(layer, x, key=jax.random.key(3))
    for name, r in bases.items():
        assert r.r_in.shape == (layer.d_in, layer.d_in), name
        assert r.r_out.shape == (layer.d_out, layer.d_out), name
        assert r.r_in.dtype == r.r_out.dtype == np.float32
        assert r.orthogonality_error() < 1e-6, name
        np.testing.assert_array_equal(r.r_in, again[name].r_in, err_msg=name)
        np.testing.assert_array_equal(r.r_out, again[name].r_out, err_msg=name)


def test_alone_it_is_the_same_as_among_all(rng):
    layer, x = LAYERS["mlp"](rng), correlated_inputs(rng)
    bases = baselines.all_baselines(layer, x, key=jax.random.key(0))
    for name in set(NAMES) - {"neurons", "haar", "ica", "hadamard", "svd_weights"}:
        np.testing.assert_array_equal(getattr(baselines, name)(layer, x).r_out, bases[name].r_out, err_msg=name)
