"""`find_rotations`: fit the rotations of one layer. `minimize`: the driver beneath it, for any objective.

The driver runs chunks of jitted steps, all restarts at once (vmapped). Between chunks, in plain Python, it looks at the
objective, keeps the best rotations of every restart, reports progress and decides whether to stop.
"""

import itertools
import math
import time
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, PRNGKeyArray

from rotsparse import checks, pairs
from rotsparse.checks import Data
from rotsparse.layers import Layer
from rotsparse.measures import Log, Measure
from rotsparse.objectives import Bases, Held, JacobianSparsity, Objective
from rotsparse.orthogonal import haar, orthogonality_error
from rotsparse.progress import Progress
from rotsparse.refine import refine
from rotsparse.rotations import Rotations
from rotsparse.solution import History, Result, Solution
from rotsparse.solvers import Annealing, Solver
from rotsparse.subspace import ActiveSubspace

# A run is cut into about this many chunks, of at least MIN_CHUNK steps.
CHUNKS = 40
MIN_CHUNK = 20

# Judging on all examples may cost this share of what the steps cost.
CHECKING = 0.25

# Pair searches look at so many examples, and at spaces of so many entries of the Jacobian: minutes at most.
SEARCH_EXAMPLES = 512
LARGEST_SEARCH = 2**16

# What annealing takes unless told otherwise: many cheap, noisy steps.
BATCH_SIZE = 16
STEPS = 4000


