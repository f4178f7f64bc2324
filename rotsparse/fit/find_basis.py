"""`find_basis`: a rotation in which a space's activations are sparse.

Activations that hide a sharp basis and those of trained networks are different problems, as with Jacobians. Where there
is one sharp basis, the fixed point and quasi-Newton steps of `fit_activations` find it from anywhere in a fraction of
the time. In trained networks good optima are many, and what escapes the poor ones is annealing. Nobody knows beforehand
which case it is, so both run, and the lower objective wins.
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from rotsparse._core import checks
from rotsparse._core.interrupt import Interrupted
from rotsparse._core.orthogonal import matmul
from rotsparse._core.types import Data
from rotsparse.data.sources import whole
from rotsparse.fit._checkpoint import Checkpoints
from rotsparse.fit._log import RunLog
from rotsparse.fit.minimize import STEPS, minimize
from rotsparse.fit.solution import Result, Solution
from rotsparse.objectives import ActivationSparsity, Bases
from rotsparse.objectives.measures import GemanMcClure, Measure, TopK
from rotsparse.solvers import Annealing
from rotsparse.solvers.fixed_point import FixedPoint, top_k
from rotsparse.solvers.fixed_point_newton import fit_activations

# Examples a step. An example is one row here, not a matrix: more are needed for a gradient of the same quality.
BATCH_SIZE = 256

# What TopK is annealed on at first, and the first angle on TopK itself.
SMOOTH = GemanMcClure(0.6)
SMALL_ANGLE = 0.1

# Steps of the power method after annealing.
RAISES = 60

SPACE = "x"

# How a part of a fit ends that nothing may follow.
BROKEN_OFF = (Result.INTERRUPTED, Result.NON_FINITE)

# What full-batch steps are called, what they found, and how they ended.
Part = tuple[str, Array, Result]


def find_basis(
    x: Float[Data, "n d"],
    *,
    key: PRNGKeyArray,
    measure: Measure = TopK(0.5),  # noqa: B008 (immutable)
    start: Float[Data, "d d"] | None = None,
    restarts: int = 1,
    steps: int = STEPS,
    batch_size: int = BATCH_SIZE,
    validation: Float[Data, "m d"] | None = None,
    progress: bool = False,
    checkpoint: Checkpoints | str | os.PathLike | None = None,
    log: RunLog | str | os.PathLike | None = None,
) -> Solution:
    """The rotation R, `solution.bases["x"]`, that makes activations sparse: minimises `E_x mean_i S(z_i)`,
    `z = R x / rms(x)`.

    - `x`: activations, `[n, d]`: a layer's inputs, or `layer(x)` for its outputs. Not centred: to skip a coordinate is
      to set it to zero.
    - `measure`: the default is the share of the energy that is lost when each example keeps the larger half of its
      coordinates, which is what a matrix product that skips the others loses; `TopK(0.3)` keeps 30%. To find out which
      directions there *are*, take a sharp measure that is not told how many, such as `Log(0.1)`.
    - `start`: where the first restart begins (default: the neurons), the others begin at Haar-random rotations.
      `validation`: held-out activations; when given, the best step, restart and method are chosen on them.
    - `steps` of annealing, with `batch_size` examples each; for `TopK` the first half on a smooth measure
      (`GemanMcClure(0.6)`), whose gradient every coordinate feels, and the second at small angles on `TopK` itself.
      Then full-batch steps that only descend: for `TopK` the power method, from where annealing ended and from the
      principal components; for other measures `fit_activations`, from there and from a random start. What is lower
      stays.

    Returns a `Solution`, never one that is worse, by what it is chosen on, than its start; its `certificate` says what
    each part reached. Same key and inputs, same bits on the same machine. Raises `ValueError` for activations that are
    not finite floats `[n, d]` or no array, and a start or validation data that do not fit them.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size should be at least 1, got {batch_size}")
    objective = ActivationSparsity(whole("x", x), measure, space=SPACE, batch_size=batch_size)
    d, dtype = objective.x.shape[1], objective.x.dtype
    first = jnp.eye(d, dtype=dtype) if start is None else jnp.asarray(checks.orthogonal("start", start, d), dtype)
    held_out = None if validation is None else objective.on(checks.activations("validation", validation, d))
    options: dict[str, Any] = {"key": key, "validation": held_out, "progress": progress}
    start_bases = {SPACE: first}
    if isinstance(measure, TopK):
        solution = _anneal_twice(objective, start_bases, restarts, steps, checkpoint, log, options)
    else:
        options |= {"restarts": restarts, "steps": steps, "checkpoint": checkpoint, "log": log}
        solution = minimize(objective, start_bases, **options)
    if solution.result not in BROKEN_OFF:
        solution = _finished(solution, objective, held_out, jax.random.fold_in(key, 2))
    return _judged(solution, start_bases, objective, held_out)


