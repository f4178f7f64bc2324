"""The subcommands for whole models, as a user meets them."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from rotsparse.layers.files import load_layer
from rotsparse.layers.rotations import Rotations
from rotsparse.models import generate, load_model, load_tokenizer, mlp_layer, open_store, run, save_model
from rotsparse.runs import layer_run
from signals import send
from tiny_models import STORIES, needs_stories, tiny, tiny_llama2c


@pytest.fixture
def model(tmp_path):
    """A random two-layer model and tokens for it, in the current folder."""
    save_model(tiny_llama2c(), tmp_path / "model.bin")
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 31, 400))
    return load_model(tmp_path / "model.bin")


SOURCE = ("--model", "model.bin", "--tokens", "tokens.npy")
CAPTURE = ("capture", *SOURCE, "--out", "store", "--length", 16)
FIT = (
    "fit-model",
    "--model",
    "model.bin",
    "--store",
    "store",
    "--solver",
    "annealing",
    "--steps",
    20,
    "--restarts",
    1,
    "--control",
    "none",
    "--out",
    "run",
)
FOLD = ("fold-model", *SOURCE, "--rotations")


def test_from_capture_to_a_folded_model(rotsparse, model, tmp_path):
    code, said = rotsparse(*CAPTURE)
    assert code == 0 and "store/1.input: 400 tokens, 16 numbers each" in said
    assert open_store("store/0.input", model.fingerprint()).shape == (400, 16)

    code, said = rotsparse(*FIT, "--layers", "0-1")
    assert code == 0 and "best baseline" in said and "run/layer-*/report.html" in said
    for i in range(2):
        part = tmp_path / "run" / f"layer-{i}"
        names = {p.name for p in part.iterdir()}
        assert names >= {"config.json", "rotations.safetensors", "metrics.json", "report.html", "solution.npz"}
        assert json.loads((part / "config.json").read_text())["layer_number"] == i
        # Fitted on the start of the text, judged on its end.
        x = open_store(f"store/{i}.input").read(range(400))
        np.testing.assert_array_equal(np.load(part / "activations.npy"), x[:320])
        np.testing.assert_array_equal(np.load(part / "test_activations.npy"), x[320:])
    assert json.loads((tmp_path / "run/metrics.json").read_text())["layers"].keys() == {"0", "1"}
    table = (tmp_path / "run/table.md").read_text()
    assert "| 0 |" in table and "| 1 |" in table and "rotsparse benchmark --layer run/layer-0/layer.safetensors" in said
    assert "its directions: run/directions.html" in said and "left out" not in said
    written = [tmp_path / f"run/{place}directions.html" for place in ("", "layer-0/", "layer-1/")]
    pages = [page.read_text() for page in written]
    for i in range(2):
        assert 'href="directions.html"' in (tmp_path / f"run/layer-{i}/report.html").read_text()
        (tmp_path / f"run/layer-{i}/report.html").unlink()
    assert rotsparse("report", "run/layer-1")[0] == 0 and (tmp_path / "run/layer-1/report.html").exists()
    assert rotsparse("report", "run")[0] == 0 and (tmp_path / "run/layer-0/report.html").exists()

    code, said = rotsparse("explain", "run")
    assert code == 0 and "directions: run/layer-1/directions.html index: run/directions.html" in said
    assert [page.read_text() for page in written] == pages, "the pages that fit-model has written"
    index = (tmp_path / "run/directions.html").read_text()
    assert index.count("<li>") == 2 and 'href="layer-1/directions.html"' in index
    page = (tmp_path / "run/layer-1/directions.html").read_text()
    assert "model.bin, layer 1" in page and "../directions.html" in page
    moved = (tmp_path / "store").rename(tmp_path / "moved")
    code, said = rotsparse("explain", "run/layer-1")
    assert code == 0 and "left out: " in said and "does not exist: where is it now?" in said
    moved.rename(tmp_path / "store")

    tokens = np.load("tokens.npy")[:128].reshape(4, 32)
    before = run(model.params, model.config, tokens)[0]
    code, said = rotsparse(*FOLD, "run/layer-1/rotations.safetensors", "--out", "new/folded.bin")
    assert code == 0 and "read back from the file: outputs differ by up to" in said
    folded = load_model("new/folded.bin")
    np.testing.assert_allclose(run(folded.params, folded.config, tokens)[0], before, atol=1e-4)
    rotation = Rotations.load("run/layer-1/rotations.safetensors")[0].r_out
    np.testing.assert_allclose(folded.params["embed"], model.params["embed"] @ rotation.T, atol=1e-5)

    code, said = rotsparse(*FOLD, "run", "--out", "mlps")
    assert code == 0 and "layer files of 2 MLPs" in said
    x = np.load("run/layer-0/test_activations.npy")
    rotations, _ = Rotations.load("mlps/layer-0/rotations.safetensors")
    after = load_layer("mlps/layer-0/layer.safetensors", "silu")(rotations.apply_in(x))
    np.testing.assert_allclose(after, rotations.apply_out(mlp_layer(model, 0)(x)), atol=1e-4)


def test_padding_and_special_tokens_as_one_says(rotsparse, model):
    tokens = np.random.default_rng(0).integers(3, 31, (10, 16))
    tokens[:, 12:] = 2
    np.save("padded.npy", tokens)
    capture = ("capture", "--model", "model.bin", "--tokens", "padded.npy", "--length", 16)
    assert rotsparse(*capture, "--out", "all")[0] == 0 and open_store("all/0.input").shape[0] == 160
    assert rotsparse(*capture, "--out", "some", "--pad", 2)[0] == 0
    store = open_store("some/0.input")
    assert store.shape[0] == 120 and store.manifest["tokens"]["pad"] == 2
    Path("text.txt").write_text("a text")
    code, said = rotsparse("capture", "--model", "model.bin", "--text", "text.txt", "--pad", 2, "--out", "none")
    assert code == 2 and "--pad belongs to --tokens" in said


def test_a_hugging_face_model_whose_stream_must_keep_its_mean(rotsparse, tmp_path):
    save_model(tiny("gpt2"), "gpt2")
    np.save("tokens.npy", np.random.default_rng(0).integers(0, 31, 64))
    source = ("--model", "gpt2", "--tokens", "tokens.npy")
    assert rotsparse("capture", *source, "--out", "store", "--sites", "residual", "--length", 16)[0] == 0
    fit = ("fit-model", "--model", "gpt2", "--store", "store", "--layers", 1, "--site", "residual", "--skip", "--tie")
    options = ("--solver", "annealing", "--steps", 20, "--control", "none", "--out", "run")
    assert rotsparse(*fit, *options)[0] == 0
    assert rotsparse("report", "run")[0] == 0
    code, said = rotsparse("explain", "run")
    assert code == 0 and "left out" not in said
    assert "norm and MLP and stream" in Path("run/layer-1/directions.html").read_text()
    rotations = "run/layer-1/rotations.safetensors"
    code, said = rotsparse("fold-model", *source, "--rotations", rotations, "--out", "folded")
    assert code == 0 and "rotations that keep its direction" in said
    tokens = np.load("tokens.npy").reshape(2, 32)
    before, after = (run(m.params, m.config, tokens)[0] for m in map(load_model, ("gpt2", "folded")))
    np.testing.assert_allclose(after, before, atol=1e-4)
    code, said = rotsparse("fold-model", *source, "--rotations", "run", "--out", "mlps")
    assert code == 2 and "rotates the stream in front of the norms" in said


def test_inspect(rotsparse, model, tmp_path):
    code, said = rotsparse("inspect", "model.bin")
    assert code == 0 and "gated silu" in said and "any rotation of the whole stream" in said
    save_model(tiny("bert"), "bert")
    code, said = rotsparse("inspect", "bert")
    assert code == 0 and "post-LN" in said and "fold_mlp" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere.bin"], "nowhere.bin"),
        (["inspect", "tokens.npy"], "is no model"),
        ([*CAPTURE, "--layers", "0-2"], "--layers 0-2: the model has layers 0 to 1"),
        ([*CAPTURE, "--layers", "first"], "numbers and ranges such as 0-4"),
        ([*CAPTURE, "--text", "text.txt"], "one of them"),
        (["capture", "--model", "model.bin", "--out", "store"], "one of them"),
        (["capture", "--model", "model.bin", "--text", "text.txt", "--out", "store"], "--tokenizer"),
        ([*CAPTURE, "--sequences", "0"], "--sequences should be greater than zero"),
        (FIT, "store/0.input holds no activations"),
        ([*FIT, "--skip"], "--skip adds the stream in front of the norm"),
        ([*FIT, "--eps", "-1"], "--eps should be greater than zero"),
        ([*FOLD, "nowhere", "--out", "folded.bin"], "cannot read rotations from nowhere"),
        ([*FOLD, "empty", "--out", "folded"], "holds no layer-*/rotations.safetensors"),
        ([*FOLD, "r.safetensors", "--out", "tokens.npy"], "tokens.npy exists"),
        ([*FOLD, "r.safetensors", "--out", "folded"], "ends in .bin"),
        ([*FOLD, "r.safetensors", "--side", "in", "--out", "folded.bin"], "stream has width 16"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_input_is_explained(rotsparse, model, tmp_path, arguments, message):
    (tmp_path / "text.txt").write_text("Once upon a time")
    (tmp_path / "empty").mkdir()
    Rotations.identity(3, 16).save("r.safetensors")
    before = {p.name for p in tmp_path.iterdir()}
    code, said = rotsparse(*arguments)
    assert code == 2 and message in said and "Traceback" not in said
    assert {p.name for p in tmp_path.iterdir()} - {"cache"} == before - {"cache"}  # nothing half-written


def test_a_store_of_another_model_is_refused(rotsparse, model):
    assert rotsparse(*CAPTURE)[0] == 0
    save_model(tiny_llama2c(1), "other.bin")
    code, said = rotsparse("fit-model", "--model", "other.bin", "--store", "store", "--out", "run")
    assert code == 2 and "come from another model" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_capture_that_is_stopped_says_that_the_same_command_goes_on(rotsparse, model, monkeypatch, number):
    monkeypatch.setattr("rotsparse.models.capture", lambda *a, **k: send(number))
    code, said = rotsparse(*CAPTURE)
    assert code == 75 and "interrupted: to go on, give the same command again" in said


def test_fit_model_goes_on_with_the_layer_it_was_stopped_in(rotsparse, model, tmp_path, monkeypatch):
    assert rotsparse(*CAPTURE)[0] == 0
    fitted, run = [], layer_run.run

    def spy(folder, *arguments, **options):
        fitted.append(folder.name)
        if len(fitted) == 2:
            send(signal.SIGTERM)
        return run(folder, *arguments, **options)

    monkeypatch.setattr(layer_run, "run", spy)
    code, said = rotsparse(*FIT, "--layers", "0-1")
    assert code == 75 and "--resume" in said and not (tmp_path / "run").exists()
    first = (tmp_path / "run.unfinished" / "layer-0" / "metrics.json").read_bytes()
    code, said = rotsparse(*FIT, "--layers", "0-1", "--resume")
    assert code == 0 and fitted == ["layer-0", "layer-1", "layer-1"]
    assert (tmp_path / "run" / "layer-0" / "metrics.json").read_bytes() == first
    assert (tmp_path / "run" / "layer-1" / "report.html").exists()
    assert not list((tmp_path / "run").rglob("checkpoints"))
    code, said = rotsparse("runs", ".")
    assert code == 0 and "fit-model" in said and "complete" in said and "2 fits" in said


@pytest.mark.slow
@needs_stories
def test_stories_from_text_to_a_folded_model_that_writes_the_same(rotsparse):
    model, text = STORIES / "stories260K.bin", STORIES / "../text/ts_sample.txt"
    source = ("--model", model, "--tokenizer", STORIES / "tok512.bin", "--text", text)
    assert rotsparse("capture", *source, "--out", "store")[0] == 0
    fit = ("fit-model", "--model", model, "--store", "store", "--layers", "0-4", "--out", "run")
    assert rotsparse(*fit)[0] == 0
    for i in range(5):
        metrics = json.loads(Path(f"run/layer-{i}/metrics.json").read_text())["metrics"]
        learned = metrics.pop("learned")["edges_99"]["value"]
        assert learned < min(of["edges_99"]["value"] for of in metrics.values())
    rotations = "run/layer-4/rotations.safetensors"
    assert rotsparse("fold-model", *source, "--rotations", rotations, "--out", "folded.bin")[0] == 0
    original, folded = load_model(model), load_model("folded.bin")
    prompt = np.asarray([load_tokenizer(STORIES / "tok512.bin", original).prefix])
    np.testing.assert_array_equal(generate(original, prompt, 100), generate(folded, prompt, 100))


@needs_stories
def test_stories_are_steered_and_their_directions_exported(rotsparse):
    model, text = STORIES / "stories260K.bin", STORIES / "../text/ts_sample.txt"
    tokenizer = ("--tokenizer", STORIES / "tok512.bin")
    source = ("--model", model, *tokenizer, "--text", text)
    assert rotsparse("capture", *source, "--layers", 2, "--out", "store", "--sequences", 40)[0] == 0
    assert rotsparse(*FIT[:2], model, *FIT[3:], "--layers", 2)[0] == 0
    steer = ("steer", "run/layer-2", "--prompt", "Once upon", "--length", 12, "--direction")
    code, said = rotsparse(*steer, "out-1", "--by", 0, *tokenizer)
    plain, pushed = said.removeprefix("as it is: ").split("out-1 by +0 sd: ")
    assert code == 0 and plain.strip() == pushed.strip() and plain.startswith("Once upon a time")
    code, said = rotsparse(*steer, "out-1", "--by", 30, *tokenizer)
    plain, pushed = said.removeprefix("as it is: ").split("out-1 by +30 sd: ")
    assert code == 0 and plain.strip() != pushed.strip()
    for direction, error in (("1", "such as out-17"), ("in-64", "there are 64 in directions, 0 to 63")):
        code, said = rotsparse(*steer, direction, *tokenizer)
        assert code == 2 and error in said
    code, said = rotsparse(*steer, "in-0")
    assert code == 2 and "comes without a tokenizer: name its file with --tokenizer" in said
    code, said = rotsparse("export", "run/layer-2", "--out", "sae")
    assert code == 0 and "64 directions as an autoencoder of 128 features" in said
    assert json.loads(Path("sae/cfg.json").read_text())["metadata"]["hook_name"] == "blocks.2.hook_mlp_out"
    code, said = rotsparse("export", "run/layer-2", "--out", "sae")
    assert code == 2 and "exists" in said
