"""The directions of a layer's basis as objects: `explanation.directions("in")[17]`.

Directions are numbered as rows of the rotations (see `evaluation.numbering`). The Jacobian is averaged over `x_test`,
coordinates are looked at on `examples` (rows of a text where there is one, otherwise `x_test`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, overload

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from rotsparse.engine.solution import SAME
from rotsparse.explain.effects import Effects, Mediation, effects
from rotsparse.explain.examples import Context, Examples
from rotsparse.explain.words import Word, WordScores
from rotsparse.layers.base import Layer
from rotsparse.layers.jacobians import apply
from rotsparse.layers.rotations import Rotations

IN, OUT = "in", "out"
SIDES = {IN: "input", OUT: "output"}

# Bins of a histogram, in standard deviations from the mean; the outermost ones are open.
EDGES = np.linspace(-6, 6, 49)
BETWEEN = (0.99, 0.9, 0.75, 0.5, 0.25, 0.1, 0.01)

# Candidates that are looked at for each example that is shown: some are too alike.
_CANDIDATES = 24
_ROWS = 4096


class Partner(NamedTuple):
    """A direction of the other side.

    `effect`: how many of its standard deviations the output moves, on average, for one of the input. `size`: the root
    mean square of that, larger where its sign differs between examples. `share`: of the energy (mean squared Jacobian)
    that the direction at hand holds. `often`: in which share of examples the entry is above a tenth of the rms of all.
    """

    side: str
    number: int
    effect: float
    size: float
    share: float
    often: float


class Neuron(NamedTuple):
    """A hidden neuron, and its part of the mean effect of an edge. The parts of all neurons (and that of the skip
    connection) add up to the effect."""

    number: int
    effect: float


@dataclass(frozen=True)
class Direction:
    """One direction of a layer's input or output space.

    `influence`: its share of the mean squared Jacobian, in the units of the fit. `cosine`: `|cos|` with its match in
    the restart of the fit where that is lowest; `None` after a single start, and where it was not fitted. `variance`,
    `skewness` and excess `kurtosis` are those of its coordinate over the examples.
    """

    side: str
    number: int
    influence: float
    cosine: float | None
    variance: float
    skewness: float
    kurtosis: float
    of: "Explanation" = field(repr=False, compare=False)

    @property
    def vector(self) -> Float[np.ndarray, "d"]:
        """The direction itself: a row of the rotation."""
        return np.asarray(self.of.basis(self.side)[self.number])

    @property
    def found_again(self) -> bool | None:
        """Whether every other start of the fit found it too (`|cos| > 0.99`); `None` where that is not known."""
        return None if self.cosine is None else self.cosine > SAME

    def coordinates(self) -> Float[np.ndarray, "n"]:
        """Its coordinate at every example, in standard deviations from the mean."""
        return self.of.coordinates(self.side)[self.number]

    def partners(self, count: int = 8) -> list[Partner]:
        """The directions of the other side that share most of its energy, the strongest first."""
        mean, size, energy, often = (self._mine(a) for a in self.of.effects)
        total = energy.sum()
        order = np.argsort(-energy, kind="stable")[:count]
        share = energy / total if total > 0 else energy
        return [Partner(self._other, int(j), *(float(a[j]) for a in (mean, size, share, often))) for j in order]

    def neurons(self, partner: int, count: int = 8) -> list[Neuron]:
        """The hidden neurons that carry the mean effect between it and a direction of the other side, those with the
        largest part first. Raises `ValueError` for a layer without a closed form."""
        edge = (self.number, partner) if self.side == OUT else (partner, self.number)
        parts = self.of.mediation.of(*edge)
        return [Neuron(int(h), float(parts[h])) for h in np.argsort(-np.abs(parts), kind="stable")[:count]]

    def top(self, count: int = 8) -> list[Context]:
        """The examples with the most positive coordinates; of those that are alike (the same token behind the same two)
        only the first."""
        return self._extreme(count, 1)

    def bottom(self, count: int = 8) -> list[Context]:
        """The examples with the most negative coordinates."""
        return self._extreme(count, -1)

    def between(self, quantiles: Sequence[float] = BETWEEN) -> list[Context]:
        """The examples at some quantiles of the coordinate, from high to low."""
        z = self.coordinates()
        ranks = (np.asarray(quantiles) * (len(z) - 1)).round().astype(int)
        rows = np.argpartition(z, np.unique(ranks))[ranks]
        return [self.of.examples.context(int(row), z) for row in rows]

    def histogram(self) -> list[int]:
        """How many examples have a coordinate in each bin of `EDGES`; those beyond count in the outermost bins."""
        inside = np.clip(self.coordinates(), EDGES[0], np.nextafter(EDGES[-1], 0))
        return np.histogram(inside, EDGES)[0].tolist()

    def words(self, count: int = 8, *, through: bool = False) -> tuple[list[Word], list[Word]]:
        """The words that an output promotes and suppresses, or that an input's positive and negative end are aligned
        with (`explain.words`); none for a layer of no language model. With `through` those that a push along the
        direction promotes and suppresses through all layers behind it, to first order."""
        scores = self.of.words.get(f"{self.side} through" if through else self.side)
        if scores is None:
            return [], []
        return scores.highest(self.number, count), scores.highest(self.number, count, sign=-1)

    @property
    def _other(self) -> str:
        return OUT if self.side == IN else IN

    def _mine(self, a: np.ndarray) -> np.ndarray:
        """Of an array `[d_out, d_in]`, what belongs to this direction."""
        return a[:, self.number] if self.side == IN else a[self.number]

    def _extreme(self, count: int, sign: int) -> list[Context]:
        z = self.coordinates()
        looked_at = min(len(z), _CANDIDATES * count)
        rows = np.argpartition(-sign * z, looked_at - 1)[:looked_at]
        seen, shown = set(), []
        for row in rows[np.argsort(-sign * z[rows], kind="stable")]:
            if len(shown) == count or sign * z[row] <= 0:
                break
            if (alike := self.of.examples.alike(int(row))) not in seen:
                seen.add(alike)
                shown.append(self.of.examples.context(int(row), z))
        return shown


class Directions(Sequence[Direction]):
    """The directions of one side, by number."""

    def __init__(self, side: str, of: "Explanation"):
        self.side, self._of = side, of

    def __len__(self) -> int:
        return len(self._of.basis(self.side))

    @overload
    def __getitem__(self, number: int) -> Direction: ...

    @overload
    def __getitem__(self, number: slice) -> list[Direction]: ...

    def __getitem__(self, number):
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(f"there are {len(self)} {SIDES[self.side]} directions, 0 to {len(self) - 1}: got {number}")
        return self._of.direction(self.side, int(number) % len(self))

    def __iter__(self) -> Iterator[Direction]:
        return (self[i] for i in range(len(self)))


class Explanation:
    """The directions of a layer's basis, and everything that is told about them.

    `units`: those of the fit, as `scaled_rows` takes them. `cosines`: for each side, the lowest `|cos|` of each
    direction with its match in another restart, `None` where it has none. `examples`: of the layer's inputs, to look at
    coordinates (default: `x_test`). `words`: the scores of words for "in" and "out", and those through the layers
    behind for "in through" and "out through" (`explain.words`). Everything is
    computed when it is asked for, and kept.
    """

    def __init__(
        self,
        layer: Layer,
        x_test: Float[np.ndarray, "n d_in"],
        rotations: Rotations,
        *,
        units: Mapping[str, Any],
        cosines: Mapping[str, Sequence[float | None]] | None = None,
        examples: Examples | None = None,
        words: Mapping[str, WordScores] | None = None,
    ):
        self.layer, self.x_test, self.rotations, self.units = layer, x_test, rotations, units
        self.cosines = cosines or {}
        self.examples = Examples(np.asarray(x_test)) if examples is None else examples
        self.words = words or {}

    def directions(self, side: str) -> Directions:
        """The directions of the inputs ("in") or of the outputs ("out"), the most influential first."""
        if side not in SIDES:
            raise ValueError(f"a layer has directions 'in' and 'out', got {side!r}")
        return Directions(side, self)

    def direction(self, side: str, number: int) -> Direction:
        """One direction."""
        variance, skewness, kurtosis = (float(of[number]) for of in self._moments[side])
        lowest = self.cosines.get(side)
        cosine = None if lowest is None else lowest[number]
        influence = self.effects.energy.sum(axis=0 if side == IN else 1)[number]
        return Direction(side, number, float(influence), cosine, variance, skewness, kurtosis, self)

    def basis(self, side: str) -> np.ndarray:
        """The rotation of one side."""
        return np.asarray(self.rotations.r_in if side == IN else self.rotations.r_out)

    @cached_property
    def effects(self) -> Effects:
        """What the inputs do to the outputs."""
        return effects(self.layer, self.x_test, self.rotations, **self.units)

    @cached_property
    def mediation(self) -> Mediation:
        """Which hidden neurons do it."""
        return Mediation(self.layer, self.x_test, self.rotations)

    def coordinates(self, side: str) -> Float[np.ndarray, "d n"]:
        """The coordinates of all examples, in standard deviations from the mean; 0 where a direction does not vary."""
        return self._coordinates[side][0]

    @cached_property
    def _coordinates(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        found = {}
        for side in SIDES:
            z = np.ascontiguousarray(self._rotated(side).T)
            z -= z.mean(axis=1, keepdims=True)
            spread = z.std(axis=1, dtype=np.float64)
            z /= np.where(spread > 0, spread, 1).astype(z.dtype)[:, None]
            found[side] = z, spread
        return found

    def _rotated(self, side: str) -> np.ndarray:
        x = np.asarray(self.examples.x)
        if side == IN:
            return np.asarray(self.rotations.apply_in(x))
        parts = (apply(self.layer, jnp.asarray(x[i : i + _ROWS])) for i in range(0, len(x), _ROWS))
        return np.concatenate([np.asarray(self.rotations.apply_out(y)) for y in parts])

    @cached_property
    def _moments(self) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Variance, skewness and excess kurtosis of every coordinate."""
        found = {}
        for side, (z, spread) in self._coordinates.items():
            third, fourth = (np.mean(z.astype(np.float64) ** p, axis=1) for p in (3, 4))
            found[side] = spread**2, third, np.where(spread > 0, fourth - 3, 0)
        return found
