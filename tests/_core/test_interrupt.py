"""Signals: noted inside a fit, as usual outside of it."""

import itertools
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rotsparse as rs
from rotsparse._core.interrupt import Interrupted, StopSignals, handled, terminated
from rotsparse.engine._progress import Progress
from rotsparse.engine.solution import Result
from rotsparse.evaluation.benchmark import benchmark
from rotsparse.fit.minimize import minimize
from rotsparse.objectives import ActivationSparsity
from rotsparse.objectives.measures import Log
from rotsparse.solvers import Anneal, FixedPointNewton, PairSearch, Refine, Then
from signals import send


def objective():
    x = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    return ActivationSparsity(x, Log(0.3))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted(number):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with StopSignals() as stop:
        assert not stop.requested
        send(number)
        assert stop.requested
        send(signal.SIGTERM)  # a scheduler may repeat itself
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


ANNEAL = Anneal(steps=100, batch_size=8)


def sending(monkeypatch, number, updates=1):
    """Every fit gets the signal from its progress bar, from that update on."""
    left = itertools.count(updates, -1)
    monkeypatch.setattr(Progress, "update", lambda *arguments, **shown: send(number) if next(left) <= 1 else None)


def test_sigterm_ends_a_fit_that_cannot_save(monkeypatch):
    """A script that is told to end must not take an unfinished fit for a finished one and go on."""
    sending(monkeypatch, signal.SIGTERM)
    with handled(signal.SIGTERM, terminated), pytest.raises(Interrupted):
        minimize(objective(), {"in": jnp.eye(4)}, key=jax.random.key(0), method=ANNEAL)


def layer_and_inputs():
    rng = np.random.default_rng(0)
    w_in, w_out = (rng.standard_normal((6, 6)).astype(np.float32) for _ in range(2))
    return rs.MLP(w_in, None, w_out), rng.standard_normal((60, 6)).astype(np.float32)


def signalled(monkeypatch, method, name, number):
    """From now on, the first call of this function of a method gets the signal before it begins."""
    original, sent = getattr(method, name), []

    def function(*arguments, **options):
        if not sent:
            sent.append(send(number))
        return original(*arguments, **options)

    monkeypatch.setattr(method, name, function)


@pytest.mark.parametrize("where", [(Refine, "run"), (PairSearch, "search"), (PairSearch, "_sweep")])
def test_ctrl_c_in_the_pair_searches_ends_the_fit(where: tuple[type, str], monkeypatch):
    """The annealed rotations are returned, and nobody takes the fit for finished."""
    layer, x = layer_and_inputs()
    method, function = where
    signalled(monkeypatch, method, function, signal.SIGINT)
    solution = rs.find_rotations(layer, x, key=jax.random.key(0), method=rs.default_method(steps=60))
    assert solution.result is Result.INTERRUPTED and solution.certificate is None
    assert solution.value < solution.start_value
    with pytest.raises(KeyboardInterrupt):
        solution.completed()


def test_ctrl_c_between_stages_ends_the_fit(monkeypatch):
    signalled(monkeypatch, Anneal, "after", signal.SIGINT)
    method = Then(ANNEAL, ANNEAL, ANNEAL)
    solution = minimize(objective(), {"in": jnp.eye(4)}, key=jax.random.key(0), method=method)
    assert solution.result is Result.INTERRUPTED and len(solution.stages) < 3


@pytest.mark.parametrize("saves", [False, True])
def test_sigterm_in_the_pair_searches(saves, tmp_path, monkeypatch):
    """It ends the fit if that can be resumed, and otherwise is left to whoever else listens."""
    layer, x = layer_and_inputs()
    fit = lambda: rs.find_rotations(  # noqa: E731
        layer, x, key=jax.random.key(0), method=rs.default_method(steps=60), run=tmp_path if saves else None
    )
    with handled(signal.SIGTERM, terminated), monkeypatch.context() as patch:
        signalled(patch, PairSearch, "search", signal.SIGTERM)
        if saves:
            assert fit().result is Result.INTERRUPTED
        else:
            with pytest.raises(Interrupted):
                fit()
    if saves:
        assert fit().result is Result.ALL_STEPS


@pytest.mark.parametrize("at_update", [1, 4])  # in the fit of the layer, and in that of a control
def test_an_interrupted_benchmark_has_no_result(at_update, monkeypatch):
    layer, x = layer_and_inputs()
    sending(monkeypatch, signal.SIGINT, at_update)
    with pytest.raises(KeyboardInterrupt):
        benchmark(layer, x[:40], x[40:], key=jax.random.key(0), method=rs.Anneal(steps=60))


def test_ctrl_c_after_annealing_keeps_the_basis(monkeypatch):
    x = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    signalled(monkeypatch, FixedPointNewton, "run", signal.SIGINT)
    method = rs.default_basis_method(Log(0.3), steps=40, batch_size=8)
    solution = rs.find_basis(x, key=jax.random.key(0), measure=Log(0.3), method=method)
    assert solution.result is Result.INTERRUPTED and solution.value <= solution.start_value


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
    fit = lambda: minimize(objective(), {"in": jnp.eye(4)}, key=jax.random.key(0), method=ANNEAL, run=tmp_path)  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr(Progress, "update", lambda *arguments, **shown: send(number))
        solution = fit()
    assert solution.result is Result.INTERRUPTED
    assert 0 < solution.stats["steps"] < 100
    assert solution.value <= solution.start_value
    assert (tmp_path / "checkpoints" / f"step-{solution.stats['steps']:08d}").is_dir()
    assert fit().stats["resumed_at"] == solution.stats["steps"]
