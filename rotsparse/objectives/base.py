"""`Objective`: a function of the rotations of some spaces, with its relative gradient.

An objective is mathematics only. `data.examples.Examples` stores its examples and draws minibatches; an objective has
one of these for each term.
"""

import abc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, Key, PRNGKeyArray

from rotsparse._core.modules import replace_fields
from rotsparse._core.precision import products
from rotsparse._core.types import AnyArray
from rotsparse.data.devices import Devices
from rotsparse.data.examples import Examples
from rotsparse.objectives.measures import Measure, with_eps

if TYPE_CHECKING:
    Bases = dict[str, Array]
else:  # NumPy arrays are accepted too, but a type checker would then refuse the `dict[str, Array]` of a user
    Bases = dict[str, Float[AnyArray, "_ _"]]


class Objective(eqx.Module):
    """A function of the rotations of some spaces, with its relative gradient. An objective of your own needs only the
    three abstract methods; the others serve minibatches, several devices and schedules of ε."""

    @property
    @abc.abstractmethod
    def spaces(self) -> dict[str, int]:
        """Name and dimension of every space on whose rotation the objective depends."""

    @abc.abstractmethod
    def value(self, bases: Bases) -> Float[Array, ""]:
        """The objective."""

    @abc.abstractmethod
    def value_and_grad(self, bases: Bases) -> tuple[Float[Array, ""], Bases]:
        """The objective and its relative gradient (a skew-symmetric matrix for every space)."""

    @property
    def examples(self) -> tuple[Examples, ...]:
        """The examples of every term."""
        return ()

    def with_examples(self, examples: tuple[Examples, ...]) -> "Objective":
        """The same objective on other examples, with the same normalisation."""
        return self

    def split_key(self, key: PRNGKeyArray) -> tuple[PRNGKeyArray, ...]:
        """A key for drawing from each of `examples`."""
        return (key,) * len(self.examples)

    def subsampled(self, key: PRNGKeyArray, submatrix: tuple[int, int]) -> "Objective":
        """An unbiased estimate of the objective from random rows and columns of each Jacobian; `submatrix` says how
        many. Raises `ValueError` for objectives without Jacobians."""
        raise ValueError(f"a submatrix is drawn from Jacobians, and {type(self).__name__} has none: leave it out")

    def map_measures(self, function: Callable[[Measure], Measure]) -> "Objective":
        """The same objective with the measure of every term replaced. Raises `ValueError` for objectives without a
        measure."""
        raise ValueError(f"{type(self).__name__} has no measure that could be replaced")

    def in_full_precision(self) -> "Objective":
        """The same objective with all matrix products in full float32 precision: what rotations are judged by."""
        return self

    def with_eps(self, eps: float | Array) -> "Objective":
        """The same objective with the scale of every measure replaced."""
        dtype = self.examples[0].x.dtype
        return self.map_measures(lambda measure: with_eps(measure, eps, dtype))


class MeasuredObjective(Objective):
    """One measure on one set of examples: the common base of `JacobianSparsity` and `ActivationSparsity`."""

    data: eqx.AbstractVar[Examples]
    measure: eqx.AbstractVar[Measure]
    precision: eqx.AbstractVar[str]
    chunk: eqx.AbstractVar[int]

    @property
    def x(self) -> Float[Array, "n d"]:
        """The examples in memory."""
        return self.data.x

    @property
    def examples(self):
        return (self.data,)

    def with_examples(self, examples):
        return replace_fields(self, data=examples[0])

    def map_measures(self, function):
        return replace_fields(self, measure=function(self.measure))

    def in_full_precision(self):
        return replace_fields(self, precision="highest")

    def sum(self, function) -> Any:
        """The sum of `function(x_chunk, weights)` over all examples, in this objective's precision."""
        with products(self.precision):
            return self.data.sum(function, self.chunk)

    @property
    def count(self) -> int:
        """The number of examples in `sum`."""
        return self.data.count


# --- what a fit does with the examples of any objective


def sampled(
    objective: Objective,
    key: PRNGKeyArray,
    batch_size: int | None,
    submatrix: tuple[int, int] | None = None,
    fetched: tuple[Any, ...] | None = None,
) -> Objective:
    """The objective on a random minibatch. `fetched`: the examples that `reading` has read for this key."""
    examples, keys = objective.examples, objective.split_key(key)
    rows = (None,) * len(examples) if fetched is None else fetched
    drawn = tuple(e.draw(k, batch_size, r) for e, k, r in zip(examples, keys, rows, strict=True))
    objective = objective.with_examples(drawn)
    return objective if submatrix is None else objective.subsampled(key, submatrix)


def reading(
    objective: Objective, keys: Key[Array, "restarts steps"], batch_size: int | None, devices: Devices
) -> Callable[[], tuple[Any, ...]]:
    """A function that reads the examples that `sampled` draws with each of these keys `[restarts, steps]`."""
    split = jax.vmap(jax.vmap(objective.split_key))(keys)
    reads = [e.reading(k, batch_size, devices) for e, k in zip(objective.examples, split, strict=True)]
    return lambda: tuple(read() for read in reads)


def spread(objective: Objective, devices: Devices, batch_size: int | None) -> Objective:
    """The same objective with its examples spread over the devices of a mesh, for use within `devices.map`."""
    if devices.mesh is None:
        return objective
    return objective.with_examples(tuple(e.spread(devices, batch_size) for e in objective.examples))


def thinned(objective: Objective, examples: int) -> Objective:
    """The same objective on at most `examples` evenly spaced examples of each term, with the same normalisation."""
    return objective.with_examples(tuple(e.thinned(examples) for e in objective.examples))


def add_grads(a: Bases, b: Bases) -> Bases:
    return {name: a[name] + b[name] if name in a and name in b else {**a, **b}[name] for name in {**a, **b}}
