"""A method for starts that are known to be good, such as the bases in which a layer's weights are sparse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from rotsparse.engine.method import Method, Problem
from rotsparse.engine.run import Run
from rotsparse.engine.solution import Result, Solution, Stage, judged_value
from rotsparse.objectives.base import Bases, Objective, thinned
from rotsparse.objectives.measures import L4, Measure

# A hint that leaves so many times the entries of the other result is not worth the steps: they are small.
HOPELESS = 1.25

# A hint is clear of everything else that is known if it leaves at most this share of its entries, and lies in a basin
# of its own if `near` lowers its objective by a smaller share than the second.
CLEAR, SETTLED = 0.5, 0.2

# Examples of a first look.
LOOKED_AT = 1000


class Hinted(Method):
    """Run `far` from the starts and, from one of the problem's hints, `near`, which should not leave its basin. Of the
    two results keep the one that leaves fewer entries above the measure's ε, on the examples that judge: where
    bases differ much, the number of zeros and the value of a smooth measure may rank them differently, and the zeros
    are what is reported. For measures that are not elementwise, or have no ε (`L4`), the judged objective decides.

    A look at all hints and the start, on at most 1000 examples, comes first. It is the first hint that runs, unless
    another leaves at most half of the entries of all else. A hint that does so is clear of all else, and `near` runs
    from it at once; if that lowers its objective by less than a fifth, the hint lay in a deep basin of its own, and
    `far`, which would hardly find one as deep, is left out. With several starts it never is: they are there to show
    what is found without hints.

    Without hints, and where the hint leaves 1.25 times as many entries before its first step as the result of `far`, or
    ends above the objective of the start, it is `far` alone. A hint that is kept takes the place of the best candidate.
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
        if not problem.hints:
            return self.far.run(problem, starts, key=key, run=run)
        few = thinned(problem.judge, LOOKED_AT)
        looks = [entries_left(few, bases) for bases in (*problem.hints, starts[0])]
        best = int(np.argmin(looks[:-1]))
        clear = _clear(looks[best], looks[:best] + looks[best + 1 :])
        chosen = best if clear else 0

        def near(run: Run) -> Solution:
            plain, folder = dataclasses.replace(problem, hints=()), run.subrun("hints").subrun(f"start-{chosen}")
            return self.near.run(plain, (problem.hints[chosen],), key=jax.random.fold_in(key, 3), run=folder)

        with run.listening() as run:
            hinted = near(run) if clear and len(starts) == 1 else None
            if hinted and (hinted.result.broken_off or hinted.value > (1 - SETTLED) * hinted.start_value):
                begun = judged_value(problem.judge, starts[0])
                if hinted.candidate_values[hinted.best] < begun:
                    share = f"{entries_left(few, hinted.bases):.1%} of the entries above ε; clear of the other starts"
                    # What the objective is at the start of the whole problem, not at the hint.
                    value = begun if problem.validation is None else judged_value(problem.objective, starts[0])
                    return dataclasses.replace(hinted, start_value=value, stages=(_stage(hinted, share),))
            solution = self.far.run(problem, starts, key=key, run=run)
            if solution.result.broken_off:
                return solution
            if run.stopped:
                return dataclasses.replace(solution, result=Result.INTERRUPTED)
            if not hinted and looks[chosen] <= HOPELESS * entries_left(few, solution.bases):
                hinted = near(run.quiet())
            if hinted is None:
                return solution
            if hinted.result.broken_off:
                return dataclasses.replace(solution, result=hinted.result)
            return _better(problem, solution, hinted, starts[0])


def _clear(left: float, others: list[float]) -> bool:
    """Whether a hint that leaves so many entries is clear of all else. The value of `L4` is negative, and no share."""
    return 0 <= left <= CLEAR * min(others)


def _better(problem: Problem, solution: Solution, hinted: Solution, start: Bases) -> Solution:
    """The solution, with the result from a hint in place of its best candidate if that leaves fewer entries."""
    left = entries_left(problem.judge, solution.bases), entries_left(problem.judge, hinted.bases)
    begun, reached = problem.judged([start, hinted.bases])
    kept = left[1] < left[0] and reached < begun
    if kept:
        solution = solution.replaced(hinted.bases, float(reached), problem.objective, problem.validation)
        solution = dataclasses.replace(solution, start_value=judged_value(problem.objective, start), certificate=None)
    share = f"{left[1]:.1%} of the entries above ε, against {left[0]:.1%} from the other starts"
    stage = _stage(hinted, f"{share}: {'kept' if kept else 'dropped'}")
    seconds = solution.stats["seconds"] + hinted.stats["seconds"]
    return dataclasses.replace(solution, stages=(*solution.stages, stage), stats=solution.stats | {"seconds": seconds})


def _stage(hinted: Solution, remark: str) -> Stage:
    stage = hinted.stages[-1]
    return stage._replace(name=f"{stage.name} from hints", remark=remark)


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
