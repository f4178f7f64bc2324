"""Run folders: complete or not there, and an earlier result is never harmed."""

import json

import numpy as np
import pytest
from rich.console import Console

from rotsparse._core import files
from rotsparse._core.errors import CheckError
from rotsparse._core.interrupt import Interrupted
from rotsparse.report.subject import subject
from rotsparse.runs import folders, listing


def content(folder):
    """What is in a folder, beside the record of what rotsparse made in it."""
    return {p.name: p.read_text() for p in folder.iterdir() if p.name != files.RECORD}


def write(out, text="a", **options):
    with folders.new_run(out, **options) as folder:
        folders.write_json(folder / "config.json", {"text": text})


def test_a_run_appears_when_it_is_complete(tmp_path):
    out = tmp_path / "deep" / "run"
    with folders.new_run(out) as folder:
        folders.write_json(folder / "config.json", {})
        assert not out.exists()
    assert [p.name for p in out.parent.iterdir()] == ["run"]
    assert content(out).keys() == {"config.json", "status.json"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failed_run_leaves_nothing_and_harms_nothing(tmp_path, error):
    out = tmp_path / "run"
    with pytest.raises(error), folders.new_run(out) as folder:
        folders.write_json(folder / "config.json", {})
        raise error
    assert list(tmp_path.iterdir()) == []
    write(out)
    before = content(out)
    with pytest.raises(error), folders.new_run(out, overwrite=True) as folder:
        folders.write_json(folder / "config.json", {"text": "b"})
        raise error
    assert content(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_existing_folders_are_not_replaced_unless_told(tmp_path):
    out = tmp_path / "run"
    write(out)
    with pytest.raises(ValueError, match="exists: choose another folder, or pass --overwrite"):
        write(out)
    write(out, "b", overwrite=True)
    assert folders.read_json(out / "config.json") == {"text": "b"}
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "chapter").write_text("1")
    with pytest.raises(ValueError, match="not a run folder"):
        write(mine, overwrite=True)
    assert content(mine) == {"chapter": "1"}


def test_a_model_is_no_run(tmp_path):
    """Folders of Hugging Face models hold a config.json as well."""
    model, early = tmp_path / "gpt2", tmp_path / "early"
    for folder, config in {model: {"model_type": "gpt2"}, early: {"command": "fit", "versions": {}}}.items():
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
    (model / "model.safetensors").write_text("weights")
    with pytest.raises(ValueError, match="gpt2 is not a run folder"):
        write(model, overwrite=True)
    assert content(model).keys() == {"config.json", "model.safetensors"}
    assert [run.folder for run in listing.runs_in(tmp_path)] == [early]
    with pytest.raises(ValueError, match=r"early has no .rotsparse, the record .* remove it yourself"):
        write(early, "b", overwrite=True)  # it is a run of an earlier version: listed, and not replaced
    (model / "status.json").write_text('{"state": "downloaded"}')
    with pytest.raises(ValueError, match="gpt2 is not a run folder"):
        write(model, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_during_a_run_is_not_harmed(tmp_path, overwrite):
    """Neither that nor the run: a user's own folder is never replaced, a run only by one that was to overwrite."""
    out, work = tmp_path / "run", tmp_path / "run.unfinished"
    with pytest.raises(ValueError, match=f"{out} appeared .* complete run is in {work}"):
        with folders.new_run(out, overwrite=overwrite) as folder:
            folders.write_json(folder / "config.json", {"text": "result"})
            if overwrite:
                out.mkdir()
                (out / "chapter").write_text("1")
            else:
                (tmp_path / "other").mkdir()
                write(tmp_path / "other" / "run")
                (tmp_path / "other" / "run").rename(out)
    before, result = content(out), content(work)
    assert json.loads(result["config.json"])["text"] == "result"
    assert [run.state for run in listing.runs_in(work)] == ["complete"]
    for again in (False, True):  # asking once more harms neither
        with pytest.raises(ValueError, match=r"run exists|not a run folder"):
            write(out, overwrite=overwrite, resume=again)
    out.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="holds a complete run that could not be moved into place"):
        write(out)
    assert content(work) == result and content(tmp_path / "elsewhere") == before
    write(out, "b", overwrite=True)
    assert folders.read_json(out / "config.json") == {"text": "b"} and not work.exists()


def test_a_run_that_appears_is_replaced_where_that_was_asked_for(tmp_path):
    out = tmp_path / "run"
    with folders.new_run(out, overwrite=True) as folder:
        folders.write_json(folder / "config.json", {"text": "new"})
        write(tmp_path / "other")
        (tmp_path / "other").rename(out)
    assert folders.read_json(out / "config.json") == {"text": "new"}


@pytest.mark.parametrize(
    ("config", "of"),
    [
        ({"command": "fit", "layer": "/data/mlp.npz"}, "mlp.npz"),
        ({"command": "demo", "network": "addition"}, "addition"),
        ({"command": "fit-model", "model": "/m/stories.bin", "layers": "0-4"}, "stories.bin, layer 0-4"),
        ({"command": "fit-model", "model": "/m/stories.bin", "layers": "all"}, "stories.bin, all layers"),
        ({"command": "fit-model", "model": "m", "layer": "layer.safetensors", "layer_number": 3}, "m, layer 3"),
        ({}, ""),
    ],
)
def test_what_a_run_is_of(config, of):
    assert subject(config) == of


def test_a_target_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write to"):
        write(tmp_path / "file" / "run")


def begin(out, *, then, **options):
    """A run that saves a checkpoint and then meets `then`."""
    with folders.new_run(out, **options) as folder:
        files.make_folder(folder / "checkpoints" / "step-00000001")
        folders.write_json(folder / "config.json", {"text": "new"})
        raise then


def test_an_interrupted_run_can_be_resumed(tmp_path):
    out, config = tmp_path / "run", {"command": "fit", "steps": 10, "layer": "a.npz"}
    write(out, "old")
    before = content(out)
    with pytest.raises(Interrupted, match="give the same command with --resume"):
        begin(out, then=KeyboardInterrupt(), config=config, overwrite=True)
    assert content(out) == before
    out.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="pass --resume to go on with it, or --overwrite to begin again"):
        write(out, config=config)
    (tmp_path / "elsewhere").rename(out)
    # other options are refused with the difference, those that change nothing are not compared
    with pytest.raises(ValueError, match=r"begun with other options:\n  steps: 10 then, 20 now\n"):
        write(out, config=config | {"steps": 20}, overwrite=True, resume=True)
    with folders.new_run(out, config=config | {"resume": True}, overwrite=True, resume=True) as folder:
        assert (folder / "checkpoints" / "step-00000001").is_dir()
        assert folders.read_json(folder / "config.json") == {"text": "new"}
    assert content(out).keys() == {"config.json", "status.json"}  # checkpoints are gone
    assert folders.read_json(out / "config.json") == {"text": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_beginning_again_removes_what_was_there(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        begin(out, then=KeyboardInterrupt())
    with folders.new_run(out, overwrite=True) as folder:
        assert content(folder).keys() == {"lock", "status.json"}
    # killed before there was a checkpoint: nothing to go on with, nothing to ask
    unfinished = tmp_path / "other.unfinished"
    files.make_folder(unfinished)
    files.write_atomically(unfinished / "layer.npz", b"")
    write(tmp_path / "other")
    assert not (tmp_path / "other" / "layer.npz").exists()


def test_one_process_at_a_time(tmp_path):
    out = tmp_path / "run"
    with folders.new_run(out) as folder:
        with pytest.raises(ValueError, match=r"run.unfinished is in use by process \d+ on"):
            write(out)
        folders.write_json(folder / "config.json", {})
    assert content(out)


def test_the_list_of_runs(tmp_path):
    def log(folder, *checked):
        lines = [{"step": 10 * i, "objective": [1.0], "checked": c} for i, c in enumerate(checked, start=1)]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    config = {"command": "fit", "steps": 50}
    for name, result in {"good": "ALL_STEPS", "bad": "NON_FINITE"}.items():
        with folders.new_run(tmp_path / name, config=config) as folder:
            folders.write_json(folder / "config.json", config)
            sizes = {basis: {"edges_99": {"value": n}} for basis, n in (("neurons", 4000.0), ("learned", 31.0))}
            folders.write_json(folder / "metrics.json", {"result": result, "metrics": sizes})
            log(folder, [0.5, 0.4], [0.3, 0.45], None)
            stage = folder / "stage-1" / "look"  # a stage of the same fit, the last to write
            stage.mkdir(parents=True)
            log(stage, None)
    for name, error in {"stopped": KeyboardInterrupt(), "broken": OSError("disk on fire")}.items():
        with pytest.raises(type(error)):
            begin(tmp_path / name, then=error, config=config)
    with folders.new_run(tmp_path / "now", config=config) as folder:
        log(folder, [0.9], [None])
        listed = {run.folder.name: run for run in listing.runs_in(tmp_path)}
    assert {name: run.state for name, run in listed.items()} == {
        "good": "complete",
        "bad": "failed",
        "stopped.unfinished": "interrupted",
        "broken.unfinished": "failed",
        "now.unfinished": "running",
    }
    assert (listed["good"].step, listed["good"].steps, listed["good"].value) == (30, 50, 0.3)
    assert listed["good"].note == ""
    assert listed["now.unfinished"].value == 0.9
    assert listed["good"].finding == "entries for 99%: 4,000 → 31" and listed["bad"].finding == ""
    assert listed["good"].began[:2] == "20"
    assert listed["broken.unfinished"].note == "disk on fire"
    assert "--resume" in listed["stopped.unfinished"].note
    status = tmp_path / "stopped.unfinished" / "status.json"
    folders.write_json(status, folders.read_json(status) | {"state": "running"})  # as kill -9 leaves it
    assert [(run.state, run.note) for run in listing.runs_in(tmp_path / "stopped.unfinished")] == [
        ("interrupted", "killed; --resume goes on")
    ]
    console = Console(width=200)
    with console.capture() as shown:
        console.print(listing.table(tmp_path))
    assert "30 of 50" in shown.get() and "disk on fire" in shown.get() and "4,000 → 31" in shown.get()
    assert listing.table(tmp_path / "good").title is None
    (tmp_path / "empty").mkdir()
    assert str(listing.table(tmp_path / "empty").title) == f"no runs in {tmp_path / 'empty'}"
    with pytest.raises(ValueError, match="not a folder"):
        listing.runs_in(tmp_path / "missing")


def test_a_changed_json_file_is_noticed(tmp_path):
    folders.write_json(tmp_path / "a.json", {"seed": 1, "x": [0.1, None]})
    intact = (tmp_path / "a.json").read_text()
    (tmp_path / "a.json").write_text(intact.replace('"seed": 1', '"seed": 3'))
    with pytest.raises(CheckError, match=r"a.json is damaged: .* If you have edited it, remove its entry \"digest\""):
        folders.read_json(tmp_path / "a.json")
    edited = {k: v for k, v in json.loads((tmp_path / "a.json").read_text()).items() if k != "digest"}
    (tmp_path / "a.json").write_text(json.dumps(edited))
    assert folders.read_json(tmp_path / "a.json") == {"seed": 3, "x": [0.1, None]}


def test_a_damaged_run_is_listed_as_such(tmp_path):
    with folders.new_run(tmp_path / "a", config={"command": "fit"}) as run:
        folders.write_json(run / "config.json", {"command": "fit", "versions": {}})
        folders.write_json(run / "metrics.json", {"result": "ALL_STEPS"})
    metrics = tmp_path / "a" / "metrics.json"
    metrics.write_text(metrics.read_text().replace("ALL", "ALT"))
    (found,) = listing.runs_in(tmp_path)
    assert (found.state, found.note) == ("complete", "metrics.json damaged")


def test_json(tmp_path):
    folders.write_json(
        tmp_path / "a.json", {"x": np.float32(0.5), 1: [np.arange(2), float("nan")], "n": None, "s": "é"}
    )
    assert folders.read_json(tmp_path / "a.json") == {"x": 0.5, "1": [[0, 1], None], "n": None, "s": "é"}
    for damaged in ("", '{"a": ', "\x00"):
        (tmp_path / "b.json").write_text(damaged)
        with pytest.raises(ValueError, match="cannot read"):
            folders.read_json(tmp_path / "b.json")
    with pytest.raises(ValueError, match="Is this a run folder"):
        folders.read_json(tmp_path / "missing.json")