def _finished(solution: Solution, objective: ActivationSparsity, held_out, key) -> Solution:
    """With the full-batch steps that follow annealing; the certificate says what each part reached."""
    finish = _raise_largest if isinstance(objective.measure, TopK) else _fixed_point
    annealed, said = float(np.min(solution.candidate_values)), []
    result = solution.result
    try:
        for name, found, result in finish(objective, solution.bases[SPACE], held_out, key):
            before = float(np.min(solution.candidate_values))
            solution = solution.improved({SPACE: found}, objective, held_out, "")
            reached = float(np.min(solution.candidate_values))
            said += [f"{name} {reached:.6g}"] if reached < before else []
            if result in BROKEN_OFF:
                break
    except Interrupted:
        raise
    except KeyboardInterrupt:
        result = Result.INTERRUPTED
    said = ", ".join([f"annealing reached {annealed:.6g}", *said])
    return dataclasses.replace(solution, result=result, certificate=said)


def _judged(solution: Solution, start: Bases, objective: ActivationSparsity, held_out) -> Solution:
    """The solution of all parts with the result of the whole; the start where nothing better was found."""
    reached, begun = _values(held_out or objective, (solution.bases, start))
    result = Result.ALL_STEPS if reached < begun else Result.NO_IMPROVEMENT
    if result is Result.NO_IMPROVEMENT:
        solution = solution.replaced(start, float(begun), objective, held_out)
        solution = dataclasses.replace(solution, start_value=solution.value)
    return solution if solution.result in BROKEN_OFF else dataclasses.replace(solution, result=result)


def _values(objective: ActivationSparsity, candidates: Iterable[Bases]) -> Float[np.ndarray, "candidates"]:
    """The objective of each, all by one program, so that equal rotations have equal values; infinite instead of NaN."""
    value = eqx.filter_jit(objective.value)
    values = np.array([float(value(bases)) for bases in candidates])
    return np.where(np.isnan(values), np.inf, values)


def _anneal_twice(objective, start, restarts: int, steps: int, checkpoint, log, options: dict[str, Any]) -> Solution:
    """Half of the steps on a smooth measure, then each restart by itself at small angles on the objective."""

    def part(of, kind, i):
        return None if of is None else kind.of(of).part(f"{i}")

    def run(objective, start, i, **more):
        places = {"checkpoint": part(checkpoint, Checkpoints, i), "log": part(log, RunLog, i)}
        return minimize(objective, start, **{**options, **places, **more})

    held_out = options["validation"]
    smooth = ActivationSparsity(objective.x, SMOOTH, space=SPACE, batch_size=objective.batch_size)
    smooth_held_out = None if held_out is None else smooth.on(held_out.x)
    rough = run(smooth, start, 0, steps=-(-steps // 2), restarts=restarts, validation=smooth_held_out)
    fine = []
    for i, candidate in enumerate(() if rough.result in BROKEN_OFF else rough.candidates, start=1):
        fine.append(run(objective, candidate, i, steps=max(1, steps // 2), solver=Annealing(SMALL_ANGLE)))
        if fine[-1].result in BROKEN_OFF:
            break
    candidates = tuple(solution.bases for solution in fine) if fine else rough.candidates
    values = _values(held_out or objective, candidates)
    best = int(np.argmin(values))
    parts, of_best = [rough, *fine], fine[best] if fine else rough
    solution = dataclasses.replace(
        of_best,
        result=parts[-1].result,
        detail="; ".join(part.detail for part in parts if part.detail),
        start_value=float(_values(objective, [start])[0]),
        candidates=candidates,
        candidate_values=values,
        stats=of_best.stats | {"restart": best, "seconds": sum(part.stats["seconds"] for part in parts)},
    )
    return solution.replaced(candidates[best], float(values[best]), objective, held_out)


def _raise_largest(objective: ActivationSparsity, annealed, held_out, key) -> Iterator[Part]:
    """Steps that can only raise the energy of the largest coordinates, from where annealing ended, whose minibatches
    leave it a little above, and from the principal components, where few directions hold most of the energy."""
    _, components = np.linalg.eigh(np.asarray(matmul(objective.x.T, objective.x), np.float64))
    starts = {"": annealed, " from principal components": jnp.asarray(components.T[::-1], annealed.dtype)}
    measure = cast(TopK, objective.measure)
    solver = FixedPoint(top_k(measure.count(objective.x.shape[1])))
    everything = objective.on(objective.x)  # without minibatches
    options: dict[str, Any] = {"key": key, "solver": solver, "steps": RAISES, "validation": held_out}
    for name, start in starts.items():
        solution = minimize(everything, {SPACE: start}, **options)
        yield f"power steps{name}", solution.bases[SPACE], solution.result


def _fixed_point(objective: ActivationSparsity, annealed, held_out, key) -> Iterator[Part]:
    """`fit_activations` from where annealing ended and from a random start."""
    validation = None if held_out is None else held_out.x
    options: dict[str, Any] = {"measure": objective.measure, "start": annealed, "validation": validation, "restarts": 2}
    found, _ = fit_activations(objective.x, key=key, **options)
    yield "fixed point and quasi-Newton steps", found, Result.ALL_STEPS
