"""Sources: the rows of files, stores and datasets are those of the array, and what is wrong with them is said."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotsparse._core.errors import CheckError
from rotsparse.data import sources
from rotsparse.data.open import open_source
from rotsparse.data.sources import Dataset, Mapped, NpyFile, RowRange, Shards, as_source, read_ahead
from rotsparse.data.store import StoreWriter, open_store
from rotsparse.engine.run import Run
from rotsparse.fit.find_rotations import find_rotations
from rotsparse.fit.minimize import minimize
from rotsparse.layers.mlp import MLP
from rotsparse.objectives import ActivationSparsity, JacobianSparsity
from rotsparse.objectives.measures import Log
from rotsparse.solvers import Riemannian

N, WIDTH = 40, 3


@pytest.fixture
def x(rng):
    return rng.standard_normal((N, WIDTH)).astype(np.float32)


def store(folder, x, shard=7):
    """A store as `rotsparse capture` writes it."""
    writer = StoreWriter(folder, {"model": "none", "width": x.shape[1]})
    for i, begin in enumerate(range(0, len(x), shard)):
        writer.write(i, x[begin : begin + shard])
    return writer.finish()


def every_kind(folder, x):
    """The same rows as every kind of source."""
    np.save(folder / "x.npy", x)
    np.save(folder / "first.npy", x[:11])
    np.save(folder / "last.npy", x[11:].astype(np.float64))
    store(folder / "store", x)
    return {
        "npy": open_source(folder / "x.npy"),
        "files": open_source([folder / "first.npy", folder / "last.npy"]),
        "store": open_source(folder / "store"),
        "map": as_source(np.load(folder / "x.npy", mmap_mode="r")),
        "dataset": as_source(dict(enumerate(x))),
        "array": sources.ArrayRows(x),
        "range": RowRange(sources.ArrayRows(np.concatenate([x[:5], x, x])), range(5, 5 + N)),
        "mapped": Mapped(sources.ArrayRows(np.concatenate([x, x], axis=1)), lambda rows: rows[:, :WIDTH]),
    }


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    x = np.random.default_rng(0).standard_normal((N, WIDTH)).astype(np.float32)
    return x, every_kind(tmp_path_factory.mktemp("kinds"), x)


KINDS = ["npy", "files", "store", "map", "dataset", "array", "range", "mapped"]


@pytest.mark.parametrize("kind", KINDS)
@given(rows=st.lists(st.integers(0, N - 1), max_size=60))
def test_rows_in_any_order_and_repeated(kinds, kind, rows):
    x, source = kinds[0], kinds[1][kind]
    assert source.shape == (N, WIDTH) and len(source) == N
    read = source.read(np.array(rows, int))
    assert read.shape == (len(rows), WIDTH) and read.dtype in (np.float32, np.float64)
    np.testing.assert_array_equal(read, x[rows])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_outside_the_source(kinds, kind):
    x, source = kinds[0], kinds[1][kind]
    for rows in ([-1], [0, N], range(N - 1, N + 2)):
        with pytest.raises(ValueError, match=f"are outside .*which has {N}"):
            source.read(np.array(rows))
    np.testing.assert_array_equal(source[-1], x[-1])
    with pytest.raises(IndexError):
        source[N]


def test_types_and_byte_orders(x, tmp_path):
    for dtype in ("<f2", ">f4", "<f8"):
        np.save(tmp_path / "x.npy", x.astype(dtype))
        read = open_source(tmp_path / "x.npy").read(np.array([5, 2, 2]))
        assert read.dtype == (np.float64 if dtype == "<f8" else np.float32)
        np.testing.assert_array_equal(read, x.astype(dtype)[[5, 2, 2]])


def test_a_memory_map_may_be_a_range_of_rows(x, tmp_path):
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    np.testing.assert_array_equal(as_source(mapped[10:30][5:]).read(range(15)), x[15:30])
    for bad in (mapped[:, :2], mapped[::2], mapped[0], np.load(tmp_path / "x.npy", mmap_mode="c")):
        with pytest.raises(ValueError, match=r"a memory map should be .* load it with np\.array"):
            as_source(bad)


def test_arrays_stay_in_memory(x):
    assert all(as_source(a) is None for a in (x, x.tolist(), tuple(x), None, 3.0))


def test_the_part_that_is_kept_is_spread_over_the_source_and_always_the_same():
    source = sources.ArrayRows(np.arange(1000.0)[:, None])
    part = source.part(100)[:, 0]
    np.testing.assert_array_equal(part // 10, np.arange(100))  # one of every ten
    assert len(set(part % 10)) == 10  # at no fixed distance
    np.testing.assert_array_equal(part, source.part(100)[:, 0])
    np.testing.assert_array_equal(source.part(2000)[:, 0], np.arange(1000))


def test_the_part_that_is_kept_is_bounded_in_bytes(monkeypatch):
    monkeypatch.setattr(sources, "RESIDENT_BYTES", 4 * 8 * 10)
    assert sources.ArrayRows(np.zeros((50, 8))).resident().shape == (10, 8)
    assert sources.ArrayRows(np.zeros((5, 8))).resident().shape == (5, 8)


def test_reading_ahead_keeps_the_order_and_passes_errors_on():
    assert list(read_ahead(lambda i=i: i for i in range(5))) == list(range(5))
    assert list(read_ahead([])) == []

    def fails():
        raise ValueError("this one")

    results = read_ahead([lambda: 1, fails, lambda: 3])
    assert next(results) == 1
    with pytest.raises(ValueError, match="this one"):
        next(results)


def test_a_grain_pipeline(x):
    grain = pytest.importorskip("grain")
    pipeline = grain.MapDataset.source(sources.ArrayRows(x)).seed(1).shuffle().map(lambda row: 2 * row)
    source = as_source(pipeline[::2])
    order = np.argsort(source.read(range(N // 2))[:, 0])
    rows = np.stack([pipeline[2 * i] for i in range(N // 2)])
    assert source.shape == (N // 2, WIDTH)
    np.testing.assert_array_equal(source.read(order), rows[order])
    with pytest.raises(ValueError, match="leave out `repeat`"):
        as_source(pipeline.repeat())
    with pytest.raises(ValueError, match=r"element \d+ of FilterMapDataset .* got nothing \(it was filtered out\)"):
        as_source(pipeline.filter(lambda row: row[0] > 0)).read(range(N))


# --- fits from sources --------------------------------------------------------------------------------------------

KEY = jax.random.key(0)
FULL = Riemannian(optax.adam(0.05), steps=60)
MINIBATCH = Riemannian(optax.adam(0.05), steps=60, batch_size=8)
OPTIONS: dict[str, Any] = {"key": KEY, "method": MINIBATCH, "restarts": 2}


def fit(layer, x, **changes: Any):
    return find_rotations(layer, x, **{**OPTIONS, **changes})


@pytest.fixture
def problem(rng, tmp_path, monkeypatch):
    """A layer, its inputs, and a store of them of which a fifth is kept in memory."""
    layer = MLP(
        rng.standard_normal((8, WIDTH)).astype(np.float32),
        rng.standard_normal(8).astype(np.float32),
        rng.standard_normal((4, 8)).astype(np.float32),
        activation="gelu",
    )
    x = rng.standard_normal((300, WIDTH)).astype(np.float32)
    monkeypatch.setattr(sources, "RESIDENT_EXAMPLES", 60)
    return layer, x, store(tmp_path / "store", x, shard=50)


def test_a_fit_from_a_source_sees_the_examples_that_a_fit_from_the_array_sees(problem):
    layer, x, source = problem
    start = {"in": jnp.eye(WIDTH), "out": jnp.eye(4)}
    from_source = JacobianSparsity(layer, source, Log(0.1))
    assert len(from_source.x) == 60
    from_array = JacobianSparsity(layer, x, Log(0.1))
    np.testing.assert_array_equal(from_source.covariance, from_array.covariance)  # of all rows, either way
    # The mean Jacobian Gram matrix is that of the part in memory: take it from there.
    from_array = eqx.tree_at(lambda o: o.gram, from_array, from_source.gram)
    validation = from_array.on(x[:100])
    one, other = (
        minimize(objective, start, validation=validation, **OPTIONS) for objective in (from_source, from_array)
    )
    np.testing.assert_array_equal(one.history.objective, other.history.objective)
    np.testing.assert_array_equal(one.bases["in"], other.bases["in"])


def test_sources_that_fit_into_memory_are_arrays(problem, monkeypatch):
    layer, x, source = problem
    monkeypatch.setattr(sources, "RESIDENT_EXAMPLES", 300)
    one, other = (fit(layer, data, method=FULL) for data in (source, x))
    assert one.value == other.value


def test_activations_from_a_source(problem):
    _, x, source = problem
    one, other = (ActivationSparsity(data, Log(0.1)) for data in (source, x))
    np.testing.assert_allclose(one.rms, other.rms, rtol=1e-6)
    solution = minimize(one, {"in": jnp.eye(WIDTH)}, key=KEY, method=MINIBATCH)
    assert solution.value < solution.start_value


def test_an_interrupted_fit_from_a_source_goes_on_with_the_same_bits(problem, tmp_path):
    layer, _, source = problem
    whole = find_rotations(layer, source, **OPTIONS)
    shard = tmp_path / "store/00003.npy"
    payload = shard.read_bytes()
    calls = []

    class Vanishing(sources.Source):
        """A shard of the store goes missing while the fit runs, after a few blocks of minibatches."""

        shape = source.shape

        def where(self, row):
            return source.where(row)

        def _rows(self, rows):
            calls.append(len(rows))
            if calls.count(8 * 2 * 20) == 2:  # the second chunk of 20 steps of two restarts
                shard.unlink(missing_ok=True)
            return source._rows(rows)

    run = Run(tmp_path / "run", every_steps=20)
    with pytest.raises(ValueError, match=r"cannot read .*00003\.npy: .*Put it back"):
        find_rotations(layer, Vanishing(), run=run, **OPTIONS)
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))
    shard.write_bytes(payload)
    resumed = find_rotations(layer, source, run=run, **OPTIONS)
    assert resumed.stats["resumed_at"] == 20
    np.testing.assert_array_equal(resumed.history.objective, whole.history.objective)
    np.testing.assert_array_equal(resumed.bases["out"], whole.bases["out"])


MEMORY = """
import sys
import jax, numpy as np, optax
import rotsparse as rs

