"""`FitState`: with its settings and data, all that determines how a fit goes on."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from rotsparse._core.orthogonal import worst_error
from rotsparse.data.devices import Devices
from rotsparse.engine.history import History
from rotsparse.objectives.base import Bases

# Rotations that are further from orthogonal than this are neither saved nor loaded: something is wrong with them.
NOT_ORTHOGONAL = 1e-3


class FitState(eqx.Module):
    """Where a fit is. Arrays with a first axis `restarts`: on the device what the steps change, on the host (NumPy) the
    record, with room for the whole run.

    `objective[:, :step]` and `checked[:, :checks]` are the history so far (see `History`); `best` holds the rotations
    with the lowest checked value of every restart. `seconds` is how long the fit has been running, earlier sessions
    included.
    """

    bases: Bases
    method: Any
    best: Bases
    step: Int[np.ndarray, ""]
    best_values: Float[np.ndarray, "restarts"]
    best_step: Int[np.ndarray, "restarts"]
    objective: Float[np.ndarray, "restarts steps"]
    checks: Int[np.ndarray, ""]
    checked_at: Int[np.ndarray, "checks"]
    checked: Float[np.ndarray, "restarts checks"]
    seconds: Float[np.ndarray, ""]

    @classmethod
    def first(cls, method: Any, starts: Bases, checks: int, devices: Devices) -> "FitState":
        """The state before the first step of a method, with room for so many checks."""
        leaf = next(iter(starts.values()))
        restarts = len(leaf)
        return cls(
            bases=devices.over_restarts(starts),
            method=devices.over_restarts(jax.vmap(method.init)(starts)),
            best=devices.over_restarts(starts),
            step=np.asarray(0),
            best_values=np.full(restarts, np.inf, leaf.dtype),
            best_step=np.zeros(restarts, int),
            objective=np.zeros((restarts, method.steps), leaf.dtype),
            checks=np.asarray(0),
            checked_at=np.zeros(checks, int),
            checked=np.zeros((restarts, checks), leaf.dtype),
            seconds=np.asarray(0.0),
        )

    @property
    def history(self) -> History:
        step, checks = int(self.step), int(self.checks)
        return History(
            self.objective[:, :step].copy(), self.checked_at[:checks].copy(), self.checked[:, :checks].copy()
        )

    def judged(self, values: Float[np.ndarray, "restarts"]) -> "FitState":
        """With the objective at the current rotations, which are kept where they are the best of their restart."""
        step, checks = int(self.step), int(self.checks)
        checked_at, checked = self.checked_at.copy(), self.checked.copy()
        checked_at[checks], checked[:, checks] = step, values
        better = values < self.best_values  # False for NaN
        choose = lambda new, old: jnp.where(better[:, None, None], new, old)  # noqa: E731
        return dataclasses.replace(
            self,
            best=jax.tree.map(choose, self.bases, self.best),
            best_values=np.where(better, values, self.best_values),
            best_step=np.where(better, step, self.best_step),
            checks=np.asarray(checks + 1),
            checked_at=checked_at,
            checked=checked,
        )

    @property
    def last_check(self) -> Float[np.ndarray, "restarts"]:
        """The objective at the last check."""
        return self.checked[:, int(self.checks) - 1]

    @property
    def lowest(self) -> float:
        """The lowest restart's objective at the last check."""
        return float(np.nanmin(self.last_check, initial=np.inf))

    @property
    def orthogonality_error(self) -> float:
        """The largest entry of `|RRᵀ - I|` over all rotations."""
        return worst_error(self.bases)

    def unsound(self) -> str:
        """What is wrong with a state that cannot be a fit's, or an empty text."""
        error = max(worst_error(self.bases), worst_error(self.best))
        return "" if error < NOT_ORTHOGONAL else f"its rotations are not orthogonal: |RRᵀ - I| = {error:.1e}"
