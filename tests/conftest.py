"""Fixtures shared by all tests, and how hypothesis runs here."""

import gc
import itertools
import os
import signal
import sys
from pathlib import Path

from helpers import ROOT

# Most of the time of a test is spent in compiling. What was compiled once is kept, for the other tests, the processes
# beside this one and those that tests start, and the next run. Before JAX is imported, which reads these once.
os.environ |= {
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
}

import jax
import jaxtyping
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# Annotations are checked at every call of a function of these packages, arrays with their shapes. Before the first
# import of rotsparse, because what is imported already stays unchecked. Left out are the command line and the runs,
# which handle few arrays, and the models, where numbers read from files are NumPy's and annotated as Python's.
CHECKED = ["_core", "data", "layers", "objectives", "engine", "solvers", "fit", "evaluation", "report", "examples"]
jaxtyping.install_import_hook([f"rotsparse.{package}" for package in CHECKED], "typechecking.checked")

from rotsparse.cli import commands  # noqa: E402
from rotsparse_command import command_line  # noqa: E402

pytest_plugins = ["signals"]

# Derandomised: the same commit gives the same verdict. No deadline: the first example of a test compiles.
settings.register_profile(
    "rotsparse",
    deadline=None,
    derandomize=True,
    max_examples=50,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("rotsparse")

# Files, and tests of other files, that `make quick` leaves out: they fit, most of them several times.
MEDIUM = [
    "_core/test_interrupt.py",
    "cli",
    "data/test_devices.py",
    "data/test_sources.py::test_a_fit_from_a_source_sees_the_examples_that_a_fit_from_the_array_sees",
    "data/test_sources.py::test_an_interrupted_fit_from_a_source_goes_on_with_the_same_bits",
    "_core/test_reading.py::test_a_bomb_is_not_unpacked",
    "evaluation/test_agreement.py",
    "evaluation/test_benchmark.py",
    "evaluation/test_control.py",
    "evaluation/test_modular_addition.py",
    "evaluation/test_nulls.py",
    "examples",
    "fit",
    "models/test_model_capture.py",
    "report",
    "solvers",
    "test_docs.py",
    "test_experiments.py",
    "test_signals.py",
]


@pytest.hookimpl(tryfirst=True)  # before pytest looks at the marks
def pytest_collection_modifyitems(items):
    for item in items:
        test = item.nodeid.partition("[")[0].removeprefix("tests/")
        if any(test == of or test.startswith((f"{of}/", f"{of}::")) for of in MEDIUM):
            item.add_marker(pytest.mark.medium)


# Compiled programs are memory maps. Linux lets a process have 65,530 of them, and XLA crashes at the next one.
MAPS, MOST_MAPS, LOOK_EVERY = Path("/proc/self/maps"), 25_000, 25
tests_ended = itertools.count(1)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown():
    if next(tests_ended) % LOOK_EVERY == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


# Shells start background jobs with Ctrl-C ignored, which processes that tests start would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def x64():
    """Double precision, for oracles: finite differences, autodiff Jacobians, exact identities."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def strict():
    """Arrays of different types may not meet: an accidental float64 (or float32) is an error.

    Rank promotion stays allowed: a bias on a batch of examples is how these formulas are written.
    """
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def untyped():
    """Annotations are not checked: for arguments that are wrong on purpose, which a check of our own has to refuse."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def rng():
    """A NumPy generator with a fixed seed: test data that needs no key."""
    return np.random.default_rng(0)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def rotsparse(folder, monkeypatch, capsys):
    """A function that runs a command, in this process and in `folder`: its exit code, and its output and errors on one
    line."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rotsparse", *map(str, arguments)])
        monkeypatch.setattr(commands, "console", commands.Console(width=200))
        with pytest.raises(SystemExit) as exit:
            command_line()
        printed = capsys.readouterr()
        return exit.value.code, " ".join((printed.out + printed.err).split())

    return run
