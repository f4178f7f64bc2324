"""The compiled parts of a stepwise fit: a slice of steps, and a check of the objective."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from rotsparse._core.types import AnyArray
from rotsparse.data.devices import Devices
from rotsparse.data.sources import read_ahead
from rotsparse.engine._state import FitState
from rotsparse.objectives.base import Objective, reading, sampled

_DISABLED = "jax_disable_jit"


class CompiledFit:
    """The compiled parts of a fit: `advance` takes steps, `judge` computes the objective on all examples. Examples that
    are not in memory are fetched one stretch at a time, those of the next stretch while the current one runs."""

    def __init__(self, method: Any, objective: Objective, judge, keys, state: FitState, stretch: int, devices: Devices):
        self.stretch, self.steps, self._batch_size = stretch, method.steps, method.batch_size
        self._fetches = any(e.fetched_bytes(method.batch_size) for e in objective.examples)
        self._objective, self._keys, self._devices = objective, keys, devices
        first = min(int(state.step), self.steps - 1) // stretch
        self._ahead = read_ahead(map(self._reading, range(first, -(-self.steps // stretch))))
        self._fetched_stretch, self._fetched = first, devices.batches(next(self._ahead))

        shared, judged_on = devices.replicate((method, objective)), devices.replicate(judge)
        self._shared, self._layout = shared, devices.layout((*shared, *self._bounds(0, 0)))
        self._placed_keys = devices.over_restarts(keys)
        self._judged_on, self._judged_layout = judged_on, devices.layout(judged_on)
        self._slice = _compiled(_run_slice, *self._slice_arguments(state, 0, 0))
        self._values = _compiled(values_of, devices, self._judged_layout, judged_on, state.bases)

    def advance(self, state: FitState, count: int) -> tuple[FitState, Float[np.ndarray, "restarts count"]]:
        """The state `count` steps later, and the objective before each of these steps, which must end within the
        current stretch."""
        done, end = int(state.step), int(state.step) + count
        assert done // self.stretch == (end - 1) // self.stretch
        if done // self.stretch != self._fetched_stretch:
            self._fetched_stretch += 1
            assert done // self.stretch == self._fetched_stretch
            self._fetched = self._devices.batches(next(self._ahead))
        bases, method_state, values = self._slice(*self._slice_arguments(state, done, end))
        values = np.asarray(self.gather(values))[:, :count]
        # In place, because entries after `step` are not part of the state yet.
        state.objective[:, done:end] = values
        return dataclasses.replace(state, bases=bases, method=method_state, step=np.asarray(end)), values

    def judge(self, state: FitState) -> FitState:
        """The state with a check of the objective added."""
        values = self._values(self._devices, self._judged_layout, self._judged_on, state.bases)
        return state.judged(np.asarray(self.gather(values)))

    def gather(self, values):
        """Gather arrays so that every process can read them."""
        return self._devices.gather(values)

    def close(self) -> None:
        """Stop fetching."""
        self._ahead.close()

    def _slice_arguments(self, state: FitState, begin: int, end: int) -> tuple:
        restarts = state.bases, state.method, self._placed_keys
        shared = *self._shared, *self._bounds(begin, end)
        return self._devices, self._layout, shared, restarts, self._fetched, self.stretch

    def _bounds(self, begin: int, end: int) -> tuple[Array, Array]:
        return self._devices.replicate((jnp.asarray(begin), jnp.asarray(end)))  # arrays, so that they are traced

    def _reading(self, index: int):
        """A function that reads the examples for all steps of a stretch."""
        if not self._fetches:
            return lambda: None
        steps = index * self.stretch + np.arange(self.stretch)
        return reading(self._objective, _step_keys(self._keys, steps), self._batch_size, self._devices)


def _compiled(function: Any, *arguments: Any) -> Any:
    """Compile the function for such arguments; under `jax_disable_jit`, return it unchanged."""
    return function if getattr(jax.config, _DISABLED) else function.lower(*arguments).compile()


@eqx.filter_jit
def _run_slice(devices: Devices, layout, shared, restarts, fetched, stretch: int):
    """Take steps `begin` to `end` of every restart, which lie in one stretch. The bounds are traced, so that one
    compilation serves the whole run. `fetched`: the examples of the whole stretch, if they are not in memory."""

    def run_all(shared, restarts, fetched):
        method, objective, begin, end = shared

        def run(bases, state, key, fetched):
            def body(i, carry):
                bases, state, history = carry
                i = jnp.asarray(i)  # a plain number under `jax_disable_jit`
                key_i = jax.random.fold_in(key, i)
                rows = None if fetched is None else jax.tree.map(lambda x: x[i % stretch], fetched)
                batch = sampled(objective, key_i, method.batch_size, method.submatrix, rows)
                bases, state, value = method.step(batch, bases, state, i)
                return bases, state, history.at[i - begin].set(value)

            history = jnp.zeros(stretch, jax.tree.leaves(bases)[0].dtype)
            return jax.lax.fori_loop(begin, end, body, (bases, state, history))

        bases, state, keys = restarts
        return jax.vmap(run)(bases, state, keys, fetched)

    return devices.map(run_all, layout, shared, restarts, fetched)


@jax.jit
def _step_keys(keys: Key[Array, "restarts"], steps: Int[AnyArray, "steps"]) -> Key[Array, "restarts steps"]:
    """The key of every step of every restart."""
    return jax.vmap(lambda key: jax.vmap(lambda i: jax.random.fold_in(key, i))(steps))(keys)


@eqx.filter_jit
def values_of(devices: Devices, layout, objective, bases):
    """The objective of every restart, computed one after another."""

    def values(objective, bases, _):
        return jax.lax.map(objective.value, bases)

    return devices.map(values, layout, objective, bases)
