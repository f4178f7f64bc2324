"""Run folders: complete or not there, and an earlier result is never harmed."""

import json

import numpy as np
import pytest

from rotsparse import runs


def content(folder):
    return {p.name: p.read_text() for p in folder.iterdir()}


def write(out, text="a", **options):
    with runs.new_run(out, **options) as folder:
        runs.write_json(folder / "config.json", {"text": text})


def test_a_run_appears_when_it_is_complete(tmp_path):
    out = tmp_path / "deep" / "run"
    with runs.new_run(out) as folder:
        runs.write_json(folder / "config.json", {})
        assert not out.exists()
    assert [p.name for p in out.parent.iterdir()] == ["run"]
    assert content(out).keys() == {"config.json"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failed_run_leaves_nothing_and_harms_nothing(tmp_path, error):
    out = tmp_path / "run"
    with pytest.raises(error), runs.new_run(out) as folder:
        runs.write_json(folder / "config.json", {})
        raise error
    assert list(tmp_path.iterdir()) == []
    write(out)
    before = content(out)
    with pytest.raises(error), runs.new_run(out, overwrite=True) as folder:
        runs.write_json(folder / "config.json", {"text": "b"})
        raise error
    assert content(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_existing_folders_are_not_replaced_unless_told(tmp_path):
    out = tmp_path / "run"
    write(out)
    with pytest.raises(ValueError, match="exists: choose another folder, or pass --overwrite"):
        write(out)
    write(out, "b", overwrite=True)
    assert json.loads((out / "config.json").read_text()) == {"text": "b"}
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "chapter").write_text("1")
    with pytest.raises(ValueError, match="not a run folder"):
        write(mine, overwrite=True)
    assert content(mine) == {"chapter": "1"}


def test_a_target_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write to"):
        write(tmp_path / "file" / "run")


def test_json(tmp_path):
    runs.write_json(tmp_path / "a.json", {"x": np.float32(0.5), 1: [np.arange(2), float("nan")], "n": None, "s": "é"})
    assert runs.read_json(tmp_path / "a.json") == {"x": 0.5, "1": [[0, 1], None], "n": None, "s": "é"}
    for damaged in ("", '{"a": ', "\x00"):
        (tmp_path / "b.json").write_text(damaged)
        with pytest.raises(ValueError, match="cannot read"):
            runs.read_json(tmp_path / "b.json")
    with pytest.raises(ValueError, match="Is this a run folder"):
        runs.read_json(tmp_path / "missing.json")
