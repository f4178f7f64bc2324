"""`find_rotations`: fit the rotations of one layer."""

import contextlib
import dataclasses
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, PRNGKeyArray

from rotsparse._core import checks
from rotsparse._core.interrupt import Interrupted, handled, terminated
from rotsparse._core.types import Data
from rotsparse.data.moments import Moments, stream_moments
from rotsparse.data.sources import Source, as_source, in_memory
from rotsparse.fit._checkpoint import Checkpoints
from rotsparse.fit._log import RunLog
from rotsparse.fit.active_subspace import ActiveSubspace
from rotsparse.fit.minimize import STEPS, minimize
from rotsparse.fit.solution import Result, Solution
from rotsparse.layers.base import Layer
from rotsparse.layers.rotations import Rotations
from rotsparse.objectives import Held, JacobianSparsity
from rotsparse.objectives.measures import Log, Measure
from rotsparse.solvers import Annealing, Solver, pair_search
from rotsparse.solvers.refine import refine

# Pair searches look at so many examples, and at spaces of so many entries of the Jacobian: minutes at most.
SEARCH_EXAMPLES = 512
LARGEST_SEARCH = 2**16

# Of matrix products, by JAX's names: float32 in full, its 10-bit and its 7-bit mantissa on the units that have them.
PRECISIONS = ("highest", "tensorfloat32", "bfloat16")

# What annealing takes unless told otherwise: many cheap, noisy steps.
BATCH_SIZE = 16


def find_rotations(
    layer: Layer,
    x: Float[Data, "n d_in"] | Source,
    *,
    key: PRNGKeyArray,
    measure: Measure = Log(0.1),  # noqa: B008 (immutable)
    scale_inputs: bool = True,
    tie: bool = False,
    hold: Sequence[str] = (),
    active_subspace: float | None = None,
    start: Rotations | None = None,
    restarts: int = 1,
    solver: Solver | None = None,
    steps: int = STEPS,
    batch_size: int | None = None,
    part: tuple[int, int] | None = None,
    precision: str = "highest",
    validation: Float[Data, "n d_in"] | Source | None = None,
    patience: int | None = None,
    progress: bool = False,
    checkpoint: Checkpoints | str | os.PathLike | None = None,
    log: RunLog | str | os.PathLike | None = None,
    mesh: Mesh | None = None,
) -> Solution:
    """Rotations of the layer's inputs and outputs in which its per-example Jacobians are sparse.

    Minimises `E_x mean S(z)` over orthogonal `R_in`, `R_out`, where z are the entries of `R_out J(x) R_inᵀ`, each
    column multiplied by the standard deviation of its rotated input (`scale_inputs`), divided by their root mean
    square.

    - `x`: the layer's inputs, `[n, d_in]`. Where they do not fit into memory: a source (`open_source(path)`, a NumPy
      memory map, a `grain.MapDataset` of vectors), of which minibatches are read as they are needed; the covariance
      comes from one pass over it, and rotations are judged on a part (see `sources.py`). `validation`: held-out inputs;
      when given, the best step and the best restart are chosen on them (of a source, again on a part).
    - `measure`: the sparsity measure S. `tie`: one rotation for both sides (a residual stream). `hold`: sides ("in",
      "out") that stay as they start.
    - `start`: where the first restart begins (default: the neuron basis); the others begin at Haar-random rotations.
    - `active_subspace`: when given (e.g. 0.999), only directions that hold this share of the variance of inputs and of
      outputs are rotated, starting from their principal components. Where the variance sits in few directions this is
      much faster and finds better optima. The solution's values are those of the entries between these directions.
    - `solver`: by default `Annealing()` (large steps that shrink, along noisy gradients; more `steps` find better
      optima), followed by searches over pairs of directions for as long as they pay, and the certificate that they
      leave (see `refine`; layers of more than 256×256 go without). `Riemannian(optax.adam(0.1))` takes any optax
      optimiser.
    - `batch_size`: examples a step. By default 16 for annealing, which wants that noise, and all for other solvers.
      `part=(s, t)`: a step sees s rows and t columns of each Jacobian, drawn anew each time; for layers so wide that a
      step on one example is too long (before that, take fewer examples: docs/scaling.md).
    - `precision`: of the large matrix products: "highest" (float32), "tensorfloat32" or "bfloat16". Rotations are
      orthogonalised in full precision whatever it is.
    - `patience`: stop after this many steps without improvement (default: never).
    - `key`: same key and inputs, same bits on the same machine.
    - `checkpoint`: a folder, or `Checkpoints(folder, every_minutes=...)`. The fit saves its state there, and one that
      was stopped, by whatever, goes on from there when it is called again: with the same bits as if it had never
      stopped. On SIGINT and SIGTERM it saves and returns `Result.INTERRUPTED`. (Without a checkpoint only SIGINT, which
      is Ctrl-C, does that; SIGTERM ends the process as usual.)
    - `mesh`: `device_mesh()` spreads the examples over all devices of all hosts, `device_mesh(restarts=2)` the restarts
      as well. The same examples are drawn as without.
    - `log`: a folder, or `RunLog(folder, tensorboard=True)`, for a log that is written as the fit runs.

    Returns a `Solution`; never one that is worse, by what it is chosen on, than its start. Raises `ValueError` for
    inputs that do not fit the layer, are not finite, or do not vary.
    """
    complete = solver is None  # a solver that was asked for by name runs alone
    solver = Annealing() if solver is None else solver
    if batch_size is None and isinstance(solver, Annealing):
        batch_size = BATCH_SIZE
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size should be at least 1, got {batch_size}")
    space_out = "in" if tie else "out"
    if precision not in PRECISIONS:
        raise ValueError(f"precision should be one of {', '.join(PRECISIONS)}, got {precision!r}")
    objective = JacobianSparsity(
        layer,
        x,
        measure,
        scale_inputs=scale_inputs,
        space_out=space_out,
        batch_size=batch_size,
        part=part,
        precision=precision,
        moments=kept_moments(x, checkpoint) if scale_inputs else None,
    )
    held_out = None
    if validation is not None:
        held_out = objective.on(checks.activations("validation", in_memory(validation)[0], layer.d_in))
    unknown = set(hold) - set(objective.spaces)
    if unknown:
        raise ValueError(f"hold names {sorted(unknown)}: expected some of {sorted(objective.spaces)}")
    if start is not None and (start.r_in.shape[0], start.r_out.shape[0]) != (layer.d_in, layer.d_out):
        raise ValueError(
            f"start has widths {start.r_in.shape[0]} and {start.r_out.shape[0]}, the layer {layer.d_in} and "
            f"{layer.d_out}"
        )
    if start is not None and tie and not np.array_equal(start.r_in, start.r_out):
        raise ValueError("a tied fit has one rotation: its start needs r_in and r_out to be equal")
    dtype = objective.x.dtype
    first = {name: jnp.eye(d, dtype=dtype) for name, d in objective.spaces.items()}
    if start is not None:
        first |= {"in": jnp.asarray(start.r_in, dtype), space_out: jnp.asarray(start.r_out, dtype)}

    options: dict[str, Any] = {"key": key, "restarts": restarts, "solver": solver, "steps": steps}
    options |= {"patience": patience, "progress": progress, "checkpoint": checkpoint, "log": log, "mesh": mesh}

    def strategy(layer):
        return _anneal_and_refine if complete and layer.d_in * layer.d_out <= LARGEST_SEARCH else minimize

    if active_subspace is None:
        fit = strategy(layer)
        if not hold:
            return fit(objective, first, validation=held_out, **options)
        held = {name: first[name] for name in hold}
        free_held_out = None if held_out is None else Held(held_out, held)
        return fit(Held(objective, held), first, validation=free_held_out, **options).lifted(lambda bases: held | bases)
    if start is not None or tie or hold:
        raise ValueError("active_subspace starts from principal components: it goes with neither start, tie nor hold")
    subspace = ActiveSubspace(layer, objective.x, active_subspace)
    small, small_held_out = subspace.restrict(objective), None if held_out is None else subspace.restrict(held_out)
    components = {name: jnp.eye(d, dtype=dtype) for name, d in small.spaces.items()}
    return strategy(small.layer)(small, components, validation=small_held_out, **options).lifted(subspace.lift)