rng = np.random.default_rng(0)
layer = rs.MLP(*(rng.standard_normal(shape, np.float32) / 8 for shape in [(64, 64), 64, (64, 64)]), activation="gelu")
source = rs.open_source([sys.argv[1]] * int(sys.argv[2]))
method = rs.Riemannian(optax.adam(0.05), steps=200, batch_size=64)
assert rs.find_rotations(layer, source, key=jax.random.key(0), method=method).result.ok
# `getrusage` would count the memory of the process that started this one, too.
print(1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux's /proc")
def test_memory_does_not_grow_with_the_data(rng, tmp_path):
    np.save(tmp_path / "x.npy", rng.standard_normal((2**18, 64), np.float32))  # 64 MB
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "x.npy")]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    small, large = (int(subprocess.check_output([*command, copies], text=True, env=env)) for copies in ("4", "16"))
    print(f"4 files: {small / 2**20:.0f} MB, 16 files: {large / 2**20:.0f} MB")
    assert large - small < 0.15 * 12 * 2**26  # of what was added to the data


def test_fits_that_a_source_cannot_serve(problem):
    layer, x, source = problem
    with pytest.raises(ValueError, match=r"the store .*store is too large .*: give the method a batch_size"):
        find_rotations(layer, source, key=KEY, method=FULL)
    with pytest.raises(ValueError, match=r"x should have shape \[examples, 3\]"):
        find_rotations(layer, sources.ArrayRows(x[:, :2]), key=KEY)
    with pytest.raises(ValueError, match="validation: all 60 examples are equal"):
        fit(layer, source, validation=sources.ArrayRows(np.ones_like(x)))


