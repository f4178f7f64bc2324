"""Rotations: the group operations, and files that round trip bitwise or are refused."""

import json
import os
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from helpers import random_orthogonal
from rotsparse._core.files import write_atomically
from rotsparse.layers.rotations import Rotations

pytestmark = pytest.mark.usefixtures("strict")


@pytest.fixture
def rotations():
    return Rotations.haar(jax.random.key(0), 5, 7)


def assert_same_bits(a: Rotations, b: Rotations):
    for x, y in ((a.r_in, b.r_in), (a.r_out, b.r_out)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


# --- the group ----------------------------------------------------------------------------------------------------


def test_identity_is_the_neuron_basis(rng):
    x, y = rng.standard_normal((3, 5)), rng.standard_normal((3, 7))
    identity = Rotations.identity(5, 7)
    np.testing.assert_array_equal(identity.apply_in(x), x)
    np.testing.assert_array_equal(identity.apply_out(y), y)
    assert identity.orthogonality_error() == 0


def test_haar_sides_are_orthogonal_independent_and_keyed(rotations):
    assert rotations.r_in.shape == (5, 5) and rotations.r_out.shape == (7, 7)
    assert rotations.orthogonality_error() < 1e-6
    assert_same_bits(rotations, Rotations.haar(jax.random.key(0), 5, 7))
    square = Rotations.haar(jax.random.key(0), 6, 6)
    assert jnp.abs(square.r_in - square.r_out).max() > 0.1
    assert jnp.abs(square.r_in - Rotations.haar(jax.random.key(1), 6, 6).r_in).max() > 0.1


def test_apply_is_the_matrix_on_every_example(rotations, rng):
    x, y = rng.standard_normal((2, 3, 5)).astype("f4"), rng.standard_normal((4, 7)).astype("f4")
    np.testing.assert_allclose(rotations.apply_in(x)[1, 2], rotations.r_in @ x[1, 2], atol=1e-6)
    np.testing.assert_allclose(rotations.apply_out(y)[3], rotations.r_out @ y[3], atol=1e-6)
    assert rotations.apply_in(x).shape == x.shape


def test_inverse_undoes(rotations, rng):
    x, y = rng.standard_normal((4, 5)).astype("f4"), rng.standard_normal((4, 7)).astype("f4")
    np.testing.assert_allclose(rotations.inverse().apply_in(rotations.apply_in(x)), x, atol=1e-6)
    np.testing.assert_allclose(rotations.inverse().apply_out(rotations.apply_out(y)), y, atol=1e-6)
    assert_same_bits(rotations.inverse().inverse(), rotations)


def test_compose_applies_the_argument_first(rotations, rng):
    first = Rotations.haar(jax.random.key(9), 5, 7)
    x, y = rng.standard_normal((4, 5)).astype("f4"), rng.standard_normal((4, 7)).astype("f4")
    both = rotations.compose(first)
    np.testing.assert_allclose(both.apply_in(x), rotations.apply_in(first.apply_in(x)), atol=1e-6)
    np.testing.assert_allclose(both.apply_out(y), rotations.apply_out(first.apply_out(y)), atol=1e-6)
    np.testing.assert_allclose(rotations.compose(rotations.inverse()).r_in, np.eye(5), atol=1e-6)


def test_orthogonality_error_sees_both_sides(rotations):
    assert Rotations(1.0001 * rotations.r_in, rotations.r_out).orthogonality_error() == pytest.approx(2e-4, rel=0.01)
    assert Rotations(rotations.r_in, 1.0001 * rotations.r_out).orthogonality_error() == pytest.approx(2e-4, rel=0.01)


def test_they_are_a_pytree_that_jit_and_vmap_take(rotations):
    assert len(jax.tree.leaves(rotations)) == 2
    x = jnp.ones((2, 5))
    np.testing.assert_allclose(jax.jit(lambda r, x: r.apply_in(x))(rotations, x), rotations.apply_in(x), atol=1e-6)
    stacked = jax.tree.map(lambda *r: jnp.stack(r), rotations, rotations.inverse())
    both = jax.vmap(lambda r: r.compose(r.inverse()))(stacked)
    np.testing.assert_allclose(both.r_out, np.broadcast_to(np.eye(7), (2, 7, 7)), atol=1e-6)


BAD = {
    "not square": (np.eye(4, 5, dtype="f4"), r"r_in should be square, got \[4, 5\]"),
    "a vector": (np.ones(5, dtype="f4"), r"r_in should have shape \[any, any\].*got \[5\]"),
    "not orthogonal": (1.1 * np.eye(5, dtype="f4"), r"r_in is not orthogonal: .* is 0.21, expected"),
    "NaN": (np.full((5, 5), np.nan, "f4"), "r_in contains NaN or infinity"),
    "integers": (np.eye(5, dtype="i4"), "r_in should be float32 or float64, got int32"),
    "half precision": (np.eye(5, dtype="f2"), "r_in should be float32 or float64, got float16"),
    "empty": (np.zeros((0, 0), "f4"), "r_in is empty"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_is_no_rotation_is_refused(bad):
    matrix, message = BAD[bad]
    with pytest.raises(ValueError, match=message):
        Rotations(matrix, np.eye(7, dtype="f4"))


def test_the_message_names_the_side():
    with pytest.raises(ValueError, match="r_out is not orthogonal"):
        Rotations(np.eye(5), 2 * np.eye(7))


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_round_trip_is_bitwise_with_metadata(dtype, tmp_path, rng):
    r_in, r_out = (random_orthogonal(rng, d).astype(dtype) for d in (5, 7))
    rotations = Rotations(r_in, r_out)
    metadata = {"seed": 3, "measure": {"name": "log", "eps": 0.1}, "note": "naïve Σ", "losses": [0.5, None]}
    rotations.save(tmp_path / "rotations.safetensors", metadata)
    loaded, loaded_metadata = Rotations.load(tmp_path / "rotations.safetensors")
    assert_same_bits(loaded, rotations)
    assert loaded_metadata == metadata
    assert os.listdir(tmp_path) == ["rotations.safetensors"]


def test_transposed_and_jax_arrays_are_saved_as_what_they_are(rotations, tmp_path):
    """A transposed NumPy array is not contiguous: its bytes in memory are another matrix."""
    turned = Rotations(np.asarray(rotations.r_in).T, rotations.r_out.T)
    turned.save(str(tmp_path / "r"))
    assert_same_bits(Rotations.load(str(tmp_path / "r"))[0], turned)
    assert Rotations.load(tmp_path / "r")[1] == {}


def test_the_file_is_plain_safetensors(rotations, tmp_path):
    rotations.save(tmp_path / "r")
    tensors = load_file(tmp_path / "r")
    assert set(tensors) == {"r_in", "r_out"}
    np.testing.assert_array_equal(tensors["r_out"], rotations.r_out)


def test_any_other_writer_will_do(rotations, tmp_path):
    save_file({"r_in": np.asarray(rotations.r_in), "r_out": np.asarray(rotations.r_out)}, tmp_path / "r")
    loaded, metadata = Rotations.load(tmp_path / "r")
    assert_same_bits(loaded, rotations)
    assert metadata == {}


def test_every_truncation_is_refused(rotations, tmp_path):
    path = tmp_path / "r"
    rotations.save(path, {"seed": 1})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cannot read rotations from .*/r"):
            Rotations.load(path)


def test_missing_file_and_folder(tmp_path, rotations):
    with pytest.raises(ValueError, match=r"cannot read rotations from .*absent"):
        Rotations.load(tmp_path / "absent")
    with pytest.raises(ValueError, match="cannot read rotations from"):
        Rotations.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        rotations.save(tmp_path / "nowhere" / "r")


BAD_FILES = {
    "other tensors": ({"w": np.eye(3)}, r"holds \['w'\], expected r_in and r_out: is it a rotations file"),
    "one side": ({"r_in": np.eye(3)}, r"holds \['r_in'\], expected r_in and r_out"),
    "not orthogonal": ({"r_in": np.eye(3), "r_out": np.ones((2, 2))}, "r_out is not orthogonal"),
    "not square": ({"r_in": np.eye(3, 2), "r_out": np.eye(2)}, "r_in should be square"),
    "integers": ({"r_in": np.eye(3, dtype=int), "r_out": np.eye(2)}, "r_in should be float32 or float64, got int64"),
    "half": ({"r_in": np.eye(3, dtype="f2"), "r_out": np.eye(2)}, "r_in should be float32 or float64, got float16"),
    "NaN": ({"r_in": np.full((3, 3), np.nan), "r_out": np.eye(2)}, "r_in contains NaN"),
    "bfloat16": ({"r_in": jnp.eye(3, dtype=jnp.bfloat16), "r_out": np.eye(2)}, "r_in .*bfloat16"),
}


@pytest.mark.parametrize("bad", BAD_FILES)
def test_a_file_of_something_else_is_refused_by_name(bad, tmp_path):
    tensors, message = BAD_FILES[bad]
    save_file({name: np.asarray(t) for name, t in tensors.items()}, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        Rotations.load(tmp_path / "wrong.safetensors")
    assert "wrong.safetensors" in str(error.value)


def test_foreign_metadata_is_refused(tmp_path):
    save_file({"r_in": np.eye(2), "r_out": np.eye(2)}, tmp_path / "r", metadata={"rotsparse": "not json"})
    with pytest.raises(ValueError, match="metadata"):
        Rotations.load(tmp_path / "r")


def test_unserialisable_metadata_writes_nothing(rotations, tmp_path):
    rotations.save(tmp_path / "r", {"seed": 1})
    before = (tmp_path / "r").read_bytes()
    with pytest.raises(TypeError):
        rotations.save(tmp_path / "r", {"function": json.dumps})
    assert (tmp_path / "r").read_bytes() == before


@pytest.mark.parametrize("stage", ["fsync", "stat", "rename"])
@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_the_earlier_file(stage, fault, rotations, tmp_path, monkeypatch):
    path = tmp_path / "r"
    Rotations.identity(5, 7).save(path, {"seed": 1})
    before = path.read_bytes()

    def fail(*_, **__):
        raise fault

    monkeypatch.setattr(os, stage, fail)
    with pytest.raises(type(fault)):
        rotations.save(path, {"seed": 2})
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["r"]  # and no debris
    rotations.save(path, {"seed": 2})
    assert Rotations.load(path)[1] == {"seed": 2}


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
def test_a_written_file_has_the_mode_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    write_atomically(tmp_path / "atomic", b"payload")
    assert stat.S_IMODE((tmp_path / "atomic").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert (tmp_path / "atomic").read_bytes() == b"payload"
