"""The command line as a user meets it: in a temporary folder, with exit codes and messages."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from rotsparse.layer_files import load_layer
from rotsparse.rotations import Rotations

D = 6


@pytest.fixture
def files(folder, rng):
    """The current folder, with a layer and activations."""
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    np.savez("layer.npz", w_in=draw(9, D), b_in=draw(9), w_out=draw(4, 9))
    np.save("x.npy", draw(60, D))
    np.save("test.npy", draw(20, D))
    return folder


FIT = ("fit", "--layer", "layer.npz", "--activations", "x.npy", "--steps", "20", "--out", "run")


def test_fit_writes_a_run_folder(files, rotsparse):
    code, said = rotsparse(*FIT, "--test-activations", "test.npy", "--activation", "gelu", "--seed", 3)
    assert code == 0
    assert "report: run/report.html" in said
    run = files / "run"
    names = {p.name for p in run.iterdir()}
    assert names >= {"config.json", "rotations.safetensors", "metrics.json", "report.html", "figures", "solution.npz"}
    config = json.loads((run / "config.json").read_text())
    assert config["seed"] == 3 and config["activation"] == "gelu" and config["steps"] == 20
    assert config["versions"].keys() >= {"rotsparse", "jax", "python"}
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["metrics"].keys() >= {"learned", "neurons", "haar", "pca", "svd_mean_jacobian"}
    for of in metrics["metrics"].values():
        assert of.keys() >= {"edges_90", "edges_99", "fraction_below_0.1_rms", "hoyer", "gini"}
        for interval in of.values():
            assert interval["low"] <= interval["value"] <= interval["high"]
    assert metrics["function_error"] < 1e-5
    assert metrics["orthogonality_error"] < 1e-5
    tensors = load_file(run / "rotations.safetensors")
    assert tensors["r_in"].shape == (D, D) and tensors["r_out"].shape == (4, 4)


def test_same_seed_same_numbers(files, rotsparse):
    def numbers(out):
        assert rotsparse(*FIT[:-1], out, "--restarts", 2)[0] == 0
        metrics = json.loads((files / out / "metrics.json").read_text())
        return metrics["metrics"], metrics["agreement"]

    assert numbers("a") == numbers("b")


def test_an_existing_run_is_kept_unless_told(files, rotsparse, monkeypatch):
    assert rotsparse(*FIT)[0] == 0
    before = (files / "run" / "metrics.json").read_bytes()
    code, said = rotsparse(*FIT)
    assert code == 2 and "run exists" in said and "--overwrite" in said
    # a run that fails while it is being overwritten leaves the earlier one as it was
    monkeypatch.setattr("rotsparse.report.write_report", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    assert rotsparse(*FIT, "--overwrite")[0] == 75
    assert (files / "run" / "metrics.json").read_bytes() == before
    # interrupted before there was anything to keep
    monkeypatch.setattr("rotsparse.job.find_rotations", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    assert rotsparse(*FIT[:-1], "another")[0] == 130
    assert {p.name for p in files.iterdir()} >= {"run", "run.unfinished"}
    assert not [p for p in files.iterdir() if p.name.startswith((".run", "another"))]


def test_fold_and_compare_and_report(files, rotsparse):
    assert rotsparse(*FIT)[0] == 0
    inputs = ("--layer", "layer.npz", "--activations", "x.npy", "--rotations", "run/rotations.safetensors")
    code, said = rotsparse("fold", *inputs, "--out", "folded.safetensors")
    assert code == 0 and "same function" in said
    rotations, _ = Rotations.load("run/rotations.safetensors")
    x = np.load("test.npy")
    before, after = load_layer("layer.npz", "relu")(x), load_layer("folded.safetensors", "relu")(x @ rotations.r_in.T)
    np.testing.assert_allclose(after @ rotations.r_out, before, atol=1e-5)
    code, said = rotsparse("fold", *inputs, "--out", "folded.safetensors")
    assert code == 2 and "exists" in said

    code, said = rotsparse("compare", *inputs, "--out", "table.json")
    assert code == 0 and "svd" in said
    table = json.loads((files / "table.json").read_text())["metrics"]
    assert table == {"run": table["run"], **{k: v for k, v in table.items() if k != "run"}}
    run = json.loads((files / "run" / "metrics.json").read_text())["metrics"]
    assert table["run"]["edges_99"]["value"] == run["learned"]["edges_99"]["value"]

    page = (files / "run" / "report.html").read_bytes()
    (files / "run" / "report.html").unlink()
    assert rotsparse("report", "run")[0] == 0
    assert len((files / "run" / "report.html").read_bytes()) == pytest.approx(len(page), rel=0.05)


def test_demo_at_small_size(files, rotsparse):
    code, said = rotsparse("demo", "--out", "demo", "--steps", 20, "--examples", 60)
    assert code == 0
    assert "In the learned basis" in said
    assert (files / "demo" / "report.html").is_file()
    assert json.loads((files / "demo" / "config.json").read_text())["accuracy"] >= 0.97
    assert rotsparse("report", "demo")[0] == 0


def bad(*options, **replaced):
    """FIT with options added or replaced."""
    arguments: list[str] = list(FIT)
    for name, value in replaced.items():
        arguments[arguments.index(f"--{name}") + 1] = value
    return [*arguments, *options]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (bad(layer="nowhere.npz"), "nowhere.npz does not exist"),
        (bad(activations="wide.npy"), "should have shape [examples, 6]"),
        (bad(activations="nan.npy"), "NaN or infinity"),
        (bad(activations="constant.npy"), "zero variance"),
        (bad(activations="few.npy"), "too few to hold a fifth of them out"),
        (bad(activations="int.npy"), "got int64: convert it first"),
        (bad(activations="half.npy"), "got float16: convert it first"),
        (bad(activations="cut.npy"), "may be damaged or cut short"),
        (bad("--test-activations", "wide.npy"), "should have shape [examples, 6]"),
        (bad("--activation", "step"), "step"),
        (bad("--measure", "l2"), "l2"),
        (bad("--eps", "-1"), "--eps should be greater than zero, got -1"),
        (bad("--learning-rate", "0"), "--learning-rate should be greater than zero"),
        (bad("--max-step", "2"), "--max-step is an angle in radians"),
        (bad("--start", "x.npy"), "cannot read rotations from x.npy"),
        (bad("--tie"), "tied fit needs d_in = d_out, got 6 and 4"),
        (bad("--hold", "in", "out"), "nothing to optimise"),
        (bad("--skip"), "skip connection"),
        (bad("--norm", "rms"), "no norm_scale"),
        (bad("--active-subspace", "7"), "share of the variance"),
        (["report", "nowhere"], "cannot read nowhere/config.json"),
        (["fold", *FIT[1:5], "--rotations", "x.npy", "--out", "f.safetensors"], "cannot read rotations"),
        (["optimise"], "optimise"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_input_is_explained(files, rotsparse, arguments, message):
    x = np.load("x.npy")
    np.save("wide.npy", np.ones((9, D + 1), np.float32))
    np.save("nan.npy", np.where(x > 2, np.nan, x))
    np.save("constant.npy", np.ones_like(x))
    np.save("few.npy", x[:5])
    np.save("int.npy", x.astype(np.int64))
    np.save("half.npy", x.astype(np.float16))
    (files / "cut.npy").write_bytes((files / "x.npy").read_bytes()[:200])
    before = {p.name for p in files.iterdir()}
    code, said = rotsparse(*arguments)
    assert code == 2
    assert message in said
    assert "Traceback" not in said
    assert {p.name for p in files.iterdir()} - {"cache"} == before - {"cache"}  # nothing half-written


def test_the_command_itself(files):
    """One real process: the entry point, its help, and its exit code."""

    def run(*arguments):
        command = [sys.executable, "-c", "from rotsparse.cli import main; main()", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"})

    shown = run("--help")
    assert shown.returncode == 0
    assert all(name in shown.stdout for name in ("demo", "fit", "compare", "fold", "report"))
    fit = run("fit", "--help").stdout
    assert "w_gate" in fit and "--input-scale" in fit and "Example:" in fit
    failed = run("fit", "--layer", "nowhere.npz", "--activations", "x.npy", "--out", "run")
    assert failed.returncode == 2
    assert failed.stderr.strip() == "rotsparse: error: nowhere.npz does not exist"
