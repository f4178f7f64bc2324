"""`minimize`: the driver beneath `find_rotations`, for any objective.

The driver takes steps, all restarts at once (vmapped), in slices of a second or two, each a jitted loop. Between them,
in plain Python, it saves checkpoints, writes the log, shows the progress and listens to signals. Every few slices, at
the end of a *chunk*, it looks at the objective, keeps the best rotations of every restart, and decides whether to stop.

Everything that the course of a fit depends on is in `FitState`; which examples step t draws follows from
`fold_in(key, t)`. Chunks end at steps that are known beforehand, and where slices end makes no difference to any bit of
the state. So a fit that is stopped after any slice, saved, loaded and continued is the same fit.
"""

import contextlib
import dataclasses
import math
import os
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from rotsparse._core.interrupt import Interrupted, StopSignals
from rotsparse._core.orthogonal import haar
from rotsparse.data.devices import Devices, is_first_process
from rotsparse.data.sources import read_ahead
from rotsparse.fit._checkpoint import Checkpoints, Session
from rotsparse.fit._fingerprint import fingerprint
from rotsparse.fit._log import LogWriter, RunLog
from rotsparse.fit._progress import Progress
from rotsparse.fit._state import FitState
from rotsparse.fit.solution import Result, Solution, evidence
from rotsparse.objectives import Bases, Objective
from rotsparse.solvers import Annealing, Solver

# What a fit takes unless told otherwise.
STEPS = 4000

# A run is cut into about this many chunks, of at least MIN_CHUNK steps.
CHUNKS = 40
MIN_CHUNK = 20

# Judging on all examples may cost this share of what the steps cost.
CHECKING = 0.25

# Examples that are not in memory are fetched in blocks of at most so many bytes.
FETCHED_BYTES = 128 * 2**20

# How long a slice takes: how long a signal may have to wait.
SLICE_SECONDS = 1.5


