"""Runs of the command line that are stopped and resumed: exit codes, what lies where, and the same result."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from rotsparse.engine._progress import Progress
from rotsparse.engine.log import read_log
from rotsparse.engine.solution import Solution
from signals import send

D = 5


@pytest.fixture
def files(folder, rng):
    """The current folder, with a layer and activations."""
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    np.savez("layer.npz", w_in=draw(7, D), b_in=draw(7), w_out=draw(4, 7))
    np.save("x.npy", draw(60, D))
    return folder


def fit(steps, *more):
    command = ["fit", "--layer", "layer.npz", "--activations", "x.npy", "--solver", "annealing", "--out", "run"]
    return [*command, "--steps", str(steps), "--control", "none", *more]


def test_a_run_that_is_stopped_and_resumed(files, rotsparse, monkeypatch):
    assert rotsparse(*fit(60))[0] == 0
    (files / "run").rename(files / "whole")

    def stop(self, done, **shown):
        if done >= 30:
            send(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "update", stop)
        code, said = rotsparse(*fit(60))
    assert code == 75
    assert "to go on, give the same command with --resume (run.unfinished)" in said
    assert not (files / "run").exists()
    assert json.loads((files / "run.unfinished" / "status.json").read_text())["state"] == "interrupted"
    assert [line["step"] for line in read_log("run.unfinished")][-1] == 40
    code, said = rotsparse("runs", ".")
    assert code == 0 and "interrupted" in said and "40 of 60" in said

    code, said = rotsparse(*fit(60))
    assert code == 2 and "pass --resume to go on" in said
    code, said = rotsparse(*fit(80, "--resume"))
    assert code == 2 and "steps: 60 then, 80 now" in said
    np.save("y.npy", np.load("x.npy"))
    code, said = rotsparse(*fit(60, "--resume", "--activations", "y.npy"))
    assert code == 2 and f"activations: {files / 'x.npy'} then, {files / 'y.npy'} now" in said
    intact = np.load("x.npy")
    np.save("x.npy", intact + np.float32(1))
    code, said = rotsparse(*fit(60, "--resume"))
    assert code == 2 and f"{files / 'x.npy'} has changed: its SHA-256 was" in said
    np.save("x.npy", intact)

    assert rotsparse(*fit(60, "--resume"))[0] == 0
    assert not (files / "run.unfinished").exists() and not (files / "run" / "checkpoints").exists()
    whole, resumed = (Solution.load(files / name / "solution.npz") for name in ("whole", "run"))
    assert resumed.stats["resumed_at"] == 40 and "resumed_at" not in whole.stats
    for space in whole.bases:
        np.testing.assert_array_equal(whole.bases[space], resumed.bases[space])
    np.testing.assert_array_equal(whole.history.objective, resumed.history.objective)
    metrics = [json.loads((files / name / "metrics.json").read_text())["metrics"] for name in ("whole", "run")]
    assert metrics[0] == metrics[1]
    steps = [line["step"] for line in read_log("run")]
    assert steps == sorted(set(steps)) and steps[-1] == 60


def test_stopped_or_failed_behind_the_fit(files, rotsparse, monkeypatch):
    """While the report is drawn: what was fitted is kept."""

    def full_disk(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("rotsparse.report.write.write_report", full_disk)
        code, said = rotsparse(*fit(20))
        assert code == 2 and "error: No space left on device" in said
    code, said = rotsparse("runs", ".")
    assert "failed" in said and "No space left" in said
    with monkeypatch.context() as patched:
        patched.setattr("rotsparse.report.write.write_report", lambda *a, **k: send(signal.SIGTERM))
        assert rotsparse(*fit(20, "--resume"))[0] == 75
    assert not (files / "run").exists()
    assert rotsparse(*fit(20, "--resume"))[0] == 0
    assert Solution.load("run/solution.npz").stats["resumed_at"] == 20


def test_sigterm_ends_a_process_with_its_own_exit_code(files):
    """A real process: it saves within seconds of the signal, far from its end."""
    command = [sys.executable, "-c", "from rotsparse_command import main; main()", *fit(3_000_000)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not read_log("run.unfinished") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 75, out + errors
    assert "with --resume" in errors
    (checkpoint,) = (files / "run.unfinished" / "checkpoints").glob("step-*")
    assert 0 < int(checkpoint.name.removeprefix("step-")) < 3_000_000
