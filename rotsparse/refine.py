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
from rotsparse.pairs import SCREEN, Certificate, pair_search

# A first sweep that gains less than this share of the objective has found no barriers worth crossing.
WORTH = 2e-3


@dataclasses.dataclass(frozen=True)
class Refinement:
    """Better bases, what no pair rotation improves on, and what the first sweep and everything together gained, as
    shares of the objective."""

    bases: Bases
    certificate: Certificate
    first_gain: float
    gain: float

    def __str__(self) -> str:
        verdict = (
            "pairs were mixed up behind barriers, as in planted networks"
            if self.first_gain >= WORTH
            else "no barriers between pairs, as in most trained layers"
        )
        return f"pair searches gained {self.gain:.2%} ({verdict}); {self.certificate}"


def refine(
    objective: Objective,
    bases: Bases,
    polish: Callable[[Bases], Bases],
    *,
    rounds: int = 3,
    screen: int | None = SCREEN,
) -> Refinement:
    """Pair searches, and `polish` after each for as long as the two together gain.

    `polish` improves rotations without leaving their basin, such as a few hundred steps of `Annealing(angle=0.1)`; what
    it makes worse is dropped. Where one sweep of pair rotations gains less than 0.2% of the objective, nothing more is
    tried. The result is never worse than `bases`. Raises `ValueError` where `pair_search` does.
    """
    found, certificate = pair_search(objective, bases, sweeps=1, screen=screen)
    start = float(eqx.filter_jit(objective.value)(bases))
    first_gain = (start - certificate.value) / abs(start) if start else 0.0
    if first_gain >= WORTH:
        found, certificate = pair_search(objective, found, screen=screen)
        for _ in range(rounds):
            before = certificate.value
            candidate, candidate_certificate = pair_search(objective, polish(found), screen=screen)
            if candidate_certificate.value < before:
                found, certificate = candidate, candidate_certificate
            if before - certificate.value < 1e-4 * abs(before):
                break
    gain = (start - certificate.value) / abs(start) if start else 0.0
    return Refinement(found, certificate, first_gain, gain)
