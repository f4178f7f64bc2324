"""Pair search: the best rotation of every screened pair of rows, found globally, and the certificate that it leaves.

A rotation of two rows of R by one angle changes two rows of Z (two columns, on the input side) and nothing else, so the
objective along it is a function of one number that can be searched as a whole (`_pair_angles`). That sees minima behind
barriers, which no gradient does. Where no pair has a better angle, the value of δ below which all improvements lie is a
certificate: a local minimum in every one of these planes, globally.

Pairs worth trying are those that share their large entries: two directions that were mixed up are active together.
"""

import math
import time

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rotsparse._core.interrupt import Interrupted
from rotsparse._core.orthogonal import newton_schulz, worst_error
from rotsparse.engine.history import History
from rotsparse.engine.method import Method, Problem
from rotsparse.engine.record import Record
from rotsparse.engine.run import Run
from rotsparse.engine.solution import Certificate, Result, Solution, Stage, evidence, judged_value
from rotsparse.objectives.base import Bases, Objective
from rotsparse.solvers._pair_angles import Side, gains, sides
from rotsparse.solvers.combine import Each

# Partners of each row that are tested unless told otherwise.
SCREEN = 4


def certify(objective: Objective, bases: Bases, *, screen: int | None = SCREEN) -> Certificate:
    """What the best rotation of any two rows would still improve.

    `screen`: how many partners of each row are tested, those whose large entries coincide with its own most (None: all
    pairs). Every tested pair costs as much as 53 evaluations of the measure on two rows of all examples: the default up
    to 430 evaluations on all rows, a full test of d rows 53·d. For large data, certify on fewer: `objective.on(x)`.

    Raises `ValueError` for objectives that are not a plain sum over rows: a tied fit, a weighted sum, or a measure that
    is not elementwise.
    """
    searched, bases = sides(objective, bases)
    found = {side.space: gains(side, bases, screen) for side in searched}
    return _certificate(objective, bases, found)


