"""`Stepwise`: methods that take steps, and their loop.

Steps of all starts are taken together (vmapped), in slices of a second or two, each of which is a jitted loop. Between
slices plain Python saves checkpoints, writes the log, shows the progress and looks for signals. Every few slices, at
the end of a *stretch*, the objective is checked on all examples, the best rotations of each start are kept, and the
loop decides whether to stop.

Everything that the course of a fit depends on is in `FitState`; `fold_in(key, t)` determines the examples of step t.
Stretches end at steps that are known in advance, and the ends of slices change no bit of the state. So a fit that is
stopped after any slice, saved, loaded and continued gives the same bits as a fit that is never stopped.
"""

import abc
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int, PRNGKeyArray

from rotsparse._core.interrupt import Interrupted
from rotsparse.data.devices import Devices
from rotsparse.engine._compiled import CompiledFit, values_of
from rotsparse.engine._state import FitState, Stacked
from rotsparse.engine.method import Method, Problem
from rotsparse.engine.record import Record
from rotsparse.engine.run import Run
from rotsparse.engine.solution import Result, Solution, Stage, evidence
from rotsparse.objectives.base import Bases, Objective, spread

# A schedule maps the share of steps that are done (0 to 1) to a factor or a value.
Schedule = Callable[[Array], Array]

# A run is cut into about this many stretches, of at least MIN_STRETCH steps.
STRETCHES = 40
MIN_STRETCH = 20

# Checks of the objective on all examples may cost this share of the cost of the steps.
CHECKING = 0.1

# Examples that are not in memory are fetched in blocks of at most this many bytes.
FETCHED_BYTES = 128 * 2**20

# Duration of a slice, and so the longest wait of a signal.
SLICE_SECONDS = 1.5


class Stepwise(Method):
    """A method that improves rotations step by step. `init` and `step` are pure, and are traced under jit and vmap.

    Methods override the properties with fields (`Anneal(steps=8000)`).
    """

    @property
    @abc.abstractmethod
    def steps(self) -> int:
        """Number of steps."""

    @property
    def batch_size(self) -> int | None:
        """Number of examples in a step; `None`: all."""
        return None

    @property
    def submatrix(self) -> tuple[int, int] | None:
        """Number of rows and columns of each Jacobian that a step sees, for layers so wide that a step on one example
        takes too long; `None`: all."""
        return None

    @property
    def patience(self) -> int | None:
        """Stop after this many steps without improvement; `None`: never."""
        return None

    @abc.abstractmethod
    def init(self, bases: Bases) -> Any:
        """The method's state before the first step: a pytree of arrays."""

    @abc.abstractmethod
    def step(
        self, objective: Objective, bases: Bases, state: Any, step: Int[Array, ""]
    ) -> tuple[Bases, Any, Float[Array, ""]]:
        """Take step number `step`. Returns the new rotations, the new state, and the objective *before* the step."""

    @property
    def planned(self):
        return [(type(self).__name__, self.steps, self.batch_size)]

    def run(self, problem: Problem, starts: tuple[Bases, ...], *, key: PRNGKeyArray, run: Run) -> Solution:
        with run.listening() as listening:
            return _take_steps(self, problem, starts, key, listening)


def check_counts(method: Stepwise) -> None:
    """Raise `ValueError` for numbers of steps, of examples or of steps without improvement below one."""
    for name in ("steps", "batch_size", "patience"):
        value = getattr(method, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} should be at least 1, got {value}")


