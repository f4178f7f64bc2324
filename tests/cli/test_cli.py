"""The command line as a user meets it: in a temporary folder, with exit codes and messages."""

import functools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import rotsparse as rs
from rotsparse.cli.arguments import fit_arguments
from rotsparse.data.sources import in_memory
from rotsparse.evaluation import fit_nulls
from rotsparse.examples import addition
from rotsparse.layers.files import load_layer
from rotsparse.layers.rotations import Rotations
from rotsparse.objectives import measures
from rotsparse.objectives.jacobian import JacobianSparsity
from rotsparse.runs import layer_run
from rotsparse_command.options import FitOptions
from rotsparse_command.streams import output_until_closed

D = 6


@pytest.fixture
def files(folder, rng):
    """The current folder, with a layer and activations."""
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    np.savez("layer.npz", w_in=draw(9, D), b_in=draw(9), w_out=draw(4, 9))
    np.save("x.npy", draw(60, D))
    np.save("test.npy", draw(20, D))
    return folder


FIT = (
    "fit",
    "--layer",
    "layer.npz",
    "--activations",
    "x.npy",
    "--steps",
    "20",
    "--solver",
    "annealing",
    "--control",
    "none",
    "--out",
    "run",
)


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


def test_a_dry_run_says_what_a_fit_takes_and_writes_nothing(files, rotsparse):
    before = sorted(os.listdir())
    code, said = rotsparse(*FIT, "--dry-run")
    assert code == 0 and sorted(os.listdir()) == before
    assert "Anneal, 20 steps of 16" in said and "comparison, 15 bases on 12 examples" in said
    assert "null models" not in said
    arguments = [a for a in FIT if a not in ("--control", "none")]
    assert "null models, 16 fits of 600 steps" in rotsparse(*arguments, "--dry-run")[1]