def kept_moments(x, checkpoint, name: str = "moments") -> Moments | None:
    """The moments of a source, which are kept beside the checkpoints: the pass over it may take long, too. `None` where
    there are no checkpoints, or no source."""
    source = as_source(x)
    if source is None or checkpoint is None:
        return None
    folder = Path(Checkpoints.of(checkpoint).folder)
    folder.mkdir(parents=True, exist_ok=True)
    return stream_moments(source, folder / f"{name}.npz")


def _anneal_and_refine(objective, start, *, validation, key, steps, checkpoint, **options) -> Solution:
    """`minimize`, then `refine`: the whole default strategy."""
    solution = minimize(objective, start, validation=validation, key=key, steps=steps, checkpoint=checkpoint, **options)
    if pair_search.obstacle(objective) is not None or solution.result is not Result.ALL_STEPS:
        return solution
    polish_key = jax.random.fold_in(key, 2)

    def polish(bases):
        solver, count = Annealing(angle=0.1), -(-steps // 4)
        return minimize(objective, bases, key=polish_key, solver=solver, steps=count).completed().bases

    # As within `minimize`: with checkpoints, SIGTERM ends the fit and not the process.
    listening = contextlib.nullcontext() if checkpoint is None else handled(signal.SIGTERM, terminated)
    try:
        with listening:
            refined = refine(objective.thinned(SEARCH_EXAMPLES), solution.bases, polish)
    except KeyboardInterrupt as interruption:
        if isinstance(interruption, Interrupted) and checkpoint is None:
            raise
        return dataclasses.replace(solution, result=Result.INTERRUPTED, detail="in the pair searches")
    return solution.improved(refined.bases, objective, validation, str(refined))
