"""What a solver is: a state, and a step. The driver in `driver.py` owns the loop, the restarts and the stopping."""

import abc
from typing import Any

import equinox as eqx
from jaxtyping import Array, Float, Int

from rotsparse.objectives import Bases, Objective


class Solver(eqx.Module):
    """Improves the rotations of an objective step by step. Both methods are pure and are traced under jit and vmap."""

    @abc.abstractmethod
    def init(self, bases: Bases) -> Any:
        """The solver's state before the first step: a pytree of arrays."""

    @abc.abstractmethod
    def step(
        self, objective: Objective, bases: Bases, state: Any, step: Int[Array, ""], steps: int
    ) -> tuple[Bases, Any, Float[Array, ""]]:
        """One step, number `step` of `steps`: the new rotations, the new state, and the objective *before* the step."""
