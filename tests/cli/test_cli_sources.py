"""`rotsparse fit` and its relatives with activations that stay on disk, and on several devices."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from rotsparse.cli.arguments import mesh
from rotsparse.data import sources
from rotsparse.data.store import StoreWriter
from rotsparse.layers import files as layer_files

D = 6


@pytest.fixture
def files(folder, rng):
    """The current folder, with a layer and its inputs: a file and a store."""
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    np.savez("layer.npz", w_in=draw(9, D), b_in=draw(9), w_out=draw(4, 9))
    x = draw(100, D)
    np.save("x.npy", x)
    writer = StoreWriter(folder / "store", {"model": "none", "width": D})
    for i in range(4):
        writer.write(i, x[25 * i : 25 * (i + 1)])
    writer.finish()
    return folder


@pytest.fixture
def on_disk(monkeypatch):
    """Everything stays on disk, and a fit keeps twenty examples in memory."""
    monkeypatch.setattr(layer_files, "LOADED_BYTES", 0)
    monkeypatch.setattr(sources, "RESIDENT_EXAMPLES", 20)


def fit(activations, out, *more):
    options = ["fit", "--layer", "layer.npz", "--activations", activations, "--out", out, "--steps", "20"]
    return [*options, "--restarts", "1", "--control", "none", "--solver", "annealing", *more]


def test_what_is_small_is_loaded(files, monkeypatch):
    x = np.load("x.npy")
    for path in ("x.npy", "store"):
        loaded = layer_files.open_activations(path, D)
        assert isinstance(loaded, np.ndarray)
        np.testing.assert_array_equal(loaded, x)
    monkeypatch.setattr(layer_files, "LOADED_BYTES", x.nbytes - 1)
    assert all(isinstance(layer_files.open_activations(path, D), sources.Source) for path in ("x.npy", "store"))


@pytest.mark.parametrize("loaded_bytes", [0, layer_files.LOADED_BYTES])
def test_a_damaged_store_is_not_fitted_to(files, rotsparse, monkeypatch, loaded_bytes):
    """One bit of one number, that leaves it finite, whether the store is loaded or stays on disk."""
    monkeypatch.setattr(layer_files, "LOADED_BYTES", loaded_bytes)
    shard = files / "store" / "00002.npy"
    content = bytearray(shard.read_bytes())
    content[-4] ^= 1
    shard.write_bytes(content)
    code, said = rotsparse(*fit("store", "run"))
    assert code == 2 and "store/00002.npy is damaged: remove the store and capture again" in said
    assert not (files / "run").exists()


def test_what_stays_on_disk(files, rotsparse, on_disk):
    seen = []
    for activations in ("x.npy", "store"):
        code, said = rotsparse(*fit(activations, f"{activations}-run"))
        assert code == 0 and "comparing with the baselines on 20 held-out examples" in said  # the last fifth
        assert "drew from 80 examples on disk; the baselines were fitted on 20 of them" in said
        assert "baselines were fitted on 20 of them" in (files / f"{activations}-run/report.html").read_text()
        seen.append(json.loads((files / f"{activations}-run/metrics.json").read_text()))
    assert seen[0]["metrics"] == seen[1]["metrics"] and seen[0]["objective"] == seen[1]["objective"]

    # held-out activations on disk, and everything else that reads a layer's inputs
    inputs = ("--layer", "layer.npz", "--activations", "store", "--test-activations", "x.npy")
    rotations = ("--rotations", "store-run/rotations.safetensors")
    assert rotsparse("compare", *inputs, *rotations, "--out", "table.json")[0] == 0
    assert rotsparse("fold", *inputs[:4], *rotations, "--out", "folded.safetensors")[0] == 0
    assert rotsparse("report", "store-run")[0] == 0
    assert "baselines were fitted on 20 of them" in (files / "store-run/report.html").read_text()
    code, said = rotsparse("benchmark", *inputs, "--steps", 20, "--restarts", 1, "--solver", "annealing")
    assert code == 0 and "random weights" in said


def test_a_run_from_a_store_is_resumed(files, rotsparse, on_disk, monkeypatch):
    """A shard is deleted while the fit runs: what was fitted until then is kept, and the run goes on from there."""
    monkeypatch.setattr("rotsparse.report.write.write_report", lambda *a, **k: None)
    assert rotsparse(*fit("store", "whole"))[0] == 0
    shard, read = files / "store/00001.npy", sources.Source.read
    payload = shard.read_bytes()

    def deleted(self, rows):
        if len(rows) == 16 * 20:  # the minibatches
            shard.unlink()
        return read(self, rows)

    with monkeypatch.context() as patched:
        patched.setattr(sources.Source, "read", deleted)
        code, said = rotsparse(*fit("store", "run"))
    assert code == 2 and re.search(r"cannot read store/00001\.npy: .*Put it back", said)
    shard.write_bytes(payload)
    assert rotsparse(*fit("store", "run", "--resume"))[0] == 0
    whole, run = (json.loads((files / name / "metrics.json").read_text()) for name in ("whole", "run"))
    assert whole["metrics"] == run["metrics"]


def test_bad_stores(files, rotsparse, on_disk):
    np.save("wide.npy", np.ones((50, D + 1), np.float32))
    np.save("constant.npy", np.ones((50, D), np.float32))
    (files / "empty").mkdir()
    (files / "store/00002.npy").unlink()
    for activations, message in {
        "wide.npy": "wide.npy should have shape [examples, 6]",
        "constant.npy": "constant.npy: all 10 examples are equal",
        "empty": "empty holds no activations",
        "store": "store lacks 00002.npy",
    }.items():
        code, said = rotsparse(*fit(activations, "run"))
        assert code == 2 and message in said and "Traceback" not in said
        assert not (files / "run").exists()


def test_which_devices(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices() * 6)
    cases = [(None, 2, (2, 3)), (None, 4, (2, 3)), (6, 1, (1, 6)), (4, 4, (4, 1)), (5, 2, (1, 5))]
    for count, restarts, shape in cases:
        found = mesh(count, restarts)
        assert found is not None and tuple(found.shape.values()) == shape
    assert mesh(1, 2) is None
    with pytest.raises(ValueError, match="--devices 7: JAX sees 6 on this host"):
        mesh(7, 2)
    with pytest.raises(ValueError, match="--devices should be greater than zero, got 0"):
        mesh(0, 2)


# `getrusage` would count the memory of the process that started this one, too.
COMMAND = """
from rotsparse_command import main
try:
    main()