# --- what can be wrong --------------------------------------------------------------------------------------------


def test_a_shard_that_is_gone_has_shrunk_or_holds_nan(x, tmp_path):
    source = store(tmp_path / "store", x)
    shard = tmp_path / "store/00002.npy"  # rows 14 to 20
    whole = shard.read_bytes()
    with shard.open("r+b") as f:
        f.seek(-WIDTH * 4 * 2, 2)  # the last but one of its rows
        f.write(np.float32(np.nan).tobytes())
    with pytest.raises(ValueError, match=r"1 of 40 rows .* NaN or infinity, the first is row 5 of .*00002\.npy"):
        source.read(range(N))
    shard.write_bytes(whole[: -WIDTH * 4 * 2])
    with pytest.raises(ValueError, match=r"cannot read .*00002\.npy: it has become shorter .* before its row 5 of 7"):
        source.read(range(N))
    with pytest.raises(ValueError, match=r"cannot read .*00002\.npy: it ends before its row 5 of 7"):
        open_store(tmp_path / "store")
    shard.unlink()
    with pytest.raises(ValueError, match=r"cannot read .*00002\.npy: .*No such file.* Put it back"):
        source.read(range(N))
    np.testing.assert_array_equal(source.read(range(14)), x[:14])  # what is not asked for is not missed
    shard.write_bytes(whole)
    np.testing.assert_array_equal(source.read(range(N)), x)


