"""A method for starts that are known to be good, such as the bases in which a layer's weights are sparse."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rotsparse.engine.method import Method
from rotsparse.engine.solution import Result, judged_value
from rotsparse.objectives.base import Bases, Objective
from rotsparse.objectives.measures import L4, Measure
from rotsparse.solvers.combine import Each

# A hint that leaves so many times the entries of the other result is not worth the steps: they are small.
HOPELESS = 1.25


class Hinted(Method):
    """Run `far` from the starts and, from each of the problem's hints, `near`, which should not leave its basin. Of the
    two results keep the one that leaves fewer entries above the measure's ε, on the examples that judge: where bases
    differ much, the number of zeros and the value of a smooth measure may rank them differently, and the zeros are what
    is reported. For measures that are not elementwise, or have no ε (`L4`), the judged objective decides.

    Without hints, and where a hint leaves 1.25 times as many entries before its first step, or ends above the objective
    of the start, it is `far` alone. A hint that is kept takes the place of the best candidate.
    """

    far: Method
    near: Method

    @property
    def takes_hints(self):
        return True

    @property
    def planned(self):
        return self.far.planned + [(f"{name} from hints", *rest) for name, *rest in self.near.planned]

    @property
    def descends(self):
        return self.far.descends

    def run(self, problem, starts, *, key, run):
        with run.listening() as run:
            solution = self.far.run(problem, starts, key=key, run=run)
            if not problem.hints or solution.result.broken_off:
                return solution
            if run.stopped:
                return dataclasses.replace(solution, result=Result.INTERRUPTED)
            found = entries_left(problem.judge, solution.bases)
            promising = [h for h in problem.hints if entries_left(problem.judge, h) <= HOPELESS * found]
            if not promising:
                return solution
            plain = dataclasses.replace(problem, hints=())
            hinted = Each(self.near).run(
                plain, tuple(promising), key=jax.random.fold_in(key, 3), run=run.subrun("hints").quiet()
            )
            if hinted.result.broken_off:
                return dataclasses.replace(solution, result=hinted.result)
            left = found, entries_left(problem.judge, hinted.bases)
            start, reached = problem.judged([starts[0], hinted.bases])
            kept = left[1] < left[0] and reached < start
            if kept:
                solution = solution.replaced(hinted.bases, float(reached), problem.objective, problem.validation)
                start_value = judged_value(problem.objective, starts[0])
                solution = dataclasses.replace(solution, start_value=start_value, certificate=None)
            share = f"{left[1]:.1%} of the entries above ε, against {left[0]:.1%} from the other starts"
            stage = hinted.stages[-1]._replace(
                name=f"{hinted.stages[-1].name} from hints", remark=f"{share}: {'kept' if kept else 'dropped'}"
            )
            seconds = solution.stats["seconds"] + hinted.stats["seconds"]
            return dataclasses.replace(
                solution, stages=(*solution.stages, stage), stats=solution.stats | {"seconds": seconds}
            )


class _Above(Measure):
    """One for every entry above ε: to count, not to minimise."""

    eps: float | Array = 0.1

    def __call__(self, z):
        return jnp.where(jnp.abs(z) > self.eps, 1.0, 0.0).astype(z.dtype)

    def slope(self, z):
        return jnp.zeros_like(z)

    def curvature(self, z):
        return jnp.zeros_like(z)


def entries_left(objective: Objective, bases: Bases) -> float:
    """The share of entries above ε; of a measure without one, or that is not elementwise, the objective."""

    def counting(measure: Measure) -> Measure:
        return measure if isinstance(measure, L4) or not measure.elementwise else _Above(measure.eps)

    return judged_value(objective.map_measures(counting), bases)
