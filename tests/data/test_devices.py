"""Many devices and many processes give what one device gives; what goes wrong ends with an error, and is resumed."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from helpers import ROOT
from rotsparse.data.devices import Devices, device_mesh
from rotsparse.engine.log import read_log

PROGRAM = Path(__file__).with_name("distributed_fit.py")

# Sums over examples are taken in another order, and the steps that follow add to the difference.
SAME = {True: 1e-12, False: 1e-5}


def start(**options):
    """The program in a process of its own, on the CPU, and alone on its share of it."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(PROGRAM), json.dumps(options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def result(process, timeout=300):
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err[-4000:]
    answers = [line for line in out.splitlines() if line.startswith("[[")]  # gloo writes there, too
    return json.loads(answers[0]) if answers else None


def fit(**options):
    return np.array(result(start(**options)))


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def fit_in_processes(count, **options):
    """The result of as many processes of one device each."""
    port = free_port()
    processes = [start(processes=count, process=i, port=port, **options) for i in range(count)]
    first, *_ = [result(process) for process in processes]
    return np.array(first)


def test_the_number_of_devices_makes_no_difference():
    values = fit(devices=8, meshes=[None, [8, 2]], cases=["minibatch"], steps=10)
    np.testing.assert_allclose(values[1], values[0], rtol=SAME[True])


@pytest.mark.slow
@pytest.mark.parametrize("x64", [True, False])
@pytest.mark.parametrize("case", ["full", "minibatch", "source", "sum", "chain"])
def test_every_number_of_devices(case, x64, tmp_path):
    meshes = [None, [1, 1], [2, 1], [4, 1], [8, 1], [2, 2], [8, 2]]
    values = fit(devices=8, meshes=meshes, cases=[case], x64=x64, steps=15, data=str(tmp_path / "x.npy"))
    np.testing.assert_allclose(values, np.broadcast_to(values[0], values.shape), rtol=SAME[x64])


def test_two_processes(tmp_path):
    options = {"cases": ["source"], "steps": 10, "data": str(tmp_path / "x.npy")}
    alone = fit(**options)
    together = fit_in_processes(2, meshes=[[2, 1]], run=str(tmp_path / "run"), **options)
    np.testing.assert_allclose(together, alone, rtol=SAME[True])
    steps = [line["step"] for line in read_log(tmp_path / "run")]
    assert steps == sorted(set(steps)) and steps[-1] == 10  # one process writes it


@pytest.mark.slow
@pytest.mark.parametrize("x64", [True, False])
@pytest.mark.parametrize("mesh", [[4, 1], [4, 2]])
def test_four_processes(mesh, x64, tmp_path):
    options = {"cases": ["full", "minibatch", "source"], "x64": x64, "steps": 15, "data": str(tmp_path / "x.npy")}
    alone = fit(**options)
    np.testing.assert_allclose(fit_in_processes(4, meshes=[mesh], **options), alone, rtol=SAME[x64])


def ended(process):
    """How the fit in a process ended."""
    while not (line := process.stderr.readline()).startswith('{"resumed_at"'):
        assert line or process.poll() is None
    return json.loads(line)


def two_processes_with_checkpoints(folder, **options):
    """Two processes in the middle of a fit."""
    port = free_port()
    options |= {"cases": ["minibatch"], "run": str(folder), "meshes": [[2, 1]]}
    processes = [start(processes=2, process=i, port=port, **options) for i in range(2)]
    deadline = time.monotonic() + 120
    while len(list((folder / "checkpoints").glob("step-*"))) < 2:
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes)
        time.sleep(0.05)
    return processes


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_process_is_killed_the_others_stop_and_the_fit_resumes_on_other_devices(victim, tmp_path):
    steps, folder = 1000, tmp_path / "run"
    processes = two_processes_with_checkpoints(folder, steps=steps)
    processes[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    processes[victim].communicate()
    _, message = processes[1 - victim].communicate(timeout=60)
    print(f"the other process ended {time.monotonic() - killed:.1f} s after the kill")
    assert time.monotonic() - killed < 60 and processes[1 - victim].returncode != 0 and message
    assert list((folder / "checkpoints").glob("step-*"))

    options = {"cases": ["minibatch"], "steps": steps}
    alone = fit(meshes=[None], **options)
    for devices, mesh in [(1, [1, 1]), (8, [8, 2])]:
        copy = shutil.copytree(folder, tmp_path / f"{devices}")
        resumed = start(run=str(copy), every_steps=steps, devices=devices, meshes=[mesh], **options)
        assert ended(resumed)["resumed_at"] >= 10
        # A thousand steps amplify the rounding of sums in another order.
        np.testing.assert_allclose(np.array(result(resumed)), alone, rtol=1e-4)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_of_them_after_the_same_step(tmp_path):
    processes = two_processes_with_checkpoints(tmp_path, steps=100_000)
    processes[1].terminate()
    first, second = map(ended, processes)
    assert first == second and first["result"] == "INTERRUPTED"
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert (tmp_path / "checkpoints" / f"step-{first['steps']:08d}").is_dir()


def test_meshes_that_do_not_fit():
    with pytest.raises(ValueError, match="1 devices cannot be divided into 2 groups"):
        device_mesh(restarts=2, devices=jax.devices()[:1])
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    with pytest.raises(ValueError, match=r"axes 'examples' and 'restarts', got \('data',\): make it"):
        Devices(mesh)
    grid = np.array(jax.devices()[:1] * 2, object).reshape(2, 1)
    with pytest.raises(ValueError, match="3 restarts cannot be spread evenly over 2 groups"):
        Devices(jax.sharding.Mesh(grid, ("restarts", "examples"))).check(3)
