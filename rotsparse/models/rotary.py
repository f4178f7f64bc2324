"""Rotary position embedding (Su et al., "RoFormer", 2021), and the ways to stretch it to longer texts.

Pairs of coordinates of every query and key are turned by `position · frequency`. A *scaling* changes the frequencies,
and some also multiply the turned coordinates (`amplitude`). The formulas are those of the transformers library, which
the files are written for.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Scaling(Protocol):
    """How the frequencies of a context extension follow from the plain ones."""

    @property
    def amplitude(self) -> float:
        """What the turned coordinates are multiplied by."""
        ...

    def frequencies(self, theta: float, dims: int, n: int) -> np.ndarray:
        """Radians per position of each pair `[dims/2]`, when the model sees `n` tokens."""
        ...


@dataclass(frozen=True)
class Rotary:
    """`dims`: how many leading coordinates of a head turn (NeoX turns a quarter). `interleaved`: pairs are (0,1),
    (2,3), … as in the original and in llama2.c; otherwise (0, dims/2), (1, dims/2+1), … as in Hugging Face."""

    dims: int
    theta: float = 10000.0
    interleaved: bool = False
    scaling: Scaling | None = None

    @property
    def amplitude(self) -> float:
        return 1.0 if self.scaling is None else self.scaling.amplitude

    def frequencies(self, n: int = 1) -> np.ndarray:
        """Radians per position of each pair `[dims/2]`, float64, when the model sees `n` tokens."""
        if self.scaling is None:
            return plain_frequencies(self.theta, self.dims)
        return self.scaling.frequencies(self.theta, self.dims, n)


def pairs_apart(array: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a matrix of queries or keys (or its bias) in the order of Hugging Face, whose pairs are half a head
    apart, from one in which pairs are neighbours (llama2.c, llama.cpp)."""
    by_pair = array.reshape(heads, -1, 2, *array.shape[1:])
    return by_pair.swapaxes(1, 2).reshape(array.shape)


def plain_frequencies(theta: float, dims: int) -> np.ndarray:
    """`θ^(-2i/dims)`."""
    return theta ** (-np.arange(0, dims, 2) / dims)


@dataclass(frozen=True)
class Linear:
    """All frequencies divided by `factor` (position interpolation, Chen et al. 2023)."""

    factor: float
    amplitude: float = 1.0

    def frequencies(self, theta, dims, n):
        return plain_frequencies(theta, dims) / self.factor


@dataclass(frozen=True)
class Dynamic:
    """θ grows with the text once it is longer than `context` tokens ("dynamic NTK")."""

    factor: float
    context: int
    amplitude: float = 1.0

    def frequencies(self, theta, dims, n):
        stretch = self.factor * max(n, self.context) / self.context - (self.factor - 1)
        return plain_frequencies(theta * stretch ** (dims / (dims - 2)), dims)


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1: pairs that turn more than `high` times in the original context keep their frequency, those that turn
    less than `low` times are slowed by `factor`, and between them the two are mixed linearly."""

    factor: float
    low: float
    high: float
    context: int
    amplitude: float = 1.0

    def frequencies(self, theta, dims, n):
        frequency = plain_frequencies(theta, dims)
        turns = self.context * frequency / (2 * np.pi)
        keep = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return frequency * (keep + (1 - keep) / self.factor)


@dataclass(frozen=True)
class Yarn:
    """Pairs that turn more than `fast` times in the original context keep their frequency, those that turn less than
    `slow` times are slowed by `factor`, and the pairs between are mixed by their number (Peng et al., "YaRN", 2023)."""

    factor: float
    fast: float
    slow: float
    context: int
    amplitude: float
    truncate: bool = True

    def frequencies(self, theta, dims, n):
        low, high = (self._pair(turns, theta, dims) for turns in (self.fast, self.slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dims - 1)
        slowed = np.clip((np.arange(dims // 2) - low) / (high - low if high != low else 0.001), 0, 1)
        return plain_frequencies(theta, dims) * (1 - slowed + slowed / self.factor)

    def _pair(self, turns: float, theta: float, dims: int) -> float:
        """Which pair turns so many times in the original context."""
        return dims * math.log(self.context / (turns * 2 * math.pi)) / (2 * math.log(theta))


@dataclass(frozen=True)
class LongRope:
    """A divisor for every pair: `short` up to `context` tokens, `long` beyond (Ding et al., "LongRoPE", 2024)."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    context: int
    amplitude: float

    def frequencies(self, theta, dims, n):
        return plain_frequencies(theta, dims) / np.asarray(self.long if n > self.context else self.short)


@dataclass(frozen=True)
class Proportional:
    """Only the first `turning` pairs turn, at the frequencies that they have among all, divided by `factor`."""

    turning: int
    factor: float = 1.0
    amplitude: float = 1.0

    def frequencies(self, theta, dims, n):
        return np.where(np.arange(dims // 2) < self.turning, plain_frequencies(theta, dims), 0.0) / self.factor
