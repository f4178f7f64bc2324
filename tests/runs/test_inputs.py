"""The inputs of a run: hashed, checked by whatever reads it again, and nothing else is read."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from rotsparse.evaluation import baselines
from rotsparse.layers.rotations import Rotations
from rotsparse.report import figures
from rotsparse.runs import folders, inputs

LAYER = ("--layer", "layer.npz", "--activations", "x.npy")
FIT = ("fit", *LAYER, "--solver", "adam", "--steps", "3", "--restarts", "1", "--control", "none", "--out", "run")


@pytest.fixture
def fitted(folder, rng, rotsparse, monkeypatch):
    """A run of a small layer in the current folder; nothing is drawn."""
    for name in ("overview", "heat_maps", "examples", "sorted_magnitudes", "curves", "history", "metrics"):
        monkeypatch.setattr(figures, name, lambda *_: None)
    monkeypatch.setattr(figures, "png", lambda *_, **__: b"\x89PNG\r\n\x1a\n")
    monkeypatch.setattr(figures, "svg", lambda _: b"<svg></svg>")
    monkeypatch.setattr(figures, "pdf", lambda _: b"%PDF-1.4")
    methods = baselines.methods
    monkeypatch.setattr(baselines, "methods", lambda *a, **k: {"neurons": methods(*a, **k)["neurons"]})
    np.savez("layer.npz", w=rng.standard_normal((3, 4)).astype(np.float32))
    np.save("x.npy", rng.standard_normal((20, 4)).astype(np.float32))
    assert rotsparse(*FIT)[0] == 0
    return folder / "run"


def config_of(run, **changes):
    config = folders.read_json(run / "config.json")
    (run / "config.json").write_text(json.dumps(config | changes))
    return config


def test_a_report_of_files_that_have_changed_is_refused(fitted, rotsparse, rng):
    page = (fitted / "report.html").read_bytes()
    assert rotsparse("report", "run")[0] == 0
    for name in ("layer.npz", "x.npy"):
        kept = Path(name).read_bytes()
        changed = rng.standard_normal((3, 4) if name == "layer.npz" else (20, 4)).astype(np.float32)
        np.savez(name, w=changed) if name == "layer.npz" else np.save(name, changed)
        code, said = rotsparse("report", "run")
        assert code == 2 and f"{name} has changed since run was computed from it" in said
        Path(name).write_bytes(kept)
    assert len((fitted / "report.html").read_bytes()) == len(page)


def test_a_moved_input_can_be_linked_to(fitted, rotsparse):
    Path("layer.npz").rename("elsewhere.npz")
    code, said = rotsparse("report", "run")
    assert code == 2 and "layer.npz, which run/config.json names as 'layer', does not exist: where is it now?" in said
    Path("layer.npz").symlink_to("elsewhere.npz")
    assert rotsparse("report", "run")[0] == 0


def test_a_run_folder_from_elsewhere_reads_nothing_of_mine(fitted, rotsparse, tmp_path):
    """Not by an absolute path without the right hash, not by one that leads out of the run, not by a link."""
    np.save("secret.npy", np.load("x.npy") + 1)
    secret = str(tmp_path / "secret.npy")
    config = config_of(fitted)
    for hashes in ({}, None, 3, {"activations": "0" * 64}, {"activations": 3}):
        config_of(fitted, activations=secret, inputs=hashes)
        code, said = rotsparse("report", "run")
        assert code == 2 and ("has no hash of it" in said or "has changed since" in said), said
    for path in ("../secret.npy", "figures/../../secret.npy"):
        config_of(fitted, activations=path, inputs=config["inputs"])
        code, said = rotsparse("report", "run")
        assert code == 2 and "which is no file within run: it is not read" in said
    (fitted / "x.npy").symlink_to(secret)
    config_of(fitted, activations="x.npy", inputs={"layer": config["inputs"]["layer"]})
    code, said = rotsparse("report", "run")
    assert code == 2 and "is a link that leads out of run" in said
    for odd in (3, ["x.npy"], {"a": 1}):
        config_of(fitted, activations=odd)
        assert rotsparse("report", "run")[0] == 2


def test_rotations_of_another_layer(fitted, rotsparse, rng):
    other = ("--layer", "other.npz", "--activations", "x.npy")
    np.savez("other.npz", w=rng.standard_normal((3, 4)).astype(np.float32))
    for way in (("compare", *other, "--rotations"), ("fold", *other, "--out", "f.safetensors", "--rotations")):
        code, said = rotsparse(*way, "run")
        assert code == 2 and "run was fitted to another layer than the one that other.npz holds now" in said
        assert rotsparse(*way, "run/rotations.safetensors")[0] == 0  # named itself, nothing is asked


def test_an_input_that_changed_between_interruption_and_resumption(fitted, rotsparse, rng):
    from rotsparse._core import files

    work = Path("run.unfinished")
    fitted.rename(work)
    files.make_folder(work / "checkpoints")
    with files.new_folder(work / "checkpoints" / "step-00000001") as step:
        (step / "manifest.json").write_text("{}")
    status = json.loads((work / "status.json").read_text())
    assert status["config"]["inputs"]["layer"] == inputs.file_hash("layer.npz")
    np.savez("layer.npz", w=rng.standard_normal((3, 4)).astype(np.float32))
    code, said = rotsparse(*FIT, "--resume")
    assert code == 2 and "layer.npz has changed: its SHA-256 was" in said
    assert work.exists()


def test_a_store_is_known_by_its_manifest(tmp_path, rng):
    from rotsparse.data.store import StoreWriter

    hashes = []
    for name, scale in (("a", 1), ("b", 1), ("c", 2)):
        writer = StoreWriter(tmp_path / name, {"model": "m", "width": 2, "tokens": {}})
        writer.write(0, scale * np.ones((3, 2), np.float32))
        writer.finish()
        hashes.append(inputs.file_hash(tmp_path / name))
    assert hashes[0] == hashes[1] != hashes[2]
    assert inputs.hashes(a=tmp_path / "a", b=None).keys() == {"a"}


def test_reports_of_earlier_versions(fitted, rotsparse):
    """They have no record and no hashes: what lies within them is read, and what they wrote is not written over."""
    shutil.copy("layer.npz", fitted / "layer.npz")
    shutil.copy("x.npy", fitted / "x.npy")
    config = config_of(fitted)
    del config["inputs"]
    (fitted / "config.json").write_text(json.dumps(config | {"layer": "layer.npz", "activations": "x.npy"}))
    (fitted / ".rotsparse").unlink()
    code, said = rotsparse("report", "run")
    assert code == 2 and "was not written by rotsparse: move it away" in said
    (fitted / "table.md").unlink()
    (fitted / "report.html").unlink()
    shutil.rmtree(fitted / "figures")
    assert rotsparse("report", "run")[0] == 0 and (fitted / "report.html").exists()
    assert Rotations.load(fitted / "rotations.safetensors")[0].r_in.size
