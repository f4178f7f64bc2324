"""Interventions on named directions, for `run` and `generate`: change the coordinates along some directions at a point
of the network, and leave everything across them as it is.

    intervene = {(4, "output"): Ablate(r_out[[17]])}                    # direction 17 of the outputs of layer 4
    logits, _ = models.run(model.params, model.config, tokens, intervene=intervene)

An intervention maps the values at a point, `[batch, tokens, d]`, to `x + (z' - z) D`, with the rows of `D` the
directions (orthonormal) and `z = x Dᵀ`. They are pytrees: under `jax.jit` other directions or amounts compile nothing
anew.
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PRNGKeyArray

from rotsparse._core.precision import full_precision
from rotsparse._core.types import AnyArray

Directions = Float[AnyArray, "k d"]


class Along(eqx.Module):
    """A change of the coordinates along some directions. Raises `ValueError` unless they are orthonormal rows."""

    directions: Directions

    def __check_init__(self):
        d = self.directions
        if len(np.shape(d)) != 2:
            raise ValueError(f"directions should be rows [k, d], got {list(np.shape(d))}: of one take r[[17]]")
        if not isinstance(d, Tracer):
            error = np.abs(np.asarray(d, np.float64) @ np.asarray(d, np.float64).T - np.eye(len(d))).max()
            if not error < 1e-3:
                raise ValueError(f"directions should be orthonormal: |D Dᵀ - I| is up to {error:.2g}")

    @abc.abstractmethod
    def changed(self, z: Float[Array, "batch tokens k"]) -> Float[Array, "batch tokens k"]:
        """The new coordinates."""

    def __call__(self, x: Float[Array, "batch tokens d"]) -> Float[Array, "batch tokens d"]:
        directions = jnp.asarray(self.directions, x.dtype)
        with full_precision():
            z = x @ directions.T
            return x + (self.changed(z) - z) @ directions


class Ablate(Along):
    """Hold the coordinates at a value, `[k]`: zero, or their mean over some text."""

    to: Float[AnyArray, "k"] | float = 0.0

    def changed(self, z):
        return jnp.broadcast_to(jnp.asarray(self.to, z.dtype), z.shape)


class Clamp(Along):
    """Hold the coordinates between two values, each `[k]` or one for all."""

    low: Float[AnyArray, "k"] | float = -jnp.inf
    high: Float[AnyArray, "k"] | float = jnp.inf

    def changed(self, z):
        return jnp.clip(z, jnp.asarray(self.low, z.dtype), jnp.asarray(self.high, z.dtype))


class Steer(Along):
    """Add an amount to the coordinates, `[k]` or one for all."""

    by: Float[AnyArray, "k"] | float = 1.0

    def changed(self, z):
        return z + jnp.asarray(self.by, z.dtype)


class Resample(Along):
    """Replace the coordinates at every token by those at another one, drawn by the key (a permutation of all tokens of
    the batch: all directions together)."""

    key: PRNGKeyArray = eqx.field(default_factory=lambda: jax.random.key(0))

    def changed(self, z):
        return jax.random.permutation(self.key, z.reshape(-1, z.shape[-1])).reshape(z.shape)


class Swap(Along):
    """Exchange the coordinates of two prompts: the first half of the batch with the second. Raises `ValueError` for a
    batch of an odd number."""

    def changed(self, z):
        if len(z) % 2:
            raise ValueError(f"a swap is between the halves of a batch: got {len(z)} prompts")
        return jnp.roll(z, len(z) // 2, axis=0)
