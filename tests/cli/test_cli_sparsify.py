"""`rotsparse sparsify`, as a user meets it."""

import json
import signal

import numpy as np
import pytest

from rotsparse.models import load_model, save_model
from rotsparse.runs import sparse_run
from rotsparse.sparse.file import read_sparse_inputs
from rotsparse.sparse.perplexity import costs
from signals import send
from tiny_models import tiny_llama2c

SPARSIFY = ("sparsify", "model.bin", "tokens.npy", "--length", 16, "--steps", 10, "--shares", 0.5, "--out", "run")


@pytest.fixture
def model(tmp_path):
    save_model(tiny_llama2c(), tmp_path / "model.bin")
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 31, 640))
    np.save(tmp_path / "few.npy", np.zeros(20, np.int64))
    return load_model(tmp_path / "model.bin")


def test_from_a_model_and_tokens_to_sparse_inputs(rotsparse, model, tmp_path):
    code, said = rotsparse(*SPARSIFY)
    assert code == 0 and "PCA (LaRoSA)" in said and "run/report.html" in said
    run = tmp_path / "run"
    metrics = json.loads((run / "metrics.json").read_text())
    methods = {"none", "wina", "hadamard", "pca", "weighted", "fisher", "learned"}
    assert {row["method"] for row in metrics["rows"]} == methods
    assert metrics["method"] == "learned" and metrics["tokens"] == 128  # the last fifth
    inputs = read_sparse_inputs(run / "rotsparse.safetensors", model)
    assert len(inputs) == 4 * model.config.n_layers
    assert all((of.rotation is None) == (point[1] == "hidden") for point, of in inputs.items())
    page = (run / "report.html").read_text()
    assert "With 50% of the weights not read" in page and "<img" in page and "http" not in page.split("</style>")[1]
    assert not (run / "checkpoints").exists()

    code, said = rotsparse(*SPARSIFY)
    assert code == 2 and "run exists" in said

    code, said = rotsparse("export", "run", "--out", "exported")
    assert code == 0 and "read back" in said
    again = load_model(tmp_path / "exported")
    assert len(read_sparse_inputs(tmp_path / "exported" / "rotsparse.safetensors", again)) == len(inputs)
    with pytest.raises(ValueError, match="other"):
        read_sparse_inputs(tmp_path / "exported" / "rotsparse.safetensors", tiny_llama2c(1))
    code, said = rotsparse("export", "run", "--to", "sae", "--out", "saes")
    assert code == 2 and "sparse inputs" in said


def test_an_interrupted_run_goes_on_with_the_next_layer(rotsparse, model, tmp_path, monkeypatch):
    rotsparse(*SPARSIFY)
    (tmp_path / "run").rename(tmp_path / "whole")
    done = []

    def spy(of, point, *arguments):
        done.append(tuple(point))
        if point == (1, "heads"):
            send(signal.SIGTERM)
        return original(of, point, *arguments)

    original = sparse_run.of_one_site
    with monkeypatch.context() as patch:
        patch.setattr(sparse_run, "of_one_site", spy)
        code, said = rotsparse(*SPARSIFY)
        assert code == 75 and "--resume" in said
        done.clear()
        patch.setattr(sparse_run, "of_one_site", lambda *a: done.append(tuple(a[1])) or original(*a))
        code, said = rotsparse(*SPARSIFY, "--resume")
    assert code == 0 and {layer for layer, _ in done} == {1}
    rows = [json.loads((tmp_path / name / "metrics.json").read_text())["rows"] for name in ("run", "whole")]
    assert rows[0] == rows[1]


def test_an_interrupted_comparison_goes_on_with_the_next_sequences(rotsparse, model, tmp_path, monkeypatch):
    monkeypatch.setattr(sparse_run, "together", lambda: 1)
    rotsparse(*SPARSIFY)
    (tmp_path / "run").rename(tmp_path / "whole")
    done = []

    def spy(model, tokens, trials, **options):
        done.append(tokens)
        if len(done) == 2:
            send(signal.SIGTERM)
        return original(model, tokens, trials, **options)

    original = sparse_run.costs
    monkeypatch.setattr(sparse_run, "costs", spy)
    code, said = rotsparse(*SPARSIFY)
    assert code == 75 and "--resume" in said
    code, said = rotsparse(*SPARSIFY, "--resume")
    assert code == 0
    assert len(done) > 2 and not any(np.array_equal(again, done[0]) for again in done[2:])
    rows = [json.loads((tmp_path / name / "metrics.json").read_text())["rows"] for name in ("run", "whole")]
    assert rows[0] == rows[1]


def test_shifts_are_trained_once(rotsparse, model, tmp_path, monkeypatch):
    """An interrupted run trains nothing twice, and what it writes is what it measured."""
    few = (*SPARSIFY, "--methods", "pca", "--train-shifts", 5)
    with monkeypatch.context() as patch:
        patch.setattr(sparse_run, "write_sparse_inputs", lambda *a: send(signal.SIGTERM))
        assert rotsparse(*few)[0] == 75
    monkeypatch.setattr(sparse_run, "trained_shifts", None)
    code, said = rotsparse(*few, "--resume")
    assert code == 0 and "the result, with trained shifts" in said
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    row = metrics["rows"][-1]
    assert (metrics["choice"], metrics["method"]) == (row["choice"], row["method"]) == ("trained", "pca")
    inputs = read_sparse_inputs(tmp_path / "run" / "rotsparse.safetensors", model)
    assert all(np.abs(np.asarray(of.shift)).max() > 0 for of in inputs.values())
    tokens = np.load(tmp_path / "tokens.npy").reshape(-1, 16)[-8:]
    measured = costs(model, tokens, [inputs])
    np.testing.assert_allclose(measured.divergence.mean(), row["divergence"], rtol=1e-4)


def test_one_held_out_sequence_has_no_standard_error(rotsparse, model, tmp_path):
    np.save(tmp_path / "tokens.npy", np.load(tmp_path / "tokens.npy")[:48])
    code, said = rotsparse(*SPARSIFY, "--methods", "none")
    assert code == 0 and "±" not in said and "nan" not in said
    (row, *_) = json.loads((tmp_path / "run" / "metrics.json").read_text())["rows"]
    assert row["divergence"] > 0 and row["rise_error"] is None
    assert "nan" not in (tmp_path / "run" / "report.html").read_text().split("base64")[0].lower()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--keep", 0), "expected .05 to 1"),
        (("--layers", 7), "layers 0 to"),
        (("--test-text", "few.npy"), "whole sequences"),
        (("--methods", "pca", "pca"), "each of them once"),
        (("--train-shifts", -1), "0 or more"),
    ],
)
def test_bad_options_are_explained(rotsparse, model, arguments, message):
    code, said = rotsparse(*SPARSIFY, *arguments)
    assert code == 2 and message in said