def test_where_the_rows_of_ranges_and_functions_come_from(x, tmp_path):
    np.save(tmp_path / "x.npy", np.where(np.arange(N)[:, None] == 17, np.inf, x))
    part = RowRange(open_source(tmp_path / "x.npy"), range(10, 30))
    for source in (part, Mapped(part, np.abs)):
        with pytest.raises(ValueError, match=r"contain NaN or infinity, the first is row 17 of .*x\.npy"):
            source.read(range(20))
    with pytest.raises(ValueError, match=r"the first is what a function made of row 3 of .*x\.npy"):
        Mapped(open_source(tmp_path / "x.npy"), lambda rows: np.where(rows == x[3], np.nan, rows)).read(np.array([3]))


def test_a_manifest_that_does_not_fit_its_shards(x, tmp_path):
    store(tmp_path / "store", x)
    path = tmp_path / "store/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][1]["rows"] += 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckError, match=r"manifest\.json is damaged"):  # its rows do not add up
        open_store(tmp_path / "store")
    manifest["rows"] += 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"00001\.npy has shape \[7, 3\], expected \[8, 3\]"):
        open_store(tmp_path / "store")


def test_files_that_hold_something_else(x, tmp_path):
    cases = {"integers": np.ones((3, 3), int), "vector": np.ones(3), "fortran": np.asfortranarray(x)}
    for name, array in cases.items():
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(ValueError, match=rf"{name}\.npy holds .*: expected floating-point numbers \[examples, wid"):
            NpyFile(tmp_path / f"{name}.npy")
    (tmp_path / "text.npy").write_text("no array")
    for name in ("text", "absent"):
        with pytest.raises(ValueError, match=rf"cannot read .*{name}\.npy"):
            NpyFile(tmp_path / f"{name}.npy")
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "wide.npy", np.ones((2, WIDTH + 1)))
    with pytest.raises(ValueError, match=r"wide\.npy \[2, 4\] is 4 wide and .* 3: expected one width"):
        open_source([tmp_path / "x.npy", tmp_path / "wide.npy"])
    with pytest.raises(ValueError, match="at least one"):
        Shards([])


def test_datasets_that_end_early_or_change_their_width(x):
    class Shrinking(dict):
        def __len__(self):
            return N

    with pytest.raises(ValueError, match=r"cannot read element 30 of Shrinking of 40: KeyError"):
        Dataset(Shrinking(enumerate(x[:30]))).read(range(N))
    with pytest.raises(ValueError, match=r"element 3 of dict has shape \[2\], expected \[3\]"):
        Dataset(dict(enumerate(x[:3])) | {3: x[3, :2]}).read(range(4))
    with pytest.raises(ValueError, match=r"element 0 of dict should be a vector .* got int64 \[2\]"):
        Dataset({0: np.array([1, 2])})


def test_more_rows_than_can_be_drawn(monkeypatch, x, tmp_path):
    monkeypatch.setattr(sources, "MOST_ROWS", N - 1)
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(ValueError, match="has 40 rows: at most 39"):
        as_source(open_source(tmp_path / "x.npy"))
