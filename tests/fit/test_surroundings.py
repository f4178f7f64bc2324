"""Fits in programs that do other things as well: threads, JAX's debugging settings, copies, a fork."""

import copy
import os
import pickle
import threading

import jax
import numpy as np
import pytest

import rotsparse as rs

METHOD = rs.Anneal(steps=20)


@pytest.fixture
def problem(rng):
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return rs.MLP(draw(6, 4), draw(6), draw(3, 6), activation="relu"), draw(40, 4)


def fit(layer, x, **options):
    return rs.find_rotations(layer, x, key=jax.random.key(0), method=METHOD, **options)


def same(a, b):
    return all(np.array_equal(a.bases[name], b.bases[name]) for name in a.bases)


def test_two_fits_in_two_threads(problem, tmp_path):
    """Each gives the bits that it gives alone, with checkpoints too."""
    alone, found = fit(*problem), {}

    def work(name):
        try:
            found[name] = fit(*problem, run=rs.Run(tmp_path / name) if name != "plain" else None)
        except BaseException as error:
            found[name] = error

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b", "plain")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, solution in found.items():
        assert isinstance(solution, rs.Solution), (name, solution)
        assert same(alone, solution)


def test_two_fits_in_one_folder_at_once_are_refused_by_name(problem, tmp_path):
    from rotsparse._core.lock import FolderLock

    lock = FolderLock(tmp_path / "run" / "checkpoints")
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on"):
        fit(*problem, run=rs.Run(tmp_path / "run"))
    lock.release()
    fit(*problem, run=rs.Run(tmp_path / "run"))


@pytest.mark.parametrize("setting", ["jax_debug_nans", "jax_disable_jit"])
def test_debugging_settings(problem, setting):
    before = getattr(jax.config, setting)
    jax.config.update(setting, True)
    try:
        solution = rs.find_rotations(*problem, key=jax.random.key(0), method=rs.Anneal(steps=3))
    finally:
        jax.config.update(setting, before)
    assert solution.result.ok or solution.result is rs.Result.NO_IMPROVEMENT
    assert solution.value <= solution.start_value


def test_double_precision_switched_between_calls(problem):
    layer, x = problem
    single = fit(layer, x)
    with jax.enable_x64(True):
        double = fit(layer, x.astype(np.float64))
    assert same(single, fit(layer, x))
    assert abs(single.start_value - double.start_value) < 1e-4 * abs(single.start_value)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_copies(problem, copied):
    solution = fit(*problem)
    again = copied(solution)
    assert same(solution, again) and again.result is solution.result and again.summary() == solution.summary()
    rotations = copied(solution.rotations)
    assert np.array_equal(rotations.r_in, solution.rotations.r_in)
    layer = copied(problem[0])
    np.testing.assert_array_equal(layer(problem[1]), problem[0](problem[1]))
    assert copied(METHOD) == METHOD and copied(rs.Log(0.1)) == rs.Log(0.1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning", "ignore:.*fork:DeprecationWarning")
def test_a_fork_after_the_import(tmp_path):
    """Of a process that has imported rotsparse and not computed yet: the child fits as its parent would."""
    import subprocess
    import sys

    script = """
import os, sys, warnings
import numpy as np, jax, rotsparse as rs
warnings.simplefilter("ignore")
if pid := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
layer = rs.Dense(np.eye(3, dtype=np.float32), None, activation="relu")
x = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
rs.find_rotations(layer, x, key=jax.random.key(0), method=rs.Anneal(steps=3), run=rs.Run(sys.argv[1]))
os._exit(0)
"""
    ended = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "run"], timeout=200, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert list((tmp_path / "run").rglob("manifest.json"))
