"""kill -9 at any moment: every start afterwards goes on, no acknowledged checkpoint is lost, the end is the same."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

# A fit of a few seconds that saves most of the time. It says where it begins, and notes every acknowledged checkpoint.
WORKER = """
import os, sys
import jax
import numpy as np
import rotsparse as rs
from rotsparse.engine._checkpoint import Session
from rotsparse.objectives import ActivationSparsity

folder, out = sys.argv[1:]
restore, write, due = Session.restore, Session._write, Session.due

def noted_restore(session):
    state = restore(session)
    print(0 if state is None else int(state.step), flush=True)
    return state

def noted_write(session, step, *rest):
    write(session, step, *rest)
    with open(folder + "/acknowledged", "a") as file:
        file.write(f"{step}\\n")

def noted_due(session, step):  # is asked before the first steps
    print("stepping", flush=True)
    Session.due = due
    return due(session, step)

Session.restore, Session._write, Session.due = noted_restore, noted_write, noted_due
x = np.random.default_rng(0).standard_normal((100, 6)).astype(np.float32)
objective = ActivationSparsity(x, rs.Log(0.3))
solution = rs.minimize(
    objective, {"in": np.eye(6, dtype=np.float32)}, key=jax.random.key(0), restarts=2,
    method=rs.Anneal(steps=6000, batch_size=8), run=rs.Run(folder, every_steps=150),
)
assert solution.result.ok, solution.summary()
np.savez(out, *solution.candidates[0].values(), *solution.candidates[1].values(), solution.history.objective,
         solution.history.checked)
"""


class Killed:
    """Starts workers on one folder, and counts what happens to them."""

    def __init__(self, tmp_path):
        self.folder = tmp_path
        self.environment = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONWARNINGS": "error::UserWarning:rotsparse",  # a damaged checkpoint would warn
        }
        self.kills = self.while_saving = self.sessions = 0

    def start(self, name):
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-c", WORKER, str(folder), str(self.folder / f"{name}.npz")]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.environment
        )

    def finish(self, name):
        """Run to the end, uninterrupted: the results."""
        worker = self.start(name)
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors
        return self.results(name)

    def results(self, name):
        with np.load(self.folder / f"{name}.npz") as file:
            return [file[key].tobytes() for key in file.files]

    def run_and_kill(self, name, seconds):
        """Start it, kill it so long after its first step, and say whether it had ended before."""
        acknowledged = self.folder / name / "acknowledged"
        before = [int(line) for line in acknowledged.read_text().split()] if acknowledged.exists() else [0]
        worker = self.start(name)
        assert worker.stdout is not None and worker.stderr is not None
        begun_at = worker.stdout.readline()
        assert begun_at, worker.stderr.read()
        assert int(begun_at) >= before[-1], f"checkpoint {before[-1]} was acknowledged, and it began at {begun_at}"
        assert before[-1] == max(before)
        assert worker.stdout.readline() == "stepping\n"
        self.sessions += 1
        try:
            worker.wait(seconds)
        except subprocess.TimeoutExpired:
            os.kill(worker.pid, signal.SIGKILL)
        errors = worker.communicate()[1]
        if worker.returncode == 0:
            return True
        assert worker.returncode == -signal.SIGKILL, errors
        self.kills += 1
        self.while_saving += any((self.folder / name / "checkpoints").glob("saving-*"))
        return False


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments(kills, tmp_path):
    killed = Killed(tmp_path)
    expected = killed.finish("whole")
    rng = np.random.default_rng(kills)
    fits = 0
    while killed.kills < kills:
        name = f"fit-{fits}"
        while killed.kills < kills:
            if killed.run_and_kill(name, rng.uniform(0, 1.5)):
                break
        assert killed.finish(name) == expected if killed.kills == kills else killed.results(name) == expected
        fits += 1
    print(
        f"\n{killed.kills} kills, {killed.while_saving} of them during a save, in {killed.sessions} sessions of {fits} "
        "fits: every start went on from the last acknowledged checkpoint or a later one, all results equal to the bit"
    )