finally:
    print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak_memory(*arguments, devices=1):
    """Bytes, of a command in a process of its own."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    out = subprocess.check_output([sys.executable, "-c", COMMAND, *arguments], text=True, env=env)
    return 1024 * int(out.split()[-1])


@pytest.mark.slow
def test_the_same_command_on_one_device_and_on_four(files):
    adam = ("--solver", "adam", "--batch-size", "16", "--restarts", "2")
    for devices in (1, 4):
        peak_memory(*fit("x.npy", f"run-{devices}", *adam), devices=devices)
    one, four = (json.loads((files / f"run-{n}" / "metrics.json").read_text())["objective"]["train"] for n in (1, 4))
    assert one == pytest.approx(four, rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux's /proc")
def test_memory_does_not_grow_with_the_store(files, rng):
    """Stores of 320 MB and of 1 GB, of links to one shard."""
    d, rows = 64, 2**18
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    np.savez("wide.npz", w_in=draw(d, d) / 8, b_in=draw(d), w_out=draw(d, d) / 8)
    peaks = {}
    for shards in (5, 16):
        writer = StoreWriter(files / "large", {"model": "none", "width": d})
        writer.write(0, draw(rows, d))
        folder = (files / "large").rename(files / f"{shards}")
        for i in range(1, shards):
            os.link(folder / "00000.npy", folder / f"{i:05d}.npy")
        manifest = json.loads((folder / "manifest.json").read_text())
        shard = manifest["shards"][0]
        manifest["shards"] = [shard | {"file": f"{i:05d}.npy"} for i in range(shards)]
        manifest |= {"rows": shards * rows, "complete": True}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        peaks[shards] = peak_memory("fit", "--layer", "wide.npz", *fit(f"{shards}", f"run-{shards}")[3:])
    print({shards: f"{peak / 2**20:.0f} MB" for shards, peak in peaks.items()})
    assert peaks[16] - peaks[5] < 0.15 * 11 * 2**26  # of what was added to the data