def test_a_report_says_how_to_repeat_it(files, rotsparse):
    assert rotsparse(*FIT, "--restarts", 3)[0] == 0
    page = (files / "run" / "report.html").read_text()
    (told,) = re.findall("<pre><code>(.*)</code></pre>", page)
    words = shlex.split(told)
    assert words[:2] == ["rotsparse", "fit"] and "<title>layer.npz</title>" in page
    at = words.index("--out") + 1
    assert words[at] == "run" and rotsparse(*words[1:at], "again", *words[at + 1 :])[0] == 0
    first, second = (json.loads((files / name / "metrics.json").read_text()) for name in ("run", "again"))
    assert first["metrics"] == second["metrics"]


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
    monkeypatch.setattr("rotsparse.report.write.write_report", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    assert rotsparse(*FIT, "--overwrite")[0] == 75
    assert (files / "run" / "metrics.json").read_bytes() == before
    # interrupted before there was anything to keep
    monkeypatch.setattr(
        "rotsparse.runs.layer_run.find_rotations", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    assert rotsparse(*FIT[:-1], "another")[0] == 130
    assert {p.name for p in files.iterdir()} >= {"run", "run.unfinished"}
    assert not [p for p in files.iterdir() if p.name.startswith((".run", "another"))]


def test_fold_and_compare_and_report(files, rotsparse, monkeypatch):
    code, said = rotsparse(*FIT)
    assert code == 0
    advised = shlex.split(said[said.index("rotsparse fold ") :])
    assert rotsparse(*advised[1:])[0] == 0 and load_layer("run/folded.safetensors", "relu").d_out == 4
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
    (files / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert rotsparse("report", "../run")[0] == 0
    assert len((files / "run" / "report.html").read_bytes()) == pytest.approx(len(page), rel=0.05)
    (files / "x.npy").unlink()
    code, said = rotsparse("report", "../run")
    assert code == 2 and f"{files / 'x.npy'}, which ../run/config.json names as 'activations', does not exist" in said


def test_scales_can_be_robust(files, rotsparse):
    scaled = ("--input-scale", "robust", "--output-scale", "robust")
    assert rotsparse(*FIT, *scaled)[0] == 0
    opened = rs.load_run("run")
    about = Rotations.load("run/rotations.safetensors")[1]
    assert about["scale_inputs"] == about["scale_outputs"] == "winsorised"
    np.testing.assert_array_equal(opened.units["covariance"], rs.winsorised(in_memory(opened.inputs[1])[0]))
    of = rs.evaluate(opened.layer, opened.inputs[2], opened.rotations, key=jax.random.key(0), **opened.units)
    found = opened.metrics["metrics"]["learned"]
    assert all(of[name].value == pytest.approx(found[name]["value"], abs=1e-4) for name in of)
    assert "by the standard deviation (winsorised) of its output" in (files / "run/report.html").read_text()
    assert rotsparse("explain", "run")[0] == 0
    assert "inputs (winsorised) and outputs (winsorised)" in (files / "run/directions.html").read_text()
    code, said = rotsparse(*FIT[:-1], "other", "--input-scale", "mad")
    assert code == 2 and "std" in said and "robust" in said


def test_outputs_can_be_scaled(files, rotsparse, monkeypatch):
    monkeypatch.setattr(fit_nulls, "QUICK_STEPS", 50)
    scaled = ("--output-scale", "std", "--seed", 3)
    arguments = [a for a in FIT if a not in ("--control", "none")]
    assert rotsparse(*arguments, "--test-activations", "test.npy", *scaled)[0] == 0
    opened = rs.load_run("run")
    assert opened.units["scale_outputs"] and Rotations.load("run/rotations.safetensors")[1]["scale_outputs"] is True
    assert JacobianSparsity(opened.layer, np.load("x.npy"), measures.Log(0.1), scale_outputs=True).value(
        opened.solution.bases
    ) == pytest.approx(opened.metrics["objective"]["train"], abs=1e-5)
    found = opened.metrics["metrics"]["learned"]
    for sigma in ({}, {"scale_outputs": False}):
        units: dict[str, Any] = opened.units | sigma
        of = rs.evaluate(opened.layer, np.load("test.npy"), opened.rotations, key=jax.random.key(0), **units)
        same = all(of[name].value == pytest.approx(found[name]["value"], abs=1e-4) for name in of)
        assert same == (not sigma)
    assert opened.metrics["control"]["learned"].keys() == found.keys(), "no gap closed where outputs are scaled"
    page = (files / "run/report.html").read_text()
    assert "Every row is divided by the standard deviation" in page and "--output-scale std" in page
    assert rotsparse("report", "run")[0] == 0
    assert "Every row is divided by the standard deviation" in (files / "run/report.html").read_text()
    assert rotsparse("explain", "run")[0] == 0
    assert "standard deviations of inputs and outputs" in (files / "run/directions.html").read_text()
    inputs = ("--layer", "layer.npz", "--activations", "x.npy", "--test-activations", "test.npy", *scaled)
    assert rotsparse("compare", *inputs, "--rotations", "run", "--out", "table.json")[0] == 0
    table = json.loads((files / "table.json").read_text())["metrics"]
    assert table["pca"] == opened.metrics["metrics"]["pca"] and table["run"] == found
    monkeypatch.setattr("rotsparse.evaluation.benchmark.draw_nulls", lambda *a, **k: {})
    short = ("--steps", 20, "--solver", "annealing", "--out", "benchmark")
    assert rotsparse("benchmark", *inputs, *short)[0] == 0
    metrics = json.loads((files / "benchmark/metrics.json").read_text())["metrics"]
    assert metrics["neurons"]["edges_99"] == opened.metrics["metrics"]["neurons"]["edges_99"]


def test_a_report_is_drawn_from_what_was_stored(files, rotsparse, monkeypatch):
    assert rotsparse(*FIT)[0] == 0
    page = (files / "run" / "report.html").read_text()
    table = (files / "run" / "table.md").read_text()
    with monkeypatch.context() as patch:
        for name in ("compare_with_baselines", "picture_data"):
            patch.setattr(layer_run, name, None)
        assert rotsparse("report", "run")[0] == 0
        again = (files / "run" / "report.html").read_text()
        assert again.partition("<h2>The layer")[0] == page.partition("<h2>The layer")[0]
        assert re.findall(r"<table.*?</table>", again)[:2] == re.findall(r"<table.*?</table>", page)[:2]
    (files / "run" / "pictures.npz").unlink()
    code, said = rotsparse("report", "run")
    assert code == 0 and "of an earlier version, which kept no data of its figures" in said
    assert "comparing with the baselines" in said and (files / "run" / "table.md").read_text() == table
    (files / "run" / "pictures.npz").write_bytes(b"PK")
    code, said = rotsparse("report", "run")
    assert code == 2 and "pictures.npz cannot be read, it may be damaged" in said


@pytest.fixture
def found(files):
    """Functions of a folder and a seed: rotations saved there."""

    def save(folder, seed):
        (files / folder).mkdir(parents=True)
        Rotations.haar(jax.random.key(seed), D, 4).save(files / folder / "rotations.safetensors")

    return save


COMPARE = ("compare", "--layer", "layer.npz", "--activations", "x.npy", "--rotations")


def test_compare_keeps_rotations_apart_by_their_folders(files, rotsparse, found):
    for seed, folder in enumerate(("a/layer-0", "b/layer-0", "b/layer-1", "pca")):
        found(folder, seed)
    out = ("--out", "new/table.json")
    paths = ("a/layer-0", "b/layer-0/rotations.safetensors", "b/layer-1")
    assert rotsparse(*COMPARE, *paths, *out)[0] == 0
    table = json.loads((files / "new/table.json").read_text())["metrics"]
    assert {"a/layer-0", "b/layer-0", "b/layer-1", "pca"} <= table.keys()
    assert len({table[name]["hoyer"]["value"] for name in ("a/layer-0", "b/layer-0", "b/layer-1", "haar")}) == 4
    for arguments, message in (
        (("a/layer-0", *out), "new/table.json exists: choose another file, or pass --overwrite"),
        (("pca",), "pca would be called 'pca' after its folder, as a baseline is"),
        (("a/layer-0", "a/layer-0/rotations.safetensors"), "the same rotations twice"),
        (("a",), "a holds no rotations.safetensors"),
    ):
        code, said = rotsparse(*COMPARE, *arguments)
        assert code == 2 and message in said, arguments


def test_fold_needs_no_held_out_examples_and_makes_its_folder(files, rotsparse, found):
    found("run", 0)
    np.save("few.npy", np.load("x.npy")[:3])
    fold = ("fold", "--layer", "layer.npz", "--activations", "few.npy", "--rotations", "run", "--out")
    assert rotsparse(*fold, "new/folded.safetensors")[0] == 0
    assert load_layer("new/folded.safetensors", "relu").d_in == D
    code, said = rotsparse(*fold, "folded.npz")
    assert code == 2 and "ends in .safetensors" in said and not (files / "folded.npz").exists()


@pytest.mark.parametrize("command", ["benchmark", "capture"])
def test_report_says_what_has_no_page(files, rotsparse, command):
    (files / "run").mkdir()
    (files / "run/config.json").write_text(json.dumps({"command": command, "versions": {}}))
    code, said = rotsparse("report", "run")
    assert code == 2 and ("its table is run/table.md" if command == "benchmark" else "nothing to draw") in said


def test_the_measure_has_the_options_that_were_given():
    of = lambda **options: fit_arguments(FitOptions(**options), {})["measure"]  # noqa: E731
    assert of(measure="top-k", keep=0.3).keep == 0.3
    assert of(measure="top-k").keep == 0.5 and of(measure="log", eps=0.2).eps == 0.2
    assert isinstance(of(measure="l4"), measures.L4)


@pytest.mark.parametrize(
    "command",
    "demo fit compare benchmark fold report explain graph export steer runs inspect capture".split()
    + "fit-model fold-model sparsify".split(),
)
def test_help_says_what_an_option_is_when_it_is_not_given(rotsparse, command):
    code, said = rotsparse(command, "--help")
    assert code == 0 and "default: None" not in said


def test_demo_at_small_size(files, rotsparse, monkeypatch):
    monkeypatch.setattr(addition, "train", functools.partial(addition.train, steps=300))
    monkeypatch.setattr(fit_nulls, "QUICK_STEPS", 20)
    monkeypatch.setattr(fit_nulls, "FEWEST_STEPS", 20)
    code, said = rotsparse("demo", "--out", "demo", "--steps", 20, "--examples", 60)
    assert code == 0
    assert "null model" in said and "adds with waves" in said
    assert (files / "demo" / "figures" / "waves.png").is_file()
    control = json.loads((files / "demo" / "metrics.json").read_text())["control"]
    assert "neurons re-paired" in control["nulls"]
    page = (files / "demo" / "report.html").read_text()
    assert "The same fit of null models" in page
    (files / "demo" / "report.html").unlink()
    assert rotsparse("report", "demo")[0] == 0
    again = (files / "demo" / "report.html").read_text()
    assert "The same fit of null models" in again and again.count("<img") == page.count("<img")
    directions = (files / "demo" / "directions.html").read_text()
    assert "adds modulo 59" in directions and "% pure" in directions and re.search(r'"\d+ \+ \d+"', directions)
    (files / "demo" / "directions.html").unlink()
    assert rotsparse("explain", "demo")[0] == 0
    assert (files / "demo" / "directions.html").read_text() == directions


def test_the_digits_of_the_demo(files, rotsparse):
    options = ["--network", "digits", "--steps", 20, "--examples", 60, "--control", "none"]
    code, said = rotsparse("demo", "--out", "demo", *options)
    assert code == 0
    assert "held-out accuracy 9" in said and "In the learned basis" in said
    assert json.loads((files / "demo" / "metrics.json").read_text())["control"] is None
    assert rotsparse("report", "demo")[0] == 0
    directions = (files / "demo" / "directions.html").read_text()
    assert '"pictures":{"size":[8,8]' in directions and "reads from a picture" in directions


def test_the_directions_of_a_layer(files, rotsparse):
    assert rotsparse(*FIT)[0] == 0
    (files / "run" / "directions.html").write_text("mine")
    code, said = rotsparse("explain", "run")
    assert code == 2 and "exists and was not written by rotsparse" in said
    (files / "run" / "directions.html").unlink()
    code, said = rotsparse("explain", "run")
    assert code == 0 and "directions: run/directions.html" in said and "left out" not in said
    assert "example " in (files / "run" / "directions.html").read_text()
    code, said = rotsparse("explain", "run", "--tokenizer", "tok.bin")
    assert code == 2 and "names no model" in said
    (files / "benchmark").mkdir()
    (files / "benchmark" / "config.json").write_text('{"command": "benchmark"}')
    code, said = rotsparse("explain", "benchmark")
    assert code == 2 and "no run of demo, fit or fit-model" in said


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
        (bad(activations="cut.npy"), "may be damaged or cut short"),
        (bad("--test-activations", "wide.npy"), "should have shape [examples, 6]"),
        (bad("--activation", "step"), "step"),
        (bad("--measure", "l2"), "l2"),
        (bad("--measure", "l4", "--eps", "0.2"), "--measure l4 has no scale"),
        (bad("--keep", "0.3"), "--keep belongs to --measure top-k, and the measure is log"),
        (bad("--measure", "top-k", "--keep", "3"), "keep is a share of the entries"),
        (bad("--seed", "-1"), "--seed should be a whole number from 0"),
        (bad(out="x.npy"), "cannot write to x.npy: it is a file, not a folder"),
        (bad(layer="transposed.npz"), "w_in is [6, 9]: is it transposed?"),
        (bad(layer="no_w_out.npz"), "there is no w_out: is it missing?"),
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
    layer = dict(np.load("layer.npz"))
    np.savez("transposed.npz", **layer | {"w_in": layer["w_in"].T})
    np.savez("no_w_out.npz", w_in=layer["w_in"], b_in=layer["b_in"], b_out=np.ones(4, np.float32))
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
        command = [sys.executable, "-c", "from rotsparse_command import main; main()", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"})

    shown = run("--help")
    assert shown.returncode == 0
    assert all(name in shown.stdout for name in ("demo", "fit", "compare", "fold", "report"))
    fit = run("fit", "--help").stdout
    assert "w_gate" in fit and "--input-scale" in fit and "Example:" in fit
    failed = run("fit", "--layer", "nowhere.npz", "--activations", "x.npy", "--out", "run")
    assert failed.returncode == 2
    assert failed.stderr.strip() == "rotsparse: error: nowhere.npz does not exist"


def test_help_and_inspect_import_no_more_than_they_need(files):
    """Help does without JAX, and a command that draws nothing without Matplotlib: both take long to import."""

    def imported(code):
        printed = subprocess.check_output([sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"], text=True)
        return {name.partition(".")[0] for name in printed.splitlines()[-1].split()}

    shown = imported("""
import rotsparse_command
sys.argv = ["rotsparse", "fit", "--help"]
try:
    rotsparse_command.main()
except SystemExit as end:
    assert end.code == 0""")
    assert "tyro" in shown and not shown & {"jax", "numpy", "rotsparse"}
    heavy = {"matplotlib", "sklearn", "orbax", "torch", "transformers", "scipy"}
    assert not imported("import rotsparse.cli.main") & heavy


def test_ctrl_c_before_the_command_begins_ends_it_without_a_word(files):
    """Pressed while JAX is imported."""
    pressed = """
import os, signal, sys
class Finder:
    def find_spec(self, name, *rest):
        if name == "jax":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from rotsparse_command import main
main()
"""
    ended = subprocess.run([sys.executable, "-c", pressed, "runs", "."], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")


def test_a_command_whose_output_nobody_reads_goes_on(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", closed)
        with output_until_closed():
            for _ in range(3):
                print("x" * 100_000)  # more than a buffer holds
                print("y", flush=True)
        assert sys.stdout is closed
