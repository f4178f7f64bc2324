"""`minimize`: run a method on any objective."""

import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from rotsparse._core.orthogonal import haar
from rotsparse.engine.method import Method, Problem
from rotsparse.engine.run import Run
from rotsparse.engine.solution import Solution
from rotsparse.objectives.base import Bases, Objective


def minimize(
    objective: Objective,
    start: Bases | None = None,
    *,
    method: Method,
    key: PRNGKeyArray,
    restarts: int = 1,
    validation: Objective | None = None,
    hints: Sequence[Bases] = (),
    run: Run | str | os.PathLike | None = None,
) -> Solution:
    """Minimise any objective over the rotations of its spaces.

    - `start`: an orthogonal matrix `[d, d]` for every space (default: the identity), from which the first restart
      begins; the others begin at Haar-random rotations.
    - `method`: such as `Anneal()`, `Riemannian(optax.adam(0.1))` or `Then(Anneal(), PairSearch())`.
    - `validation`: the same objective on other examples; the best step and the best restart are chosen on it.
    - `hints`: rotations that are known to be good starts, for methods that take them (`Hinted`).
    - `run`: folder for checkpoints and log, progress bar, devices (see `Run`); a path stands for `Run(path)`.

    The returned objective (on `validation`, if given) never exceeds the start's. The same key and inputs give the same
    bits on the same machine. Raises `ValueError` if the arguments do not fit each other.
    """
    if restarts < 1:
        raise ValueError(f"restarts should be at least 1, got {restarts}")
    spaces = objective.spaces
    if not spaces:
        raise ValueError("nothing to optimise: every space is held fixed")
    if start is None:
        dtype = objective.examples[0].x.dtype if objective.examples else float
        start = {name: jnp.eye(d, dtype=dtype) for name, d in spaces.items()}
    starts = _starts({name: start[name] for name in spaces}, restarts, jax.random.fold_in(key, 0))
    with Run.of(run).listening() as listening:
        return method.run(Problem(objective, validation, tuple(hints)), starts, key=key, run=listening)


def _starts(start: Bases, restarts: int, key: PRNGKeyArray) -> tuple[Bases, ...]:
    """`start`, then Haar-random rotations."""
    random = {}
    for i, (name, r) in enumerate(start.items()):
        keys = jax.random.split(jax.random.fold_in(key, i), restarts)
        random[name] = [r, *(haar(k, r.shape[0], r.dtype) for k in keys[1:])]
    return tuple({name: rs[i] for name, rs in random.items()} for i in range(restarts))