class PairSearch(Method):
    """Rotate pairs of rows by the angles that improve the objective most, until none improves it any more.

    Each sweep takes each space in turn: it finds the best angle of every screened pair, picks disjoint pairs in the
    order of their gains, and rotates these at once. The next sweep looks only at pairs with a row that was rotated;
    when they have no gain above `tolerance` times the objective it looks at all, and when these have none, or after
    `sweeps`, it ends, and leaves a `Certificate`. `screen`, cost and errors are those of `certify`. From a random start
    pair searches are useless: run them after another method.
    """

    sweeps: int = eqx.field(static=True, default=20)
    screen: int | None = eqx.field(static=True, default=SCREEN)
    tolerance: float = eqx.field(static=True, default=1e-4)

    def run(self, problem, starts, *, key, run):
        if len(starts) != 1:
            return Each(self).run(problem, starts, key=key, run=run)
        begun, objective = time.perf_counter(), problem.objective
        with run.listening() as run:
            bases, certificate = self.search(objective, starts[0], run)
        return solution_of(problem, starts[0], bases, certificate, time.perf_counter() - begun)

    def search(self, objective: Objective, start: Bases, run: Run) -> tuple[Bases, Certificate | None]:
        """The bases that the search ends with, never worse than `start` by this objective, and the certificate (`None`
        where it was interrupted)."""
        searched, whole = sides(objective, start)
        state = _Sweep.first(start, judged_value(objective, start), searched)
        config = {"objective": objective, "method": self, "start": start}
        with Record(
            run, config=config, state=state, sound=_Sweep.unsound, total=self.sweeps, label="pair search",
            step_of=lambda state: int(state.sweep),
        ) as record:  # fmt: skip
            state = state if record.restored is None else record.restored
            try:
                while not state.done:
                    if run.stopped:
                        record.save(int(state.sweep), state, float(state.value))
                        return state.bases, None
                    state = self._sweep(state, objective, searched, whole)
                    if state.done or record.due(int(state.sweep)):
                        record.save(int(state.sweep), state, float(state.value))
                    value = float(state.value)
                    record.show(
                        int(state.sweep), best=value, error=worst_error(state.bases), objective=np.array([value])
                    )
            except Interrupted:
                raise
            except KeyboardInterrupt:  # a second one, which does not wait
                run.stop()
                record.save(int(state.sweep), state, float(state.value))
                return state.bases, None
        tested = {space: int(count) for space, count in state.tested.items()}
        pairs = {space: math.comb(objective.spaces[space], 2) for space in tested}
        return state.bases, Certificate(float(state.delta), float(state.value), tested, pairs)

    def _sweep(self, state: "_Sweep", objective: Objective, searched: list[Side], whole: Bases) -> "_Sweep":
        """One sweep over all spaces; at the end of the search with the certificate."""
        bases, value, found, turned = state.bases, float(state.value), {}, {}
        for side in searched:
            every = whole | bases
            pairs, angles, improvements = found[side.space] = gains(
                side, every, self.screen, np.asarray(state.fresh[side.space])
            )
            chosen = _matching(pairs, improvements, self.tolerance * abs(value))
            turned[side.space] = np.zeros(side.size, bool)
            while len(chosen):
                candidate = {**bases, side.space: _rotated(bases[side.space], pairs[chosen], angles[chosen])}
                after = judged_value(objective, candidate)
                if after < value:
                    bases, value = candidate, after
                    turned[side.space][pairs[chosen]] = True
                    break
                # Gains of disjoint pairs add up, except where they share the root mean square (scaled inputs).
                chosen = chosen[: len(chosen) // 2]
        sweep, everything = np.asarray(int(state.sweep) + 1), all(rows.all() for rows in state.fresh.values())
        if any(rows.any() for rows in turned.values()):
            fresh, done = turned, False  # the other pairs had no better angle a moment ago
        else:
            fresh, done = {space: np.ones_like(rows) for space, rows in turned.items()}, everything
        if not done and sweep == self.sweeps:
            found = {side.space: gains(side, whole | bases, self.screen) for side in searched}
            done = True
        delta = _largest_gain(found)
        tested = {space: np.asarray(len(pairs)) for space, (pairs, _, _) in found.items()}
        return _Sweep(bases, np.asarray(value), sweep, fresh, np.asarray(done), np.asarray(delta), tested)


class _Sweep(eqx.Module):
    """Where a pair search is: all that determines how it continues.

    `fresh`: the rows whose pairs the next sweep looks at. `delta`, `tested`: for the certificate, once it is `done`.
    """

    bases: Bases
    value: Float[np.ndarray, ""]
    sweep: Int[np.ndarray, ""]
    fresh: dict[str, Bool[np.ndarray, "d"]]
    done: Bool[np.ndarray, ""]
    delta: Float[np.ndarray, ""]
    tested: dict[str, Int[np.ndarray, ""]]

    @classmethod
    def first(cls, bases: Bases, value: float, searched: list[Side]) -> "_Sweep":
        fresh = {side.space: np.ones(side.size, bool) for side in searched}
        tested = {side.space: np.asarray(0) for side in searched}
        kept = {space: bases[space] for space in fresh}
        return cls(kept, np.asarray(value), np.asarray(0), fresh, np.asarray(False), np.asarray(0.0), tested)

    def unsound(self) -> str:
        error = worst_error(self.bases)
        return "" if error < 1e-3 else f"its rotations are not orthogonal: |RRᵀ - I| = {error:.1e}"


def solution_of(
    problem: Problem, start: Bases, bases: Bases, certificate: Certificate | None, seconds: float
) -> Solution:
    """What a search for pairs amounts to, judged as `problem` says: its start, if it found nothing better."""
    judged, begun = problem.judged([bases, start])
    if not judged < begun:
        bases, judged = start, begun
    value, evident = evidence(problem.objective, bases)
    result = Result.ALL_STEPS if judged < begun else Result.NO_IMPROVEMENT
    result = Result.INTERRUPTED if certificate is None else result
    return Solution(
        bases=bases,
        result=result,
        detail="",
        value=value,
        start_value=judged_value(problem.objective, start),
        validation_value=None if problem.validation is None else float(judged),
        history=History(np.zeros((1, 0)), np.array([0]), np.array([[begun]])),
        candidates=(bases,),
        candidate_values=np.array([judged]),
        free={name: np.ones(d, bool) for name, d in problem.objective.spaces.items()},
        stages=(Stage("PairSearch", float(judged), result.name, seconds),),
        certificate=certificate,
        stats={"seconds": seconds, **evident},
    )


def _matching(pairs, improvements, threshold: float) -> Int[np.ndarray, "K"]:
    """Disjoint pairs with gains above the threshold, largest first."""
    chosen, used = [], set()
    for k in np.argsort(-improvements, kind="stable"):
        if not improvements[k] > threshold:  # also for NaN
            break
        if used.isdisjoint(pairs[k]):
            used.update(pairs[k])
            chosen.append(k)
    return np.asarray(chosen, int)


def _rotated(r: Float[Array, "d d"], pairs, angles) -> Float[Array, "d d"]:
    i, j = pairs.T
    cos, sin = jnp.cos(angles)[:, None].astype(r.dtype), jnp.sin(angles)[:, None].astype(r.dtype)
    turned = r.at[i].set(cos * r[i] + sin * r[j]).at[j].set(cos * r[j] - sin * r[i])
    return newton_schulz(turned, 1)  # or rounding errors would pile up


def _largest_gain(found) -> float:
    """What the best of all tested rotations would improve; 0 if none would."""
    return max([0.0, *(float(improvements.max()) for _, _, improvements in found.values() if len(improvements))])


def _certificate(objective: Objective, bases: Bases, found) -> Certificate:
    return Certificate(
        delta=_largest_gain(found),
        value=judged_value(objective, {space: bases[space] for space in objective.spaces}),
        tested={space: len(pairs) for space, (pairs, _, _) in found.items()},
        pairs={space: math.comb(objective.spaces[space], 2) for space in found},
    )