def find_rotations(
    layer: Layer,
    x: Float[Data, "n d_in"],
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
    validation: Float[Data, "n d_in"] | None = None,
    patience: int | None = None,
    progress: bool = False,
) -> Solution:
    """Rotations of the layer's inputs and outputs in which its per-example Jacobians are sparse.

    Minimises `E_x mean S(z)` over orthogonal `R_in`, `R_out`, where z are the entries of `R_out J(x) R_inᵀ`, each
    column multiplied by the standard deviation of its rotated input (`scale_inputs`), divided by their root mean
    square.

    - `x`: the layer's inputs, `[n, d_in]`. `validation`: held-out inputs; when given, the best step and the best
      restart are chosen on them.
    - `measure`: the sparsity measure S. `tie`: one rotation for both sides (a residual stream). `hold`: sides ("in",
      "out") that stay as they start.
    - `start`: where the first restart begins (default: the neuron basis); the others begin at Haar-random rotations.
    - `active_subspace`: when given (e.g. 0.999), only directions that hold this share of the variance of inputs and of
      outputs are rotated, starting from their principal components. Where the variance sits in few directions this is
      much faster and finds better optima.
    - `solver`: by default `Annealing()` (large steps that shrink, along noisy gradients; more `steps` find better
      optima), followed by searches over pairs of directions for as long as they pay, and the certificate that they
      leave (see `refine`; layers of more than 256×256 go without). `Riemannian(optax.adam(0.1))` takes any optax
      optimiser.
    - `batch_size`: examples a step. By default 16 for annealing, which wants that noise, and all for other solvers.
    - `patience`: stop after this many steps without improvement (default: never).
    - `key`: same key and inputs, same bits on the same machine.

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
    objective = JacobianSparsity(
        layer, x, measure, scale_inputs=scale_inputs, space_out=space_out, batch_size=batch_size
    )
    held_out = None if validation is None else objective.on(checks.activations("validation", validation, layer.d_in))
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
    options |= {"patience": patience, "progress": progress}
    fit = _anneal_and_refine if complete else minimize
    if active_subspace is None:
        if not hold:
            return fit(objective, first, validation=held_out, **options)
        held = {name: first[name] for name in hold}
        free_held_out = None if held_out is None else Held(held_out, held)
        solution = fit(Held(objective, held), first, validation=free_held_out, **options)
        return solution.extended(lambda bases: held | bases, objective, held_out)
    if start is not None or tie or hold:
        raise ValueError("active_subspace starts from principal components: it goes with neither start, tie nor hold")
    subspace = ActiveSubspace(layer, objective.x, active_subspace)
    small, small_held_out = subspace.restrict(objective), None if held_out is None else subspace.restrict(held_out)
    components = {name: jnp.eye(d, dtype=dtype) for name, d in small.spaces.items()}
    solution = fit(small, components, validation=small_held_out, **options)
    return solution.extended(subspace.lift, objective, held_out)


def _anneal_and_refine(objective, start, *, validation, key, steps, **options) -> Solution:
    """`minimize`, then `refine`: the whole default strategy."""
    solution = minimize(objective, start, validation=validation, key=key, steps=steps, **options)
    entries = math.prod(solution.bases[name].shape[0] for name in solution.bases)
    if pairs.obstacle(objective) is not None or entries > LARGEST_SEARCH or solution.result is not Result.ALL_STEPS:
        return solution
    polish_key = jax.random.fold_in(key, 2)

    def polish(bases):
        return minimize(objective, bases, key=polish_key, solver=Annealing(angle=0.1), steps=-(-steps // 4)).bases

    refined = refine(objective.thinned(SEARCH_EXAMPLES), solution.bases, polish)
    return solution.improved(refined.bases, objective, validation, str(refined))


def minimize(
    objective: Objective,
    start: Bases,
    *,
    key: PRNGKeyArray,
    solver: Solver | None = None,
    steps: int = STEPS,
    restarts: int = 1,
    validation: Objective | None = None,
    patience: int | None = None,
    progress: bool = False,
) -> Solution:
    """Minimise any objective over the rotations of its spaces. See `find_rotations` for the arguments; `start` holds
    one orthogonal matrix for every space, and `validation` is the same objective on other examples."""
    for name, value in {"steps": steps, "restarts": restarts, "patience": patience}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} should be at least 1, got {value}")
    solver = Annealing() if solver is None else solver
    if patience is not None and isinstance(solver, Annealing):
        raise ValueError(
            "annealing improves most near its end, so patience would stop it early: take fewer steps instead"
        )
    spaces = objective.spaces
    if not spaces:
        raise ValueError("nothing to optimise: every space is held fixed")
    start = {name: start[name] for name in spaces}
    bases = starts = _starts(start, restarts, jax.random.fold_in(key, 0))
    state = jax.vmap(solver.init)(bases)
    keys = jax.random.split(jax.random.fold_in(key, 1), restarts)
    judge = objective if validation is None else validation
    chunk = min(steps, max(MIN_CHUNK, -(-steps // CHUNKS)))
    # Chunks from one check to the next. A value costs half of a value with its gradient.
    checks_every = math.ceil(0.5 / (CHECKING * chunk * objective.batch_share))

    begun = time.perf_counter()
    at = [jnp.asarray(step) for step in (*range(0, steps, chunk), steps)]  # arrays, so that the bounds are traced
    run = _run_chunk.lower(solver, objective, bases, state, keys, at[0], at[1], chunk, steps).compile()
    judged = _values.lower(judge, bases).compile()
    compile_seconds = time.perf_counter() - begun

    values = np.asarray(judged(judge, bases))
    checked, checked_at, objectives = [values], [0], []
    best, best_values, best_step = bases, values, np.zeros(restarts, int)
    done, result, detail = 0, Result.ALL_STEPS, ""

    def check():
        """Judge the current rotations, and keep those that are the best of their restart so far."""
        nonlocal best, best_values, best_step
        values = np.asarray(judged(judge, bases))
        checked.append(values)
        checked_at.append(done)
        better = values < best_values  # False for NaN
        best = jax.tree.map(lambda new, old: jnp.where(better[:, None, None], new, old), bases, best)
        best_values = np.where(better, values, best_values)
        best_step = np.where(better, done, best_step)
        return np.isfinite(values).all()

    with Progress(steps, enabled=progress) as bar:
        try:
            for i, (begin, end) in enumerate(itertools.pairwise(at), start=1):
                moved, moved_state, history = run(solver, objective, bases, state, keys, begin, end, chunk, steps)
                history = np.asarray(history)[:, : int(end) - done]
                objectives.append(history)
                if not np.isfinite(history).all():
                    result, detail = Result.NON_FINITE, _where(history, done)
                    break
                bases, state, done = moved, moved_state, int(end)
                if (i % checks_every == 0 or done == steps) and not check():
                    result, detail = Result.NON_FINITE, f"the objective on all examples, after step {done}"
                    break
                bar.update(done, objective=history.mean(axis=1).min(), error=_worst_error(bases))
                if patience is not None and done - best_step.max() >= patience:
                    result = Result.CONVERGED
                    break
        except KeyboardInterrupt:
            result = Result.INTERRUPTED
        if checked_at[-1] != done:
            check()
    seconds = time.perf_counter() - begun

    # A start that is itself not finite cannot be chosen; if no restart is, there is nothing to return.
    chosen = int(np.nanargmin(best_values)) if np.isfinite(best_values).any() else 0
    if result in (Result.ALL_STEPS, Result.CONVERGED) and best_step[chosen] == 0:
        result = Result.NO_IMPROVEMENT
    candidates = tuple(jax.tree.map(lambda r, i=i: r[i], best) for i in range(restarts))
    bases = candidates[chosen]
    value, grads = _value_and_grad(objective, bases)
    start_values = checked[0] if validation is None else np.asarray(_values(objective, starts))
    return Solution(
        bases=bases,
        result=result,
        detail=detail,
        value=float(value),
        start_value=float(start_values[chosen]),
        validation_value=None if validation is None else float(best_values[chosen]),
        history=History(
            np.concatenate(objectives, axis=1) if objectives else np.zeros((restarts, 0)),
            np.asarray(checked_at),
            np.stack(checked, axis=1),
        ),
        candidates=candidates,
        candidate_values=best_values,
        stats={
            "steps": done,
            "best_step": int(best_step[chosen]),
            "restart": chosen,
            "seconds": seconds,
            "compile_seconds": compile_seconds,
            "gradient_norm": float(optax.tree.norm(grads)),
            "orthogonality_error": _worst_error(bases),
        },
    )


@eqx.filter_jit
def _run_chunk(solver, objective, bases, state, keys, begin, end, chunk: int, steps: int):
    """Steps `begin` to `end` of every restart. The bounds are traced, so one compilation serves the whole run."""

    def run(bases, state, key):
        def body(i, carry):
            bases, state, history = carry
            batch = objective.sample(jax.random.fold_in(key, i))
            bases, state, value = solver.step(batch, bases, state, i, steps)
            return bases, state, history.at[i - begin].set(value)

        history = jnp.zeros(chunk, jax.tree.leaves(bases)[0].dtype)
        return jax.lax.fori_loop(begin, end, body, (bases, state, history))

    return jax.vmap(run)(bases, state, keys)


@eqx.filter_jit
def _values(objective, bases):
    """The objective of every restart, one after the other."""
    return jax.lax.map(objective.value, bases)


@eqx.filter_jit
def _value_and_grad(objective, bases):
    return objective.value_and_grad(bases)


def _starts(start: Bases, restarts: int, key: PRNGKeyArray) -> Bases:
    """`start`, then Haar-random rotations, stacked along a new first axis."""
    stacked = {}
    for i, (name, r) in enumerate(start.items()):
        keys = jax.random.split(jax.random.fold_in(key, i), restarts)
        stacked[name] = jnp.stack([r, *(haar(k, r.shape[0], r.dtype) for k in keys[1:])])
    return stacked


def _worst_error(bases: Bases) -> float:
    return max(float(jnp.max(orthogonality_error(r))) for r in bases.values())


def _where(history, done):
    """Where a run went wrong, in words."""
    restart, step = min(map(tuple, np.argwhere(~np.isfinite(history))), key=lambda at: at[1])
    return f"the objective at step {done + step}, restart {restart}"
