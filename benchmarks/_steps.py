"""Steps of a method, timed on the device."""

import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rotsparse._core.orthogonal import exact_error
from rotsparse.objectives.base import Objective, sampled
from rotsparse.solvers.anneal import Anneal


def timed(objective: Objective, method: Anneal, steps: Sequence[int]) -> dict[str, float]:
    """Take these steps from the neurons. Returns the median seconds of a step without the first two, the seconds of
    compiling, the largest entry of `|RRᵀ - I|` at the end, and the most memory of the device so far, in bytes."""
    bases = {name: jnp.eye(d) for name, d in objective.spaces.items()}

    @jax.jit
    def program(objective, bases, state, i):
        drawn = sampled(objective, jax.random.fold_in(jax.random.key(0), i), method.batch_size)
        return method.step(drawn, bases, state, i)

    state, seconds = method.init(bases), []
    begun = time.perf_counter()
    compiled = program.lower(objective, bases, state, jnp.asarray(0)).compile()
    compile_seconds = time.perf_counter() - begun
    for i in steps:
        begun = time.perf_counter()
        bases, state, _ = jax.block_until_ready(compiled(objective, bases, state, jnp.asarray(i)))
        seconds.append(time.perf_counter() - begun)
    memory = jax.devices()[0].memory_stats() or {}
    return {
        "seconds": float(np.median(seconds[2:])),
        "orthogonality_error": max(map(exact_error, bases.values())),
        "peak_bytes": memory.get("peak_bytes_in_use", 0),
        "compile_seconds": compile_seconds,
    }
