"""Ctrl-C and SIGTERM end the test run, also while a command runs in its process that catches them."""

import os
import signal
import subprocess
import sys

import pytest

from helpers import ROOT

TESTS = """
import os
import signal
import subprocess
import pytest
from signals import send


def test_a_command_that_its_test_tells_to_end(rotsparse, monkeypatch):
    monkeypatch.setattr("rotsparse.cli.commands.run", lambda command: send(signal.SIG{name}))
    assert rotsparse("runs", ".")[0] in (75, 130)


def test_a_command_that_is_told_to_end(rotsparse, monkeypatch):
    def killed_from_outside(command):
        subprocess.run(["kill", "-{name}", str(os.getpid())], check=True)
        signal.pause()

    monkeypatch.setattr("rotsparse.cli.commands.run", killed_from_outside)
    assert rotsparse("runs", ".")[0] in (75, 130)


def test_another():
    pass
"""


def run_tests(folder, name):
    (folder / "test_commands.py").write_text(TESTS.replace("{name}", name))
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "-v"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    env.pop("PYTEST_XDIST_WORKER", None)
    # Of its own session: what it does with signals is not the business of the run that this test belongs to.
    return subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True, start_new_session=True)


@pytest.mark.parametrize(("name", "code"), [("INT", int(pytest.ExitCode.INTERRUPTED)), ("TERM", 128 + signal.SIGTERM)])
def test_a_signal_from_outside_ends_the_run_and_one_that_a_test_sent_does_not(name, code, tmp_path):
    ended = run_tests(tmp_path, name)
    assert ended.returncode == code, ended.stdout + ended.stderr
    assert "test_a_command_that_its_test_tells_to_end PASSED" in ended.stdout
    assert "test_a_command_that_is_told_to_end PASSED" in ended.stdout
    assert "test_another" not in ended.stdout
