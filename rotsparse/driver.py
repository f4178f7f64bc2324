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
import optax
from jax.experimental import multihost_utils
from jaxtyping import Float, Int, PRNGKeyArray

from rotsparse.checkpoint import Checkpoints, Session
from rotsparse.fingerprint import fingerprint
from rotsparse.interrupt import StopSignals
from rotsparse.objectives import Bases, Objective
from rotsparse.orthogonal import haar, orthogonality_error
from rotsparse.progress import Progress
from rotsparse.run_log import LogWriter, RunLog
from rotsparse.solution import History, Result, Solution
from rotsparse.solvers import Annealing, Solver

# What a fit takes unless told otherwise.
STEPS = 4000

# A run is cut into about this many chunks, of at least MIN_CHUNK steps.
CHUNKS = 40
MIN_CHUNK = 20

# Judging on all examples may cost this share of what the steps cost.
CHECKING = 0.25

# How long a slice takes: how long a signal may have to wait.
SLICE_SECONDS = 1.5

# Rotations that are further from orthogonal than this are neither saved nor loaded: something is wrong with them.
NOT_ORTHOGONAL = 1e-3


class FitState(eqx.Module):
    """Where a fit is: with its settings and data, all that determines how it goes on. Arrays with a first axis
    `restarts`, on the device what the steps change, on the host (NumPy) the record.

    `objective[:, :step]` and `checked[:, :checks]` are the history so far (see `History`); `best` holds the rotations
    with the lowest checked value of every restart. `seconds` is how long the fit has been running, earlier sessions
    included.
    """

    bases: Bases
    solver: Any
    best: Bases
    step: Int[np.ndarray, ""]
    best_values: Float[np.ndarray, "restarts"]
    best_step: Int[np.ndarray, "restarts"]
    objective: Float[np.ndarray, "restarts steps"]
    checks: Int[np.ndarray, ""]
    checked_at: Int[np.ndarray, "checks"]
    checked: Float[np.ndarray, "restarts checks"]
    seconds: Float[np.ndarray, ""]

    @property
    def history(self) -> History:
        step, checks = int(self.step), int(self.checks)
        return History(
            self.objective[:, :step].copy(), self.checked_at[:checks].copy(), self.checked[:, :checks].copy()
        )

    def judged(self, values: Float[np.ndarray, "restarts"]) -> "FitState":
        """With the objective at the current rotations, which are kept where they are the best of their restart."""
        step, checks = int(self.step), int(self.checks)
        checked_at, checked = self.checked_at.copy(), self.checked.copy()
        checked_at[checks], checked[:, checks] = step, values
        better = values < self.best_values  # False for NaN
        choose = lambda new, old: jnp.where(better[:, None, None], new, old)  # noqa: E731
        return dataclasses.replace(
            self,
            best=jax.tree.map(choose, self.bases, self.best),
            best_values=np.where(better, values, self.best_values),
            best_step=np.where(better, step, self.best_step),
            checks=np.asarray(checks + 1),
            checked_at=checked_at,
            checked=checked,
        )


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
    start = {name: start[name] for name in spaces}
    starts = _starts(start, restarts, jax.random.fold_in(key, 0))
    keys = jax.random.split(jax.random.fold_in(key, 1), restarts)
    judge = objective if validation is None else validation
    chunk = min(steps, max(MIN_CHUNK, -(-steps // CHUNKS)))
    # Steps from one check to the next. A value costs half of a value with its gradient.
    check_every = chunk * math.ceil(0.5 / (CHECKING * chunk * objective.batch_share))
    state = _first_state(solver, starts, steps, check_every)

    with contextlib.ExitStack() as stack:
        session = None
        if checkpoint is not None:
            config = fingerprint(
                objective=objective, validation=validation, solver=solver, steps=steps, restarts=restarts,
                patience=patience, key=key, start=start,
            )  # fmt: skip
            session = Session(Checkpoints.of(checkpoint), config, state, _unsound)
            stack.enter_context(contextlib.closing(session))
        restored = None if session is None else session.restore()
        state = state if restored is None else restored
        begun = time.perf_counter()
        fit = _Fit(solver, objective, judge, keys, state, chunk, steps)
        compile_seconds = time.perf_counter() - begun
        writer = None
        if log is not None:
            writer = stack.enter_context(contextlib.closing(RunLog.of(log).open(int(state.step))))
        bar = stack.enter_context(Progress(steps, enabled=progress))
        stop = stack.enter_context(StopSignals())
        state, result, detail = _run(fit, state, check_every, patience, begun, session, writer, bar, stop)
    # The last look is not saved: a run that goes on has to be like one that never stopped.
    if result is not Result.NON_FINITE and state.checked_at[state.checks - 1] != state.step:
        state = fit.judge(state)
    stats = {"compile_seconds": compile_seconds}
    if restored is not None:
        stats["resumed_at"] = int(restored.step)
    remarks = [detail] if detail else []
    remarks += [] if session is None else session.warnings
    return _solution(state, starts, objective, validation, result, "; ".join(remarks), stats)


class _Fit:
    """The compiled parts of a fit: `advance` takes steps, `judge` looks at the objective on all examples."""

    def __init__(self, solver, objective, judge, keys, state: FitState, chunk: int, steps: int):
        self.chunk, self.steps = chunk, steps
        self._fixed, self._keys, self._judged_on = (solver, objective), keys, judge
        zero = jnp.asarray(0)
        self._slice = _run_slice.lower(
            *self._fixed, state.bases, state.solver, keys, zero, zero, chunk, steps
        ).compile()
        self._values = _values.lower(judge, state.bases).compile()

    def advance(self, state: FitState, count: int) -> tuple[FitState, Float[np.ndarray, "restarts count"]]:
        """The state `count` steps later, and the objective before each of these steps. At most up to the end of the
        chunk."""
        done, end = int(state.step), int(state.step) + count
        assert done // self.chunk == (end - 1) // self.chunk
        bounds = jnp.asarray(done), jnp.asarray(end)  # arrays, so that they are traced
        bases, solver_state, values = self._slice(
            *self._fixed, state.bases, state.solver, self._keys, *bounds, self.chunk, self.steps
        )
        values = np.asarray(values)[:, :count]
        # In place: what lies behind `step` is not part of the state yet.
        state.objective[:, done:end] = values
        return dataclasses.replace(state, bases=bases, solver=solver_state, step=np.asarray(end)), values

    def judge(self, state: FitState) -> FitState:
        """The state with the objective checked."""
        return state.judged(np.asarray(self._values(self._judged_on, state.bases)))


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
            converged = patience is not None and done % fit.chunk == 0 and done - state.best_step.max() >= patience
            if session is not None and (due or stopped or finished or converged):
                session.save(done, state, _lowest(state))
            if stopped:
                return state, Result.INTERRUPTED, ""
            if finished or converged:
                return state, Result.ALL_STEPS if finished else Result.CONVERGED, ""

            slice_begun = time.perf_counter()
            moved, values = fit.advance(state, count)
            finite = np.isfinite(values)
            if not finite.all():
                failed = done + int(np.argmin(finite.all(axis=0)))
                restart = int(np.argmin(finite[:, failed - done]))
                detail = f"the objective at step {failed}, restart {restart}"
                return dataclasses.replace(state, step=np.asarray(failed + 1)), Result.NON_FINITE, detail
            done = int(moved.step)
            state = dataclasses.replace(moved, seconds=np.asarray(time.perf_counter() - begun))
            per_step = (time.perf_counter() - slice_begun) / count
            check = done % check_every == 0 or done == fit.steps
            if check:
                state = fit.judge(state)
            error = _worst_error(state.bases)
            if writer is not None:
                last = _last_check(state) if check else None
                writer.write(
                    done,
                    objective=values.mean(axis=1),
                    checked=last,
                    orthogonality_error=error,
                    seconds=float(state.seconds),
                )
            bar.update(done, objective=values.mean(axis=1).min(), error=error)
            if check and not np.isfinite(_last_check(state)).all():
                return state, Result.NON_FINITE, f"the objective on all examples, after step {done}"
    except KeyboardInterrupt:  # where `stop` could not catch it, or a second one
        if session is not None:
            session.save(int(state.step), state, _lowest(state))
        return state, Result.INTERRUPTED, ""


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
    value, grads = _value_and_grad(objective, bases)
    start_values = state.checked[:, 0] if validation is None else np.asarray(_values(objective, starts))
    return Solution(
        bases=bases,
        result=result,
        detail=detail,
        value=float(value),
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
            "gradient_norm": float(optax.tree.norm(grads)),
            "orthogonality_error": _worst_error(bases),
        },
    )


def _first_state(solver: Solver, starts: Bases, steps: int, check_every: int) -> FitState:
    """The state before the first step, with room for the whole history."""
    leaf = next(iter(starts.values()))
    restarts, checks = len(leaf), 3 + steps // check_every
    return FitState(
        bases=starts,
        solver=jax.vmap(solver.init)(starts),
        best=starts,
        step=np.asarray(0),
        best_values=np.full(restarts, np.inf, leaf.dtype),
        best_step=np.zeros(restarts, int),
        objective=np.zeros((restarts, steps), leaf.dtype),
        checks=np.asarray(0),
        checked_at=np.zeros(checks, int),
        checked=np.zeros((restarts, checks), leaf.dtype),
        seconds=np.asarray(0.0),
    )


@eqx.filter_jit
def _run_slice(solver, objective, bases, state, keys, begin, end, chunk: int, steps: int):
    """Steps `begin` to `end` of every restart, at most `chunk` of them. The bounds are traced, so one compilation
    serves the whole run."""

    def run(bases, state, key):
        def body(i, carry):
            bases, state, history = carry
            batch = objective.sample(jax.random.fold_in(key, i))
            bases, state, value = solver.step(batch, bases, state, i, steps)
            return bases, state, history.at[i - begin].set(value)

        history = jnp.zeros(chunk, jax.tree.leaves(bases)[0].dtype)
        return jax.lax.fori_loop(begin, end, body, (bases, state, history))

    return jax.vmap(run)(bases, state, keys)


@eqx.filter_jit
def _values(objective, bases):
    """The objective of every restart, one after the other."""
    return jax.lax.map(objective.value, bases)


@eqx.filter_jit
def _value_and_grad(objective, bases):
    return objective.value_and_grad(bases)


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


def _last_check(state: FitState) -> Float[np.ndarray, "restarts"]:
    return state.checked[:, int(state.checks) - 1]


def _lowest(state: FitState) -> float:
    """The lowest objective at the last check, over the restarts."""
    return float(np.nanmin(_last_check(state), initial=np.inf))


def _worst_error(bases: Bases) -> float:
    return max(float(jnp.max(orthogonality_error(r))) for r in bases.values())


def _unsound(state: FitState) -> str:
    """What is wrong with a state that cannot be a fit's, or an empty text."""
    error = max(_worst_error(state.bases), _worst_error(state.best))
    return "" if error < NOT_ORTHOGONAL else f"its rotations are not orthogonal: |RRᵀ - I| = {error:.1e}"
