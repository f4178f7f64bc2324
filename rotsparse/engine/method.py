"""`Method`: maps an objective and starts to a `Solution`."""

import abc
import dataclasses
from collections.abc import Iterable

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from rotsparse.engine.run import Run
from rotsparse.engine.solution import Result, Solution, judged_value
from rotsparse.objectives.base import Bases, Objective


@dataclasses.dataclass(frozen=True)
class Problem:
    """The objective to minimise. `validation`: the same objective on held-out examples; if given, the best rotations
    are chosen on it. `hints`: rotations that are known to be good starts, for methods that take them."""

    objective: Objective
    validation: Objective | None = None
    hints: tuple[Bases, ...] = ()

    @property
    def judge(self) -> Objective:
        """The objective by which rotations are chosen."""
        return self.objective if self.validation is None else self.validation

    def judged(self, candidates: Iterable[Bases]) -> Float[np.ndarray, "candidates"]:
        """The judged objective of each candidate, with infinity for NaN. One program computes all values, so that equal
        rotations have equal values."""
        values = np.array([judged_value(self.judge, bases) for bases in candidates])
        return np.where(np.isnan(values), np.inf, values)


class Method(eqx.Module):
    """A way to minimise an objective over the rotations of its spaces. Subclass it for a method of your own."""

    @abc.abstractmethod
    def run(self, problem: Problem, starts: tuple[Bases, ...], *, key: PRNGKeyArray, run: Run) -> Solution:
        """Minimise from every start. Returns a solution with one candidate for each start. If the method `descends`,
        its judged objective never exceeds the start's. The same arguments give the same bits.

        Raises `ValueError` if the method does not apply to the objective.
        """

    @property
    def planned(self) -> list[tuple[str, int, int | None]]:
        """Every part that takes steps, as far as it is known beforehand: its name, steps, and examples a step (`None`:
        all)."""
        return []

    @property
    def takes_hints(self) -> bool:
        """Whether `run` makes use of the problem's `hints`."""
        return False

    @property
    def descends(self) -> bool:
        """Whether `run` never returns anything worse than its start. If not, `Then` compares its result with the
        start."""
        return True

    def after(self, problem: Problem, solution: Solution, *, key: PRNGKeyArray, run: Run) -> Solution:
        """Run as a later stage: continue from the best candidate, and replace it if that lowers the judged
        objective."""
        found = self.run(problem, (solution.bases,), key=jax.random.fold_in(key, 2), run=run)
        improved = solution.improved(found.bases, problem.objective, problem.validation)
        better = improved is not solution and solution.result is Result.NO_IMPROVEMENT
        result = Result.ALL_STEPS if better else solution.result
        return dataclasses.replace(
            improved,
            result=found.result if found.result.broken_off else result,
            detail="; ".join(filter(None, (solution.detail, found.detail))),
            stages=solution.stages + found.stages,
            certificate=found.certificate or solution.certificate,
        )


def start_if_better(problem: Problem, solution: Solution, start: Bases) -> Solution:
    """Replace the best rotations by `start` if they are not better, and set the result of the whole method
    accordingly."""
    reached, begun = problem.judged([solution.bases, start])
    if not reached < begun:
        solution = solution.replaced(start, float(begun), problem.objective, problem.validation)
        solution = dataclasses.replace(solution, start_value=solution.value)
        result = Result.NO_IMPROVEMENT
    else:
        result = Result.ALL_STEPS if solution.result is Result.NO_IMPROVEMENT else solution.result
    return solution if solution.result.broken_off else dataclasses.replace(solution, result=result)
