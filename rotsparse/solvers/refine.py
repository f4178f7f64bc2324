"""What comes after annealing: pair searches and short polishes in turn, for as long as they pay.

Annealing ends in one of two states. In layers that hide a sharp basis (planted networks, and what resembles them) a few
rows are still mixtures of two directions, with a barrier between them and the better angle: pair searches get them out,
a short annealing at small angles lets all other rows settle, and that may free the next pair. In most trained layers
the residue is spread over many rows at once, and pairs gain next to nothing. One sweep tells the two apart.
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
from rotsparse.solvers.pair_search import SCREEN, PairSearch, solution_of


class Refine(Method):
    """Pair searches, and `polish` after each for as long as the two together gain.

    `polish` improves rotations without leaving their basin; what it makes worse is dropped. Where one sweep of pair
    rotations gains less than the share `worth` of the objective, nothing more is tried; otherwise there are up to
    `rounds` polishes. At most `examples` examples are looked at, evenly spaced; all searches but the last one look at
    so few of them that a row has `entries` entries (half of the default still finds all pairs of planted networks of
    n = 128); the last one, and its certificate, at all. Raises `ValueError` where `PairSearch` does; as a later stage
    it is skipped there, and for Jacobians of more than `largest` entries, where the searches would take too long.
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
        searched = thinned(problem.objective, self.examples)
        few = thinned(searched, -(-self.entries // row_entries(searched)))
        look, whole = PairSearch(sweeps=1, screen=self.screen), PairSearch(screen=self.screen)
        start = {space: starts[0][space] for space in searched.spaces}
        at_start, first = judged_value(searched, start), judged_value(few, start)
        with run.listening() as run:
            certificate = None  # until the last search has left one
            bases, _ = look.search(few, start, run.part("look"))
            first_gain = (first - judged_value(few, bases)) / abs(first) if first else 0.0
            if first_gain < self.worth:
                if not run.stopped:
                    bases, certificate = look.search(searched, start, run.part("last"))
            else:
                bases, _ = whole.search(few, bases, run.part("search"))
                reached = judged_value(searched, bases)
                for i in range(self.rounds):
                    if run.stopped:
                        break
                    before = reached
                    polished = self.polish.run(
                        Problem(problem.objective), (bases,), key=key, run=run.part(f"polish-{i}").quiet()
                    )
                    if run.stopped:
                        break
                    candidate, _ = whole.search(few, polished.bases, run.part(f"search-{i}"))
                    after = judged_value(searched, candidate)
                    if after < before:
                        bases, reached = candidate, after
                    if before - reached < 1e-4 * abs(before):
                        break
                # What the few examples gain may be a loss on all of them.
                bases = bases if reached < at_start else start
                if not run.stopped:
                    bases, certificate = whole.search(searched, bases, run.part("last"))
        gain = (at_start - judged_value(searched, bases)) / abs(at_start) if at_start else 0.0
        looks = "one look, hardly anything to gain" if first_gain < self.worth else f"{first_gain:.2%} at first"
        solution = solution_of(problem, start, bases, certificate, time.perf_counter() - begun)
        stage = solution.stages[0]._replace(name="Refine", remark=f"pair searches gained {gain:.2%}; {looks}")
        return dataclasses.replace(solution, stages=(stage,))
