"""What a method is: it maps an objective and starts to a `Solution`."""

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
    """What is minimised. `validation` is the same objective on held-out examples; with it, the best rotations are
    chosen on those."""

    objective: Objective
    validation: Objective | None = None

    @property
    def judge(self) -> Objective:
        """The objective that rotations are chosen by."""
        return self.objective if self.validation is None else self.validation

    def judged(self, candidates: Iterable[Bases]) -> Float[np.ndarray, "candidates"]:
        """What each is chosen by, all computed by one program, so that equal rotations have equal values; infinite
        instead of NaN."""
        values = np.array([judged_value(self.judge, bases) for bases in candidates])
        return np.where(np.isnan(values), np.inf, values)


class Method(eqx.Module):
    """A way to minimise an objective over the rotations of its spaces. Methods know nothing of layers or models."""

    @abc.abstractmethod
    def run(self, problem: Problem, starts: tuple[Bases, ...], *, key: PRNGKeyArray, run: Run) -> Solution:
        """Minimise from every start. Returns a solution with one candidate for each; if the method `descends`, never
        one with a higher judged objective than its start. With the same arguments, the same bits.

        Raises `ValueError` where the method does not fit the objective.
        """

    @property
    def descends(self) -> bool:
        """Whether `run` never returns anything worse than its start; if not, `Then` compares the two at its end."""
        return True

    def after(self, problem: Problem, solution: Solution, *, key: PRNGKeyArray, run: Run) -> Solution:
        """Continue as a later stage: from the best candidate, and replace it if that lowers the judged objective."""
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
    """The solution of several stages, with the result of the whole: `start` where nothing better was found."""
    reached, begun = problem.judged([solution.bases, start])
    if not reached < begun:
        solution = solution.replaced(start, float(begun), problem.objective, problem.validation)
        solution = dataclasses.replace(solution, start_value=solution.value)
        result = Result.NO_IMPROVEMENT
    else:
        result = Result.ALL_STEPS if solution.result is Result.NO_IMPROVEMENT else solution.result
    return solution if solution.result.broken_off else dataclasses.replace(solution, result=result)
