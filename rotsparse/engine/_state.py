"""`FitState`: the state of a stepwise fit, which together with settings and data determines its continuation."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rotsparse._core.orthogonal import worst_error
from rotsparse.data.devices import Devices
from rotsparse.engine.history import History

# The rotations of all restarts, by the name of the space.
Stacked = dict[str, Float[Array, "restarts _ _"]]

# Rotations with a larger entry of |RRᵀ - I| are neither saved nor loaded.
NOT_ORTHOGONAL = 1e-3


class FitState(eqx.Module):
    """The state of a fit. The first axis of most arrays is `restarts`. Arrays that steps change are on the device;
    records, with room for the whole run, are NumPy arrays on the host.

    `objective[:, :step]` and `checked[:, :checks]` are the history so far (see `History`). `best` holds the rotations
    with the lowest checked value of each restart. `seconds` counts the running time, earlier sessions included.
    """

    bases: Stacked
    method: Any
    best: Stacked
    step: Int[np.ndarray, ""]
    best_values: Float[np.ndarray, "restarts"]
    best_step: Int[np.ndarray, "restarts"]
    objective: Float[np.ndarray, "restarts steps"]
    checks: Int[np.ndarray, ""]
    checked_at: Int[np.ndarray, "checks"]
    checked: Float[np.ndarray, "restarts checks"]
    seconds: Float[np.ndarray, ""]

    @classmethod
    def first(cls, method: Any, starts: Stacked, checks: int, devices: Devices) -> "FitState":
        """The state before the first step of a method, with room for `checks` checks."""
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
        """Add a check: `values` is the objective at the current rotations. They become `best` where they are the lowest
        of their restart."""
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
        """The lowest objective of all restarts at the last check; infinite if all are NaN."""
        return float(np.nanmin(self.last_check, initial=np.inf))

    @property
    def orthogonality_error(self) -> float:
        """The largest entry of `|RRᵀ - I|` over all rotations."""
        return worst_error(self.bases)

    def unsound(self) -> str:
        """What is wrong with the state; an empty text if nothing is."""
        error = max(worst_error(self.bases), worst_error(self.best))
        return "" if error < NOT_ORTHOGONAL else f"its rotations are not orthogonal: |RRᵀ - I| = {error:.1e}"
