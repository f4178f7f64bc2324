"""The stage after annealing: pair searches and short polishes in turn, for as long as they pay.

Annealing ends in one of two states. In layers with a sharp basis (planted networks, and similar layers) a few rows are
still mixtures of two directions, with a barrier between them and the better angle. A pair search finds that angle, a
short annealing at small angles then adjusts all other rows, and this may make the next pair searchable. In most trained
layers the remaining error is spread over many rows at once, and pairs gain next to nothing. One sweep tells which.
"""

import dataclasses
import time

import equinox as eqx

from rotsparse.engine.method import Method, Problem
from rotsparse.engine.solution import judged_value
from rotsparse.objectives.base import thinned
from rotsparse.solvers._pair_angles import jacobian_entries, obstacle, row_entries
from rotsparse.solvers.anneal import Anneal
from rotsparse.solvers.combine import Each
from rotsparse.solvers.pair_search import SCREEN, PairSearch, certify, solution_of

# The share of the objective below which the gain of a polish, and of the search after it, is the last.
LAST = 5e-4


class Refine(Method):
    """Run pair searches, and `polish` after each, for as long as the two together gain.

    `polish` improves rotations without leaving their basin; a polish that makes them worse is dropped. If the first
    sweep of pair rotations gains less than the share `worth` of the objective, it is the only one; otherwise there are
    up to `rounds` polishes, the last when one gains less than `LAST` of the objective, and a final search. Results are
    compared on at most `examples` evenly spaced examples. Searches use fewer of these, so that a row has about
    `entries` entries (half of the default still finds all pairs of planted networks of n = 128), and the final one four
    times as many. The certificate is that of the last sweep, on its examples.

    Raises `ValueError` if `PairSearch` does. As a later stage it is skipped instead, and also for Jacobians of more
    than `largest` entries, for which the searches would take too long.
    """

    polish: Method = Anneal(steps=1000, angle=0.1)
    screen: int | None = eqx.field(static=True, default=SCREEN)
    examples: int = eqx.field(static=True, default=512)
    entries: int = eqx.field(static=True, default=8192)
    worth: float = eqx.field(static=True, default=2e-3)
    rounds: int = eqx.field(static=True, default=3)
    largest: int = eqx.field(static=True, default=2**16)

    def after(self, problem, solution, *, key, run):
        if obstacle(problem.objective) is not None or jacobian_entries(problem.objective) > self.largest:
            return solution
        return super().after(problem, solution, key=key, run=run)

    def run(self, problem, starts, *, key, run):
        if len(starts) != 1:
            return Each(self).run(problem, starts, key=key, run=run)
        begun = time.perf_counter()
        compared = thinned(problem.objective, self.examples)
        of_a_row = row_entries(compared)
        few, more = (thinned(compared, -(-n * self.entries // of_a_row)) for n in (1, 4))
        look, whole = PairSearch(sweeps=1, screen=self.screen), PairSearch(screen=self.screen)
        start = {space: starts[0][space] for space in compared.spaces}
        at_start, first = judged_value(compared, start), judged_value(few, start)
        with run.listening() as run:
            certificate = None  # until the final search is complete
            bases, _ = look.search(few, start, run.subrun("look"))
            first_gain = (first - judged_value(few, bases)) / abs(first) if first else 0.0
            if first_gain < self.worth:
                # A gain on the few examples may be a loss on the others.
                reached = judged_value(compared, bases)
                bases, reached = (bases, reached) if reached < at_start else (start, at_start)
                certificate = None if run.stopped else certify(few, bases, screen=self.screen)
            else:
                bases, _ = whole.search(few, bases, run.subrun("search"))
                reached = judged_value(compared, bases)
                for i in range(self.rounds):
                    if run.stopped:
                        break
                    before = reached
                    polished = self.polish.run(
                        Problem(problem.objective), (bases,), key=key, run=run.subrun(f"polish-{i}").quiet()
                    )
                    if run.stopped:
                        break
                    candidate, _ = whole.search(few, polished.bases, run.subrun(f"search-{i}"))
                    after = judged_value(compared, candidate)
                    if after < before:
                        bases, reached = candidate, after
                    if before - reached < LAST * abs(before):
                        break
                bases, reached = (bases, reached) if reached < at_start else (start, at_start)
                if not run.stopped:
                    last, certificate = whole.search(more, bases, run.subrun("last"))
                    after = judged_value(compared, last)
                    if after <= reached:
                        bases, reached = last, after
                    elif certificate is not None:
                        certificate = certify(more, bases, screen=self.screen)
        gain = (at_start - reached) / abs(at_start) if at_start else 0.0
        looks = "one look, hardly anything to gain" if first_gain < self.worth else f"{first_gain:.2%} at first"
        solution = solution_of(problem, start, bases, certificate, time.perf_counter() - begun)
        stage = solution.stages[0]._replace(name="Refine", remark=f"pair searches gained {gain:.2%}; {looks}")
        return dataclasses.replace(solution, stages=(stage,))
