"""Signals: noted inside a fit, as usual outside of it."""

import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rotsparse.driver import Progress, minimize
from rotsparse.interrupt import Interrupted, StopSignals, handled, terminated
from rotsparse.measures import Log
from rotsparse.objectives import ActivationSparsity
from rotsparse.solution import Result


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted(number):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with StopSignals() as stop:
        assert not stop.requested
        send(number)
        assert stop.requested
        send(signal.SIGTERM)  # a scheduler may repeat itself
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_sigterm_ends_a_fit_that_cannot_save():
    """A script that is told to end must not take an unfinished fit for a finished one and go on."""
    with handled(signal.SIGTERM, terminated), pytest.raises(Interrupted), StopSignals(terminate=False):
        send(signal.SIGTERM)


def test_a_second_ctrl_c_does_not_wait():
    with pytest.raises(KeyboardInterrupt), StopSignals():
        send(signal.SIGINT)
        send(signal.SIGINT)


def test_sigterm_as_an_exception():
    with pytest.raises(Interrupted, match="give the same command again"), handled(signal.SIGTERM, terminated):
        send(signal.SIGTERM)


def test_other_threads_are_left_alone():
    noted = []

    def run():
        with StopSignals() as stop:
            noted.append(stop.requested)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert noted == [False]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_fit_saves_and_returns_what_it_has(number, tmp_path, monkeypatch):
    x = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    objective = ActivationSparsity(x, Log(0.3), batch_size=8)
    fit = lambda: minimize(objective, {"in": jnp.eye(4)}, key=jax.random.key(0), steps=100, checkpoint=tmp_path)  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr(Progress, "update", lambda *arguments, **shown: send(number))
        solution = fit()
    assert solution.result is Result.INTERRUPTED
    assert 0 < solution.stats["steps"] < 100
    assert solution.value <= solution.start_value
    assert (tmp_path / f"step-{solution.stats['steps']:08d}").is_dir()
    assert fit().stats["resumed_at"] == solution.stats["steps"]
