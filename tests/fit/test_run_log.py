"""The log of a fit: whole lines as it runs, no step twice after a resumption."""

import builtins
import json

import numpy as np
import pytest

from rotsparse.engine.log import LogWriter, read_log


def write(folder, *steps, begun_at=0, **options):
    writer = LogWriter(folder, begun_at, **options)
    for step in steps:
        checked = np.array([0.5, np.nan]) if step % 20 == 0 else None
        writer.write(step, objective=np.array([step, 0.25], np.float32), checked=checked, seconds=1.5)
    writer.close()


def steps(folder):
    return [line["step"] for line in read_log(folder)]


def test_lines(tmp_path):
    write(tmp_path / "run", 10, 20)
    assert read_log(tmp_path / "run") == [
        {"step": 10, "objective": [10.0, 0.25], "seconds": 1.5},
        {"step": 20, "objective": [20.0, 0.25], "checked": [0.5, None], "seconds": 1.5},
    ]
    assert read_log(tmp_path / "elsewhere") == []


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path):
    writer = LogWriter(tmp_path, 0)
    writer.write(10, seconds=1.0)
    assert steps(tmp_path) == [10]
    writer.close()


def test_going_on_drops_what_was_written_behind_the_checkpoint(tmp_path):
    write(tmp_path, 10, 20, 30)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 40, "objec')  # killed in the middle of a line
    assert steps(tmp_path) == [10, 20, 30]
    write(tmp_path, 25, 35, begun_at=20)
    assert steps(tmp_path) == [10, 20, 25, 35]
    write(tmp_path, 5)  # a fit that begins anew
    assert steps(tmp_path) == [5]


def test_a_full_disk_ends_the_log_and_not_the_fit(tmp_path):
    writer = LogWriter(tmp_path, 0)
    writer.write(10, seconds=1.0)
    writer._file.close()
    writer._file = open("/dev/full", "w", buffering=1)
    with pytest.warns(UserWarning, match="/dev/full ends at step 20: No space left on device"):
        writer.write(20, seconds=2.0)
    writer.write(30, seconds=3.0)
    writer.close()
    assert steps(tmp_path) == [10]


def test_targets_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write to"):
        LogWriter(tmp_path / "file", 0)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX", reason="needs the extra `tensorboard`")
    write(tmp_path, 10, 20, tensorboard=True)
    (events,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    content = events.read_bytes()
    assert all(
        tag in content for tag in (b"objective/restart_0", b"objective/restart_1", b"checked/restart_0", b"seconds")
    )


def test_tensorboard_without_its_extra(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments):
        if name == "tensorboardX":
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'rotsparse\[tensorboard\]'"):
        LogWriter(tmp_path, 0, tensorboard=True)
    assert json.dumps(read_log(tmp_path)) == "[]"
