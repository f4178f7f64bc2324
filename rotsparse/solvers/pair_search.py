"""Pair search: rotate pairs of rows by their globally best angles, and certify the result.

A rotation of two rows of R by one angle changes two rows of Z (on the input side, two columns) and nothing else, so the
objective along it is a function of one number that can be searched globally (`_pair_angles`). Unlike a gradient, this
search finds minima behind barriers. At the end, the largest improvement δ of any tested pair is a certificate: up to δ,
the result is a global minimum within each of the tested planes.

The pairs worth testing share their large entries: two directions that are mixed with each other are active together.
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

# Number of partners of each row that are tested by default.
SCREEN = 4


def certify(objective: Objective, bases: Bases, *, screen: int | None = SCREEN) -> Certificate:
    """Compute how much the best rotation of any two rows would still improve the objective.

    `screen`: the number of partners tested for each row, those whose large entries coincide most with its own (`None`:
    all pairs). Each tested pair costs 53 evaluations of the measure on two rows of all examples: up to 430 evaluations
    on all rows by default, and 53·d for all pairs of d rows. For large data, certify on fewer examples:
    `objective.on(x)`.

    Raises `ValueError` for objectives that are not a sum over rows: a tied fit, a weighted sum, or a measure that is
    not elementwise.
    """
    searched, bases = sides(objective, bases)
    found = {side.space: gains(side, bases, screen) for side in searched}
    return _certificate(objective, bases, found)


class PairSearch(Method):
    """Rotate pairs of rows by the angles that improve the objective most, until no pair improves it.

    Each sweep takes the spaces in turn: it finds the best angle of every screened pair, picks disjoint pairs in the
    order of their gains, and rotates these at once. The next sweep tests only pairs with a row that was rotated. When
    they have no gain above `tolerance` times the objective, it tests all pairs; when these have none, or after `sweeps`
    sweeps, the search ends with a `Certificate`. `screen`, cost and errors are those of `certify`. Pair search does
    nothing useful from a random start: run it after another method.
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
        """Search from `start`. Returns bases whose objective does not exceed the start's, and the certificate, `None`
        if the search was interrupted."""
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
        """The state after one sweep over all spaces; after the last one it holds the certificate."""
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
                # Gains of disjoint pairs add up, unless the pairs share a root mean square (scaled inputs).
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
    """The state of a pair search: everything that its continuation depends on.

    `fresh`: the rows whose pairs the next sweep tests. `delta`, `tested`: the certificate, once the search is `done`.
    """

    bases: Bases
    value: Float[np.ndarray, ""]
    sweep: Int[np.ndarray, ""]
    fresh: dict[str, Bool[np.ndarray, "_"]]
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
    """The solution of a pair search: its bases, or its start if they are not better on the judged objective. Without a
    certificate the result is `INTERRUPTED`."""
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
    """Indices of disjoint pairs with improvements above the threshold, largest first."""
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
    return newton_schulz(turned, 1)  # keeps rounding errors from accumulating


def _largest_gain(found) -> float:
    """The largest improvement among the tested pairs; 0 if none improves."""
    return max([0.0, *(float(improvements.max()) for _, _, improvements in found.values() if len(improvements))])


def _certificate(objective: Objective, bases: Bases, found) -> Certificate:
    return Certificate(
        delta=_largest_gain(found),
        value=judged_value(objective, {space: bases[space] for space in objective.spaces}),
        tested={space: len(pairs) for space, (pairs, _, _) in found.items()},
        pairs={space: math.comb(objective.spaces[space], 2) for space in found},
    )
