"""What comes after annealing: pair searches and short polishes in turn, for as long as they pay.

Annealing ends in one of two states. In layers that hide a sharp basis (planted networks, and what resembles them) a few
rows are still mixtures of two directions, with a barrier between them and the better angle: pair searches get them out,
a short annealing at small angles lets all other rows settle, and that may free the next pair. In most trained layers
the residue is spread over many rows at once, and pairs gain next to nothing. One sweep tells the two apart.
"""

import dataclasses
from collections.abc import Callable

import equinox as eqx

from rotsparse.objectives import Bases, Objective
from rotsparse.solvers.pair_search import SCREEN, Certificate, pair_search, row_entries

# A first sweep that gains less than this share of the objective has found no barriers worth crossing.
WORTH = 2e-3

# Polishes at most, each with a search behind it.
ROUNDS = 3

# Entries of a row that tell which angle is better. Half of it still finds all pairs of planted networks of n = 128.
ENTRIES = 8192


@dataclasses.dataclass(frozen=True)
class Refinement:
    """Better bases, what no pair rotation improves on, and what the first sweep and everything together gained, as
    shares of the objective."""

    bases: Bases
    certificate: Certificate
    first_gain: float
    gain: float

    def __str__(self) -> str:
        looks = "one look, hardly anything to gain" if self.first_gain < WORTH else f"{self.first_gain:.2%} at first"
        return f"pair searches gained {self.gain:.2%} ({looks}); {self.certificate}"


def refine(
    objective: Objective,
    bases: Bases,
    polish: Callable[[Bases], Bases],
    *,
    screen: int | None = SCREEN,
    examples: int | None = None,
) -> Refinement:
    """Pair searches, and `polish` after each for as long as the two together gain.

    `polish` improves rotations without leaving their basin, such as a few hundred steps of `Annealing(angle=0.1)`; what
    it makes worse is dropped. Where one sweep of pair rotations gains less than 0.2% of the objective, nothing more is
    tried. All but the last search look at so many `examples` only, evenly spaced (default: 8192 entries of every row);
    the last one, and its certificate, at all of them. The result is never worse than `bases`. Raises `ValueError` where
    `pair_search` does.
    """
    value = eqx.filter_jit(objective.value)
    few, start = objective.thinned(examples or -(-ENTRIES // row_entries(objective))), float(value(bases))
    first = float(eqx.filter_jit(few.value)(bases))
    found, certificate = pair_search(few, bases, sweeps=1, screen=screen)
    first_gain = (first - certificate.value) / abs(first) if first else 0.0
    if first_gain < WORTH:
        found, certificate = pair_search(objective, bases, sweeps=1, screen=screen)
    else:
        found, _ = pair_search(few, found, screen=screen)
        reached = float(value(found))
        for _ in range(ROUNDS):
            before = reached
            candidate, _ = pair_search(few, polish(found), screen=screen)
            after = float(value(candidate))
            if after < before:
                found, reached = candidate, after
            if before - reached < 1e-4 * abs(before):
                break
        # What the few examples gain may be a loss on all of them.
        found, certificate = pair_search(objective, found if reached < start else bases, screen=screen)
    gain = (start - certificate.value) / abs(start) if start else 0.0
    return Refinement(found, certificate, first_gain, gain)
