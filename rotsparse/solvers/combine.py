"""Methods that combine other methods."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from rotsparse.engine.method import Method, Problem, start_if_better
from rotsparse.engine.solution import Result, Solution, Stage, evidence, judged_value
from rotsparse.objectives.base import Bases
from rotsparse.objectives.measures import Measure


class Then(Method):
    """Run methods one after another. Each later stage continues from the best candidate so far, or, if it is an `Each`,
    from every candidate separately; a result that does not lower the judged objective is dropped. No stage runs after
    one that was interrupted or met NaN."""

    stages: tuple[Method, ...]

    def __init__(self, *stages: Method):
        if not stages:
            raise ValueError("Then needs at least one method")
        self.stages = stages

    @property
    def takes_hints(self):
        return any(stage.takes_hints for stage in self.stages)

    @property
    def planned(self):
        return [part for stage in self.stages for part in stage.planned]

    def run(self, problem, starts, *, key, run):
        with run.listening() as run:
            solution = self.stages[0].run(problem, starts, key=key, run=run)
            for i, stage in enumerate(self.stages[1:], start=1):
                if solution.result.broken_off:
                    break
                if run.stopped:
                    solution = dataclasses.replace(solution, result=Result.INTERRUPTED)
                    break
                solution = stage.after(problem, solution, key=key, run=run.subrun(f"stage-{i}"))
            descends = all(stage.descends for stage in self.stages)
            return solution if descends else start_if_better(problem, solution, starts[0])


class BestOf(Method):
    """Run several methods from the same starts and return the result with the lowest judged objective."""

    methods: tuple[Method, ...]

    def __init__(self, *methods: Method):
        if not methods:
            raise ValueError("BestOf needs at least one method")
        self.methods = methods

    @property
    def planned(self):
        return [part for method in self.methods for part in method.planned]

    def run(self, problem, starts, *, key, run):
        found = []
        with run.listening() as run:
            for i, method in enumerate(self.methods):
                found.append(method.run(problem, starts, key=jax.random.fold_in(key, i), run=run.subrun(f"method-{i}")))
                if found[-1].result is Result.INTERRUPTED:
                    break
            best = found[int(np.argmin(problem.judged(solution.bases for solution in found)))]
            return dataclasses.replace(
                best,
                result=found[-1].result if found[-1].result is Result.INTERRUPTED else best.result,
                stages=tuple(stage for solution in found for stage in solution.stages),
                stats=best.stats | {"seconds": sum(solution.stats["seconds"] for solution in found)},
            )


class Each(Method):
    """Run a method from each start separately, one after another: each start has its own best step, and memory does not
    grow with the number of starts."""

    method: Method

    @property
    def descends(self):
        return self.method.descends

    @property
    def planned(self):
        return self.method.planned

    def run(self, problem, starts, *, key, run):
        found = []
        with run.listening() as run:
            for i, start in enumerate(starts):
                found.append(self.method.run(problem, (start,), key=key, run=run.subrun(f"start-{i}")))
                if found[-1].result.broken_off:
                    break
            return _joined(problem, found, len(starts))

    def after(self, problem, solution, *, key, run):
        found = self.run(problem, solution.candidates, key=key, run=run)
        if found.result.broken_off and len(found.candidates) < len(solution.candidates):
            rest = solution.candidates[len(found.candidates) :]
            values = np.append(found.candidate_values, problem.judged(rest))
            found = dataclasses.replace(found, candidates=found.candidates + rest, candidate_values=values)
        return dataclasses.replace(
            found,
            start_value=solution.start_value,
            detail="; ".join(filter(None, (solution.detail, found.detail))),
            stages=solution.stages + found.stages,
            stats=found.stats | {"seconds": solution.stats["seconds"] + found.stats["seconds"]},
        )


class WithMeasure(Method):
    """Run a method on the objective with another measure, for instance a smooth one at first. The result is judged by
    the objective itself."""

    measure: Measure
    method: Method

    @property
    def descends(self):
        return False

    @property
    def planned(self):
        return self.method.planned

    def run(self, problem, starts, *, key, run):
        replaced = Problem(
            problem.objective.map_measures(self._of), problem.validation and problem.validation.map_measures(self._of)
        )
        solution = self.method.run(replaced, starts, key=key, run=run)
        values = problem.judged(solution.candidates)
        best = int(np.argmin(values))
        bases = solution.candidates[best]
        value, evident = evidence(problem.objective, bases)
        name = f"{solution.stages[-1].name} on {self.measure}"
        return dataclasses.replace(
            solution,
            bases=bases,
            value=value,
            start_value=judged_value(problem.objective, starts[best]),
            validation_value=None if problem.validation is None else float(values[best]),
            candidate_values=values,
            stages=(*solution.stages[:-1], solution.stages[-1]._replace(name=name, value=float(values[best]))),
            stats=solution.stats | {"restart": best} | evident,
        )

    def _of(self, measure: Measure) -> Measure:
        # Objectives keep the scale as an array in their own precision.
        return eqx.tree_at(lambda m: m.eps, self.measure, jnp.asarray(self.measure.eps, jnp.asarray(measure.eps).dtype))


def _joined(problem: Problem, found: list[Solution], starts: int) -> Solution:
    """Join the solutions from single starts."""
    candidates: tuple[Bases, ...] = tuple(solution.bases for solution in found)
    values = problem.judged(candidates)
    best = int(np.argmin(values))
    seconds = sum(solution.stats["seconds"] for solution in found)
    solution = dataclasses.replace(
        found[best],
        result=found[-1].result if found[-1].result.broken_off else found[best].result,
        detail="; ".join(filter(None, (solution.detail for solution in found))),
        candidates=candidates,
        candidate_values=values,
        stages=(Stage(found[best].stages[-1].name, float(values[best]), found[best].result.name, seconds),),
        stats=found[best].stats | {"restart": best, "seconds": seconds},
    )
    return solution.replaced(candidates[best], float(values[best]), problem.objective, problem.validation)