def minimize(
    objective: Objective,
    start: Bases,
    *,
    key: PRNGKeyArray,
    solver: Solver | None = None,
    steps: int = STEPS,
    restarts: int = 1,
    validation: Objective | None = None,
    patience: int | None = None,
    progress: bool = False,
    checkpoint: Checkpoints | str | os.PathLike | None = None,
    log: RunLog | str | os.PathLike | None = None,
    mesh: Mesh | None = None,
) -> Solution:
    """Minimise any objective over the rotations of its spaces. See `find_rotations` for the arguments; `start` holds
    one orthogonal matrix for every space, and `validation` is the same objective on other examples."""
    for name, value in {"steps": steps, "restarts": restarts, "patience": patience}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} should be at least 1, got {value}")
    solver = Annealing() if solver is None else solver
    if patience is not None and isinstance(solver, Annealing):
        raise ValueError(
            "annealing improves most near its end, so patience would stop it early: take fewer steps instead"
        )
    spaces = objective.spaces
    if not spaces:
        raise ValueError("nothing to optimise: every space is held fixed")
    devices = Devices(mesh)
    devices.check(restarts)
    start = {name: start[name] for name in spaces}
    starts = _starts(start, restarts, jax.random.fold_in(key, 0))
    keys = jax.random.split(jax.random.fold_in(key, 1), restarts)
    stepped = devices.spread(objective)
    judge = stepped if validation is None else devices.spread(validation)
    chunk = min(steps, max(MIN_CHUNK, -(-steps // CHUNKS)))
    if stepped.fetched_bytes:  # of which two chunks are in memory, and one on the devices
        chunk = max(1, min(chunk, FETCHED_BYTES // (restarts * stepped.fetched_bytes)))
    check_every = _check_every(chunk, objective, objective if validation is None else validation, patience)
    state = FitState.first(solver, starts, steps, 3 + steps // check_every, devices)

    with contextlib.ExitStack() as stack:
        session = None
        if checkpoint is not None:
            config = fingerprint(
                objective=objective, validation=validation, solver=solver, steps=steps, restarts=restarts,
                patience=patience, key=key, start=start,
            )  # fmt: skip
            session = Session(Checkpoints.of(checkpoint), config, state, FitState.unsound)
            stack.enter_context(contextlib.closing(session))
        restored = None if session is None else session.restore()
        state = state if restored is None else restored
        begun = time.perf_counter()
        fit = stack.enter_context(contextlib.closing(_Fit(solver, stepped, judge, keys, state, chunk, steps, devices)))
        compile_seconds = time.perf_counter() - begun
        writer = None
        if log is not None and is_first_process():
            writer = stack.enter_context(contextlib.closing(RunLog.of(log).open(int(state.step))))
        bar = stack.enter_context(Progress(steps, enabled=progress and is_first_process()))
        stop = stack.enter_context(StopSignals(terminate=session is not None))
        state, result, detail = _run(fit, state, check_every, patience, begun, session, writer, bar, stop)
    # The last look is not saved: a run that goes on has to be like one that never stopped.
    if result is not Result.NON_FINITE and state.checked_at[state.checks - 1] != state.step:
        state = fit.judge(state)
    stats = {"compile_seconds": compile_seconds}
    if restored is not None:
        stats["resumed_at"] = int(restored.step)
    remarks = [detail] if detail else []
    remarks += [] if session is None else session.warnings
    state = dataclasses.replace(state, best=devices.gather(state.best))
    return _solution(state, starts, objective, validation, result, "; ".join(remarks), stats)


def _check_every(chunk: int, objective: Objective, judged: Objective, patience: int | None) -> int:
    """Steps from one check to the next, in whole chunks: few enough that one falls into each window of `patience`, and
    as many as keep the cost of checks down (a value costs half of a value with its gradient)."""
    cost = 0.5 * judged.work / (objective.work * objective.batch_share)  # of a check, in steps
    every = chunk * math.ceil(cost / (CHECKING * chunk))
    return every if patience is None else min(every, chunk * max(1, patience // chunk))


class _Fit:
    """The compiled parts of a fit: `advance` takes steps, `judge` looks at the objective on all examples. Examples that
    are not in memory are fetched a chunk at a time, those of the next chunk while the steps of this one are taken."""

    def __init__(self, solver, objective, judge, keys, state: FitState, chunk: int, steps: int, devices: Devices):
        self.chunk, self.steps = chunk, steps
        self._objective, self._keys, self._devices = objective, keys, devices
        first = min(int(state.step), steps - 1) // chunk
        self._ahead = read_ahead(map(self._reading, range(first, -(-steps // chunk))))
        self._fetched_chunk, self._fetched = first, devices.batches(next(self._ahead))

        shared, judged_on = devices.replicate((solver, objective)), devices.replicate(judge)
        self._shared, self._layout = shared, devices.layout((*shared, *self._bounds(0, 0)))
        self._placed_keys = devices.over_restarts(keys)
        self._judged_on, self._judged_layout = judged_on, devices.layout(judged_on)
        self._slice = _run_slice.lower(*self._slice_arguments(state, 0, 0)).compile()
        self._values = _values.lower(devices, self._judged_layout, judged_on, state.bases).compile()

    def advance(self, state: FitState, count: int) -> tuple[FitState, Float[np.ndarray, "restarts count"]]:
        """The state `count` steps later, and the objective before each of these steps. At most up to the end of the
        chunk."""
        done, end = int(state.step), int(state.step) + count
        assert done // self.chunk == (end - 1) // self.chunk
        if done // self.chunk != self._fetched_chunk:
            self._fetched_chunk += 1
            assert done // self.chunk == self._fetched_chunk
            self._fetched = self._devices.batches(next(self._ahead))
        bases, solver_state, values = self._slice(*self._slice_arguments(state, done, end))
        values = np.asarray(self.gather(values))[:, :count]
        # In place: what lies behind `step` is not part of the state yet.
        state.objective[:, done:end] = values
        return dataclasses.replace(state, bases=bases, solver=solver_state, step=np.asarray(end)), values

    def judge(self, state: FitState) -> FitState:
        """The state with the objective checked."""
        values = self._values(self._devices, self._judged_layout, self._judged_on, state.bases)
        return state.judged(np.asarray(self.gather(values)))

    def gather(self, values):
        """Arrays that every process can read."""
        return self._devices.gather(values)

    def close(self) -> None:
        """End the reading ahead."""
        self._ahead.close()

    def _slice_arguments(self, state: FitState, begin: int, end: int) -> tuple:
        restarts = state.bases, state.solver, self._placed_keys
        shared = *self._shared, *self._bounds(begin, end)
        return self._devices, self._layout, shared, restarts, self._fetched, self.chunk, self.steps

    def _bounds(self, begin: int, end: int) -> tuple[Array, Array]:
        return self._devices.replicate((jnp.asarray(begin), jnp.asarray(end)))  # arrays, so that they are traced

    def _reading(self, index: int):
        """The function that reads the examples of a chunk's steps."""
        if not self._objective.fetched_bytes:
            return lambda: None
        steps = index * self.chunk + np.arange(self.chunk)
        return self._objective.fetching(_step_keys(self._keys, steps), self._devices)


def _run(
    fit: _Fit,
    state: FitState,
    check_every: int,
    patience: int | None,
    begun: float,
    session: Session | None,
    writer: LogWriter | None,
    bar: Progress,
    stop: StopSignals,
) -> tuple[FitState, Result, str]:
    """Take steps until the end, or a reason to stop: the state, the result, and the detail."""
    begun -= float(state.seconds)
    per_step = math.inf  # seconds
    try:
        if not state.checks:
            state = fit.judge(state)
        while True:
            done = int(state.step)
            finished = done == fit.steps
            # As many steps as fit in a slice, but not beyond the end of a chunk or the next save.
            count = min(fit.chunk - done % fit.chunk, fit.steps - done, max(1, int(SLICE_SECONDS / per_step)))
            if session is not None and (left := session.steps_left(done)):
                count = min(count, left)
            due = session is not None and session.due(done)
            count, due, stopped = _agreed(count, due, stop.requested)
            checked = state.checked_at[state.checks - 1] == done
            converged = patience is not None and checked and done - state.best_step.max() >= patience
            if session is not None and (due or stopped or finished or converged):
                session.save(done, state, state.lowest)
            if stopped:
                return state, Result.INTERRUPTED, ""
            if finished or converged:
                return state, Result.ALL_STEPS if finished else Result.CONVERGED, ""

            slice_begun = time.perf_counter()
            moved, values = fit.advance(state, count)
            error = moved.orthogonality_error
            if not (np.isfinite(values).all() and np.isfinite(error)):
                return _before_failure(fit, state, moved, values)
            done = int(moved.step)
            state = dataclasses.replace(moved, seconds=np.asarray(time.perf_counter() - begun))
            per_step = (time.perf_counter() - slice_begun) / count
            check = done % check_every == 0 or done == fit.steps
            if check:
                state = fit.judge(state)
            if writer is not None:
                last = state.last_check if check else None
                writer.write(
                    done,
                    objective=values.mean(axis=1),
                    checked=last,
                    orthogonality_error=error,
                    seconds=float(state.seconds),
                )
            bar.update(done, objective=values.mean(axis=1).min(), error=error)
            if check and not np.isfinite(state.last_check).all():
                return state, Result.NON_FINITE, f"the objective on all examples, after step {done}"
    except ValueError:  # examples that cannot be read: what was done until then is kept
        if session is not None and jax.process_count() == 1:
            session.save(int(state.step), state, state.lowest)
        raise
    except Interrupted:  # SIGTERM, where `stop` does not listen to it: there is nowhere to save, and no time to go on
        raise
    except KeyboardInterrupt:  # where `stop` could not catch it, or a second one
        if session is not None:
            session.save(int(state.step), state, state.lowest)
        return state, Result.INTERRUPTED, ""


def _before_failure(
    fit: _Fit, state: FitState, moved: FitState, values: Float[np.ndarray, "restarts count"]
) -> tuple[FitState, Result, str]:
    """What `_run` returns where the steps of a slice, from `state` to `moved`, led to NaN: the last sound rotations,
    looked at. They are those before the objective was not finite, or one step earlier: wherever the slice began."""
    begun, finite = int(state.step), np.isfinite(values)
    if finite.all():  # the rotations after the last step are not
        failed = int(moved.step)
        every = [np.asarray(r).reshape(len(values), -1) for r in fit.gather(moved.bases).values()]
        sound = np.isfinite(np.concatenate(every, axis=1)).all(axis=1)
    else:
        failed = begun + int(np.argmin(finite.all(axis=0)))
        sound = finite[:, failed - begun]
    detail = f"the objective at step {failed}, restart {int(np.argmin(sound))}"
    for step in (failed, failed - 1):
        last = fit.advance(state, step - begun)[0] if step > begun else state
        if np.isfinite(last.orthogonality_error):
            break
    if last.checked_at[last.checks - 1] != last.step:
        last = fit.judge(last)
    return dataclasses.replace(last, step=np.asarray(min(failed + 1, fit.steps))), Result.NON_FINITE, detail


def _solution(
    state: FitState,
    starts: Bases,
    objective: Objective,
    validation: Objective | None,
    result: Result,
    detail: str,
    stats: dict[str, Any],
) -> Solution:
    """What the state of a fit that has ended amounts to."""
    # A start that is itself not finite cannot be chosen; if no restart is, there is nothing to return.
    best_values = state.best_values
    chosen = int(np.nanargmin(best_values)) if np.isfinite(best_values).any() else 0
    if result in (Result.ALL_STEPS, Result.CONVERGED) and state.best_step[chosen] == 0:
        result = Result.NO_IMPROVEMENT
    candidates = tuple(jax.tree.map(lambda r, i=i: r[i], state.best) for i in range(len(best_values)))
    bases = candidates[chosen]
    value, evident = evidence(objective, bases)
    start_values = (
        state.checked[:, 0] if validation is None else np.asarray(_values(Devices(None), None, objective, starts))
    )
    return Solution(
        bases=bases,
        result=result,
        detail=detail,
        value=value,
        start_value=float(start_values[chosen]),
        validation_value=None if validation is None else float(best_values[chosen]),
        history=state.history,
        candidates=candidates,
        candidate_values=best_values,
        stats={
            "steps": int(state.step),
            "best_step": int(state.best_step[chosen]),
            "restart": chosen,
            "seconds": float(state.seconds),
            **stats,
            **evident,
        },
    )


@eqx.filter_jit
def _run_slice(devices: Devices, layout, shared, restarts, fetched, chunk: int, steps: int):
    """Steps `begin` to `end` of every restart, all of them in one chunk. The bounds are traced, so one compilation
    serves the whole run. `fetched` are the examples of the whole chunk, if they are not in memory."""

    def run_all(shared, restarts, fetched):
        solver, objective, begin, end = shared

        def run(bases, state, key, fetched):
            def body(i, carry):
                bases, state, history = carry
                key_i = jax.random.fold_in(key, i)
                if fetched is None:
                    batch = objective.sample(key_i)
                else:
                    batch = objective.sample(key_i, jax.tree.map(lambda x: x[i % chunk], fetched))
                bases, state, value = solver.step(batch, bases, state, i, steps)
                return bases, state, history.at[i - begin].set(value)

            history = jnp.zeros(chunk, jax.tree.leaves(bases)[0].dtype)
            return jax.lax.fori_loop(begin, end, body, (bases, state, history))

        bases, state, keys = restarts
        return jax.vmap(run)(bases, state, keys, fetched)

    return devices.map(run_all, layout, shared, restarts, fetched)


@jax.jit
def _step_keys(keys: PRNGKeyArray, steps: Int[Array, "steps"]) -> PRNGKeyArray:
    """The key of every step of every restart."""
    return jax.vmap(lambda key: jax.vmap(lambda i: jax.random.fold_in(key, i))(steps))(keys)


@eqx.filter_jit
def _values(devices: Devices, layout, objective, bases):
    """The objective of every restart, one after the other."""

    def values(objective, bases, _):
        return jax.lax.map(objective.value, bases)

    return devices.map(values, layout, objective, bases)


def _starts(start: Bases, restarts: int, key: PRNGKeyArray) -> Bases:
    """`start`, then Haar-random rotations, stacked along a new first axis."""
    stacked = {}
    for i, (name, r) in enumerate(start.items()):
        keys = jax.random.split(jax.random.fold_in(key, i), restarts)
        stacked[name] = jnp.stack([r, *(haar(k, r.shape[0], r.dtype) for k in keys[1:])])
    return stacked


def _agreed(count: int, save: bool, stop: bool) -> tuple[int, bool, bool]:
    """The same decisions in every process: clocks and signals differ, and the steps of all have to match."""
    if jax.process_count() == 1:
        return count, save, stop
    everyones = np.asarray(multihost_utils.process_allgather(np.asarray([count, save, stop])))
    return int(everyones[0, 0]), bool(everyones[0, 1]), bool(everyones[:, 2].any())
