"""What an objective is: a function of the rotations of some spaces, with its relative gradient."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray

from rotsparse.data.devices import Devices

Bases = dict[str, Float[Array, "d d"]]


class Objective(eqx.Module):
    """A function of the rotations of some spaces, with its relative gradient."""

    @property
    @abc.abstractmethod
    def spaces(self) -> dict[str, int]:
        """Name and dimension of every space whose rotation this objective depends on."""

    @abc.abstractmethod
    def value_and_grad(self, bases: Bases) -> tuple[Float[Array, ""], Bases]:
        """The objective and the relative gradient (one skew-symmetric matrix for every space)."""

    @abc.abstractmethod
    def value(self, bases: Bases) -> Float[Array, ""]:
        """The objective."""

    @abc.abstractmethod
    def sample(self, key: PRNGKeyArray, fetched: Any = None) -> "Objective":
        """The same objective on a random minibatch of its examples (drawn with replacement, so both value and gradient
        are unbiased), or itself when it has no batch size. `fetched` are the examples that belong to this key, where
        `fetching` has read them."""

    @property
    def fetched_bytes(self) -> int:
        """What `fetching` reads for one step of one restart: nothing unless a subclass says otherwise."""
        return 0

    def fetching(self, keys: PRNGKeyArray, devices: Devices) -> Callable[[], Any]:
        """A function that reads the examples that `sample` takes with each of these keys, `[restarts, steps]`. It may
        run in any thread."""
        return lambda: None

    def spread(self, devices: Devices) -> "Objective":
        """The same objective with its examples spread over the devices of a mesh; to be used within `devices.map`.
        Unless a subclass says otherwise, every device computes all of it."""
        return self

    @abc.abstractmethod
    def thinned(self, examples: int) -> "Objective":
        """The same objective on at most so many of its examples, evenly spaced, normalised as on all of them."""

    @property
    @abc.abstractmethod
    def batch_share(self) -> float:
        """The share of the examples that `sample` draws: what a step costs, relative to `value` on all of them."""

    @property
    def work(self) -> float:
        """What `value` on all examples costs, in a unit that objectives of one kind on other examples share."""
        return 1.0

    @abc.abstractmethod
    def with_eps(self, eps: float | Array) -> "Objective":
        """The same objective with the measure's scale replaced."""


def add_grads(a: Bases, b: Bases) -> Bases:
    return {name: a[name] + b[name] if name in a and name in b else {**a, **b}[name] for name in {**a, **b}}