def _take_steps(method: Stepwise, problem: Problem, starts: tuple[Bases, ...], key: PRNGKeyArray, run: Run) -> Solution:
    objective, steps, batch_size = problem.objective, method.steps, method.batch_size
    if batch_size is None and (large := [e.source for e in objective.examples if e.source is not None]):
        raise ValueError(
            f"{large[0]} is too large to be looked at as a whole in every step: give the method a batch_size, such as "
            "16, or an array such as source.part(100_000) instead"
        )
    devices = Devices(run.mesh)
    devices.check(len(starts))
    stacked = {name: jnp.stack([start[name] for start in starts]) for name in objective.spaces}
    keys = jax.random.split(jax.random.fold_in(key, 1), len(starts))
    stepped = spread(objective, devices, batch_size)
    judge = stepped if problem.validation is None else spread(problem.validation, devices, None)
    judge = judge.in_full_precision()
    stretch = min(steps, max(MIN_STRETCH, -(-steps // STRETCHES)))
    fetched = sum(e.fetched_bytes(batch_size) for e in stepped.examples)
    if fetched:  # two stretches are in memory, and one on the devices
        stretch = max(1, min(stretch, FETCHED_BYTES // (len(starts) * fetched)))
    check_every = _check_every(method, stretch, objective, problem.judge)
    state = FitState.first(method, stacked, 3 + steps // check_every, devices)
    config = {
        "objective": objective, "validation": problem.validation, "method": method, "key": key, "start": starts,
    }  # fmt: skip

    with contextlib.ExitStack() as stack:
        record = stack.enter_context(
            Record(
                run,
                config=config,
                state=state,
                sound=FitState.unsound,
                total=steps,
                label=type(method).__name__.lower(),
                step_of=lambda state: int(state.step),
            )
        )
        state = state if record.restored is None else record.restored
        begun = time.perf_counter()
        fit = stack.enter_context(
            contextlib.closing(CompiledFit(method, stepped, judge, keys, state, stretch, devices))
        )
        compile_seconds = time.perf_counter() - begun
        state, result, detail = _loop(fit, state, check_every, method.patience, record, run)
    # This check is not saved: a run that is resumed must be equal to one that never stopped.
    if result is not Result.NON_FINITE and state.checked_at[state.checks - 1] != state.step:
        state = fit.judge(state)
    stats: dict[str, Any] = {"compile_seconds": compile_seconds}
    if record.restored is not None:
        stats["resumed_at"] = int(record.restored.step)
    detail = "; ".join(filter(None, [detail, *record.warnings]))
    state = dataclasses.replace(state, best=devices.gather(state.best))
    return _solution(method, state, stacked, problem, result, detail, stats)


def _check_every(method: Stepwise, stretch: int, objective: Objective, judge: Objective) -> int:
    """The number of steps from one check to the next, in whole stretches: small enough that every window of `patience`
    contains a check, and otherwise large enough to limit the cost of checks (a value costs half as much as a value with
    its gradient)."""
    examples = objective.examples
    rows = sum(len(e.x) for e in examples)
    share = sum(e.share(method.batch_size) for e in examples) / max(1, len(examples))
    if method.submatrix is not None:
        widths = list(objective.spaces.values())
        share *= min(1.0, math.prod(method.submatrix) / (widths[0] * widths[-1]))
    cost = 0.5 * sum(len(e.x) for e in judge.examples) / (rows * share) if rows else 0.5  # of a check, in steps
    every = stretch * math.ceil(cost / (CHECKING * stretch))
    return every if method.patience is None else min(every, stretch * max(1, method.patience // stretch))


def _loop(
    fit: CompiledFit, state: FitState, check_every: int, patience: int | None, record: Record, run: Run
) -> tuple[FitState, Result, str]:
    """Take steps until the end or until there is a reason to stop. Returns the state, the result, and details."""
    begun = record.begun - float(state.seconds)
    per_step = math.inf  # seconds
    try:
        if not state.checks:
            state = fit.judge(state)
        while True:
            done = int(state.step)
            finished = done == fit.steps
            # As many steps as fit into a slice, up to the end of the stretch or the next save.
            count = min(fit.stretch - done % fit.stretch, fit.steps - done, max(1, int(SLICE_SECONDS / per_step)))
            if left := record.steps_left(done):
                count = min(count, left)
            count, due, stopped = _agreed(count, record.due(done), run.stopped)
            checked = state.checked_at[state.checks - 1] == done
            converged = patience is not None and checked and done - state.best_step.max() >= patience
            if due or stopped or finished or converged:
                record.save(done, state, state.lowest)
            if stopped:
                run.stop()  # the signal may have come to another process
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
            record.show(
                done,
                best=float(values.mean(axis=1).min()),
                error=error,
                objective=values.mean(axis=1),
                checked=state.last_check if check else None,
                seconds=float(state.seconds),
            )
            if check and not np.isfinite(state.last_check).all():
                return state, Result.NON_FINITE, f"the objective on all examples, after step {done}"
    except ValueError:  # examples cannot be read: keep the steps that were taken
        if jax.process_count() == 1:
            record.save(int(state.step), state, state.lowest)
        raise
    except Interrupted:  # SIGTERM without a folder: there is nowhere to save
        raise
    except KeyboardInterrupt:  # a second Ctrl-C, or one that `run` did not note
        run.stop()
        record.save(int(state.step), state, state.lowest)
        return state, Result.INTERRUPTED, ""


def _before_failure(
    fit: CompiledFit, state: FitState, moved: FitState, values: Float[np.ndarray, "restarts count"]
) -> tuple[FitState, Result, str]:
    """What `_loop` returns if a slice of steps, from `state` to `moved`, led to NaN: the last finite rotations, with a
    check. These are the rotations before the objective was not finite, or those one step earlier; they do not depend
    on where the slice began."""
    begun, finite = int(state.step), np.isfinite(values)
    if finite.all():  # but the rotations after the last step are not
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
    method: Stepwise,
    state: FitState,
    starts: Stacked,
    problem: Problem,
    result: Result,
    detail: str,
    stats: dict[str, Any],
) -> Solution:
    """The solution from the last state of a fit."""
    # A candidate whose value is not finite is chosen only if all are.
    best_values = state.best_values
    chosen = int(np.nanargmin(best_values)) if np.isfinite(best_values).any() else 0
    if result in (Result.ALL_STEPS, Result.CONVERGED) and state.best_step[chosen] == 0:
        result = Result.NO_IMPROVEMENT
    candidates = tuple(jax.tree.map(lambda r, i=i: r[i], state.best) for i in range(len(best_values)))
    bases = candidates[chosen]
    value, evident = evidence(problem.objective, bases)
    if problem.validation is None:
        start_values = state.checked[:, 0]
    else:
        start_values = np.asarray(values_of(Devices(None), None, problem.objective.in_full_precision(), starts))
    seconds = float(state.seconds)
    return Solution(
        bases=bases,
        result=result,
        detail=detail,
        value=value,
        start_value=float(start_values[chosen]),
        validation_value=None if problem.validation is None else float(best_values[chosen]),
        history=state.history,
        candidates=candidates,
        candidate_values=best_values,
        free={name: np.ones(d, bool) for name, d in problem.objective.spaces.items()},
        stages=(Stage(type(method).__name__, float(best_values[chosen]), result.name, seconds),),
        stats={
            "steps": int(state.step),
            "best_step": int(state.best_step[chosen]),
            "restart": chosen,
            "seconds": seconds,
            **stats,
            **evident,
        },
    )


def _agreed(count: int, save: bool, stop: bool) -> tuple[int, bool, bool]:
    """Agree on the decisions of all processes: clocks and signals differ, but all must take the same steps."""
    if jax.process_count() == 1:
        return count, save, stop
    everyones = np.asarray(multihost_utils.process_allgather(np.asarray([count, save, stop])))
    return int(everyones[0, 0]), bool(everyones[0, 1]), bool(everyones[:, 2].any())
