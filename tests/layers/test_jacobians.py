"""Streamed statistics against dense formulas in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layer_kinds import D_IN, LAYERS, correlated_inputs, random_weights
from rotsparse._core.files import adopt
from rotsparse.data import moments as moments_module
from rotsparse.data.moments import Moments, chunks, covariance, evenly_spaced, stream_moments
from rotsparse.data.sources import ArrayRows
from rotsparse.layers import jacobians as jacobians_module
from rotsparse.layers.closed_moments import closed_moments
from rotsparse.layers.function import FunctionLayer
from rotsparse.layers.gated import GatedMLP
from rotsparse.layers.jacobians import (
    LayerStatistics,
    chunk_size,
    jacobian_gram,
    jacobian_moments,
    jacobians,
    one_at_a_time,
)
from rotsparse.layers.mlp import MLP, Dense
from rotsparse.layers.norms import layer_norm, rms_norm
from rotsparse.layers.subspace import Subspace


def mlp(rng, d_in=5, hidden=7, d_out=4):
    w_in = rng.standard_normal((hidden, d_in)).astype(np.float32)
    w_out = rng.standard_normal((d_out, hidden)).astype(np.float32)
    return MLP(w_in, rng.standard_normal(hidden).astype(np.float32), w_out, activation="gelu")


@pytest.mark.parametrize("n", [1, 6, 7, 20])
def test_chunks_hold_every_row_once_and_have_one_shape(n):
    x = np.arange(2 * n).reshape(n, 2)
    parts = list(chunks(x, 7))
    np.testing.assert_array_equal(np.concatenate([np.asarray(c)[:count] for c, count in parts]), x)
    assert {c.shape for c, _ in parts} == {(min(7, n), 2)}


@pytest.mark.parametrize(("rows", "count"), [(401, 400), (7200, 4000), (10, 3), (5, 5), (3, 9), (1, 1)])
def test_evenly_spaced_rows_are_as_many_as_asked_and_span_all(rows, count):
    taken = np.asarray(evenly_spaced(np.arange(rows), count))
    assert len(taken) == min(rows, count) and taken[0] == 0
    gaps = np.diff([*taken, rows])
    assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


def test_covariance_with_a_mean_far_larger_than_the_spread(rng, monkeypatch):
    monkeypatch.setattr(moments_module, "CHUNK_BYTES", 8 * 6 * 37)  # 37 rows a chunk: the last one is not full
    x = rng.standard_normal((1000, 6)) @ rng.standard_normal((6, 6)) + 1e6
    mean, cov = covariance(x)
    np.testing.assert_allclose(mean, x.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(cov, np.cov(x.T, bias=True), rtol=1e-8, atol=1e-9)


@given(cuts=st.lists(st.integers(0, 60), max_size=6), mean=st.sampled_from([0.0, 1e3, 1e8]))
def test_moments_are_those_of_all_rows_however_they_are_cut_and_merged(cuts, mean):
    x = np.random.default_rng(len(cuts)).standard_normal((60, 3)) + mean
    parts = [part for part in np.split(x, sorted(cuts)) if len(part)]
    moments = [Moments.none(3).with_block(part) for part in parts]
    for order in (moments, moments[::-1]):
        merged = functools.reduce(Moments.merged, [*order, Moments.none(3)])
        # What float64 has left of a spread of one beside such a mean, and no less.
        tolerance = 1e-13 + 4 * np.finfo(np.float64).eps * mean
        np.testing.assert_allclose(merged.covariance, np.cov(x.T, bias=True), atol=tolerance)
        np.testing.assert_allclose(merged.mean, x.mean(axis=0), rtol=1e-14, atol=1e-14)
        np.testing.assert_allclose(merged.rms, np.sqrt(np.mean(x**2)), rtol=1e-13)


class Interrupted(ArrayRows):
    """Rows of which the first few reads succeed."""

    def __init__(self, x, reads):
        ArrayRows.__init__(self, x)
        self.reads = reads

    def _rows(self, rows):
        if len(rows) < 3:  # only a look at it
            return ArrayRows._rows(self, rows)
        if not self.reads:
            raise ValueError("no more")
        self.reads -= 1
        return ArrayRows._rows(self, rows)


@pytest.mark.parametrize("reads", [0, 1, 3, 5])
def test_a_pass_that_was_interrupted_goes_on_with_the_same_bits(reads, rng, tmp_path, monkeypatch):
    monkeypatch.setattr(moments_module, "CHUNK_BYTES", 8 * 4 * 30)  # 30 rows a block, seven blocks
    x = rng.standard_normal((200, 4)).astype(np.float32) + 1000
    whole = stream_moments(ArrayRows(x))
    with pytest.raises(ValueError, match="no more"):
        stream_moments(Interrupted(x, reads), tmp_path / "m", save_seconds=0)
    for left in (7 - reads, 0):  # the rest, and then nothing
        moments = stream_moments(Interrupted(x, left), tmp_path / "m")
        assert moments.count == whole.count == 200
        np.testing.assert_array_equal(moments.mean, whole.mean)
        np.testing.assert_array_equal(moments.scatter, whole.scatter)
    np.testing.assert_allclose(whole.covariance, np.cov(x.T.astype(np.float64), bias=True), rtol=1e-9, atol=1e-9)


def test_saved_moments_of_other_data_are_refused_and_damaged_ones_computed_again(rng, tmp_path):
    x = rng.standard_normal((50, 4))
    adopt(tmp_path)  # as for the folder of a run: what is damaged is known to be rotsparse's own
    first = stream_moments(ArrayRows(x), tmp_path / "m")
    with pytest.raises(ValueError, match=r"m holds the moments of rows 0 to 50 .* not of rows 0 to 49 .*: remove it"):
        stream_moments(ArrayRows(x[1:]), tmp_path / "m")
    with pytest.raises(ValueError, match="remove it"):
        stream_moments(ArrayRows(2 * x), tmp_path / "m")
    payload = (tmp_path / "m").read_bytes()
    for damaged in (payload[:-30], payload[:200] + bytes([payload[200] ^ 1]) + payload[201:], b""):
        (tmp_path / "m").write_bytes(damaged)
        np.testing.assert_array_equal(stream_moments(ArrayRows(x), tmp_path / "m").scatter, first.scatter)


def test_a_file_of_the_users_is_refused_before_any_row_is_read(rng, tmp_path):
    (tmp_path / "m").write_text("notes")
    with pytest.raises(ValueError, match="m exists and was not written by rotsparse"):
        stream_moments(Interrupted(rng.standard_normal((50, 4)), 0), tmp_path / "m")
    assert (tmp_path / "m").read_text() == "notes"


def test_covariance_of_outputs(rng):
    layer, x = mlp(rng), rng.standard_normal((200, 5)).astype(np.float32)
    np.testing.assert_allclose(
        LayerStatistics(layer, x).outputs[1],
        np.cov(np.asarray(layer(x), np.float64).T, bias=True),
        rtol=1e-5,
        atol=1e-6,
    )


def test_jacobian_moments_against_autodiff(rng, x64, monkeypatch):
    monkeypatch.setattr(moments_module, "CHUNK_BYTES", 4 * 35 * 16)  # 16 examples a chunk
    layer, x = mlp(rng), jnp.asarray(rng.standard_normal((50, 5)))
    j = np.asarray(jax.vmap(jax.jacfwd(layer))(x))
    moments = jacobian_moments(layer, x)
    np.testing.assert_allclose(moments.mean, j.mean(axis=0), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(moments.gram_in, np.mean([a.T @ a for a in j], axis=0), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(moments.gram_out, np.mean([a @ a.T for a in j], axis=0), rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(jacobian_gram(layer, x), moments.gram_in)


@pytest.mark.parametrize("wide", [False, True])
def test_jacobians_come_in_order_and_scaled_by_the_rows_of_the_rotations(rng, monkeypatch, wide):
    monkeypatch.setattr(moments_module, "CHUNK_BYTES", 4 * 35 * 4)  # four examples a chunk
    if wide:  # one example fills what is computed at once
        monkeypatch.setattr(moments_module, "at_once_bytes", lambda: 1)
    layer, x = mlp(rng), jnp.asarray(rng.standard_normal((10, 5)), jnp.float32)
    scaled = np.diag([1.0, 2, 3, 4, 5])
    parts = list(jacobians(layer, x, scaled))
    assert [len(p) for p in parts] == ([7, 3] if wide else [4, 4, 2])  # then only the Jacobians, of 80 bytes, count
    expected = layer.jacobian(x) * np.arange(1, 6, dtype="f")
    np.testing.assert_allclose(np.concatenate(parts), expected, rtol=1e-5, atol=1e-5)


def test_chunk_size_counts_the_hidden_layer_and_never_falls_to_zero():
    wide = MLP(np.ones((3072, 768), np.float32), None, np.ones((768, 3072), np.float32))
    assert chunk_size(wide) == moments_module.CHUNK_BYTES // (4 * 768 * 3072)
    assert chunk_size(FunctionLayer(function=jnp.tanh, d_in=8, d_out=8), 4 * 64 * 10) == 10
    assert chunk_size(wide, 1) == 1


def test_wide_layers_take_one_example_at_a_time_on_a_cpu(rng, monkeypatch):
    def weights(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    wide = MLP(weights(300, 256), np.full(300, -9, np.float32), weights(256, 300))
    assert one_at_a_time(wide)
    assert one_at_a_time(Subspace(wide, np.eye(256, dtype="f"), np.eye(256, dtype="f")))
    few = wide.gathered(weights(20, 256) / 9)
    assert few.active is not None and not one_at_a_time(few)
    assert not one_at_a_time(Subspace(wide, np.eye(200, 256, dtype="f"), np.eye(256, dtype="f")))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not one_at_a_time(wide)  # accelerators are only busy with many examples


def test_the_jacobian_is_traced_once_however_many_chunks(rng, monkeypatch):
    monkeypatch.setattr(moments_module, "CHUNK_BYTES", 4 * 9 * 8)  # eight examples a chunk
    traces = []

    def function(x):
        traces.append(None)
        return jnp.tanh(x)

    layer, x = FunctionLayer(function=function, d_in=3, d_out=3), jnp.asarray(rng.standard_normal((50, 3)), jnp.float32)
    assert len(list(jacobians(layer, x))) == 7
    assert len(traces) == 1


def test_bad_inputs_are_named():
    with pytest.raises(ValueError, match=r"x should have shape \[examples, 5\]"):
        LayerStatistics(Dense(np.eye(5, dtype=np.float32)), np.ones((4, 6), np.float32))


KINDS = {
    **{kind: make for kind, make in LAYERS.items() if kind != "function"},
    "dense behind a norm": lambda rng: Dense(
        random_weights(rng, 7, D_IN), None, activation="gelu", norm=layer_norm(1 + random_weights(rng, D_IN))
    ),
    "gated behind a norm, with a skip": lambda rng: GatedMLP(
        random_weights(rng, 9, D_IN),
        random_weights(rng, 9, D_IN),
        random_weights(rng, D_IN, 9),
        norm=rms_norm(1 + random_weights(rng, D_IN)),
        skip=True,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_moments_from_the_gates_are_those_of_the_jacobians(rng, kind, monkeypatch):
    layer, x = KINDS[kind](rng), correlated_inputs(rng, 50)
    formed = jacobian_moments(layer, x)
    monkeypatch.setattr(moments_module, "CHUNK_BYTES", 8 * 7 * 30)  # several chunks, the last not full
    for found, expected in zip(closed_moments(layer, x), formed, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_wide_layers_take_their_moments_from_the_gates(rng, monkeypatch):
    layer, x = mlp(rng, 300, 20, 300), rng.standard_normal((12, 300)).astype(np.float32)
    from_gates = *jacobian_moments(layer, x), jacobian_gram(layer, x)
    monkeypatch.setattr(jacobians_module, "WIDE", 301)
    from_jacobians = *jacobian_moments(layer, x), jacobian_gram(layer, x)
    for found, expected in zip(from_gates, from_jacobians, strict=True):
        assert not np.array_equal(found, expected)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
