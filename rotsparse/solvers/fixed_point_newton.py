"""Sparse activations, fast: fixed-point steps, then quasi-Newton steps while ε falls.

1. Fixed-point steps (`fixed_point.py`) at ε = 1 on a random subsample of 25·d and then 100·d examples: 10 to 40 steps
   lead from any start to near a sparse basis. One or two quasi-Newton steps (`quasi_newton.py`) follow.
2. Quasi-Newton steps on the 100·d examples while ε falls to its final value, one or two at each ε.
3. A few quasi-Newton steps on all examples at the final ε.

When quasi-Newton has converged on the subsample, the exact curvature of every pair of directions is computed once, and
pairs at a saddle are turned by 45°, or by less if that does not help. Without this about one fit in five keeps a mixed
pair. With validation data, stage 3 lowers ε in rungs and returns the rung that is best on them: a small ε fits noise.

All stages call one compiled function, a while loop around one evaluation of the moments. Examples are stored in equal
blocks, and each stage uses the first so many blocks.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from rotsparse._core.interrupt import Interrupted
from rotsparse._core.orthogonal import matmul
from rotsparse._core.precision import full_precision
from rotsparse.engine.history import History
from rotsparse.engine.method import Method
from rotsparse.engine.solution import Result, Solution, Stage, evidence, judged_value
from rotsparse.objectives.activation import ActivationSparsity
from rotsparse.objectives.measures import Measure
from rotsparse.solvers import quasi_newton
from rotsparse.solvers._rotated_moments import block_sums, check_objective
from rotsparse.solvers.fixed_point import project, shifted
from rotsparse.solvers.quasi_newton import Search

BLOCK = 2048  # examples per block: keeps matrix products busy and their results in the cache
SUBSAMPLES = (25, 100)  # examples per dimension in the first stages
STEPS = 60  # at most, per stage
START_EPS = 1.0
FALL = 0.3  # ε falls by this factor ...
SETTLED = 0.3  # ... once a step moves no direction's activations by more than this multiple of ε
LADDER = 3.0, 0.7  # first rung of the ladder of ε, and the ratio of neighbours
PATIENCE = 2  # the ladder ends after so many rungs that are worse on held-out data than the best so far


class _Blocks(NamedTuple):
    """Examples in random order, scaled to rms one, in equal blocks. The last ones are padded with zeros of weight
    zero."""

    x: Float[Array, "k m d"]
    weights: Float[Array, "k m"]


class _Run(NamedTuple):
    search: Search
    trial: Float[Array, "d d"]
    eps: Float[Array, ""]
    fresh: Array  # whether ε has changed since the last step
    steps: int | Int[Array, ""]
    done: Array

    @property
    def end(self) -> Float[Array, "d d"]:
        """Start of the next stage: the trial point if the stage converged, otherwise the best accepted point."""
        return self.trial if self.done else self.search.anchor


class FixedPointNewton(Method):
    """Find the rotation R that makes `z = R x / rms(x)` sparse: fixed-point steps at ε = 1, then quasi-Newton steps
    while ε falls to that of the measure. If the activations have one sharp basis, it finds that basis from any start,
    in a fraction of the time of other methods.

    With held-out examples the basis is fitted at several ε, from 3 down to a fifth of the measure's, and the one whose
    value *at the measure's ε* is lowest on them is returned. `random_starts`: number of Haar-random starts besides the
    given ones; the best result is returned. With fewer than about 20·d examples, more of them pay.

    Cost: about 40 evaluations on 25·d examples, 6 on 100·d and 2 on all, each `4·d²` flops per example. Memory: one
    copy of the examples. It takes fractions of a second and saves no checkpoints; if interrupted, it returns its start.

    Raises `ValueError` for objectives other than `ActivationSparsity`, for examples that are not in memory, and for a
    negative `random_starts`.
    """

    random_starts: int = eqx.field(static=True, default=0)

    def __check_init__(self):
        if self.random_starts < 0:
            raise ValueError(f"random_starts should not be negative, got {self.random_starts}")

    def run(self, problem, starts, *, key, run):
        begun = time.perf_counter()
        objective = check_objective(problem.objective)
        if objective.data.source is not None:
            raise ValueError(
                "every step looks at all examples, and these are too many for the memory: give an array, such as "
                "source.part(100_000)"
            )
        validation = None if problem.validation is None else check_objective(problem.validation)
        r = [start[objective.space] for start in starts]
        result = Result.ALL_STEPS
        try:
            with run.listening() as run:
                runs = _fit(objective, r, self.random_starts, validation, key, lambda: run.stopped)
        except Interrupted:
            raise
        except KeyboardInterrupt:
            run.stop()
            runs, result = [], Result.INTERRUPTED
        start = {objective.space: r[0]}
        candidates = [{objective.space: run.search.anchor} for run in runs]
        # `evidence` also gives the values: compiling a second program takes longer than a small fit.
        evidences = [evidence(objective, bases) for bases in [*candidates, start]]
        values = np.array([value for value, _ in evidences])
        values = np.where(np.isnan(values), np.inf, values)
        start_value = float(values[-1])
        if validation is not None:
            values = problem.judged([*candidates, start])
        improved = int(np.argmin(values)) < len(runs)
        if not improved:  # nothing is better than the start, which replaces the first candidate
            candidates, values = [start, *candidates[1:]], np.array([values[-1], *values[1:]])
            evidences[0] = evidences[-1]
            result = Result.NO_IMPROVEMENT if result is Result.ALL_STEPS else result
        begun_at, values = values[-1], values[: len(candidates)]
        best = int(np.argmin(values))
        bases, (value, evident) = candidates[best], evidences[best]
        stats = {"steps": sum(int(run.steps) for run in runs)}
        if improved:
            stats |= {"converged": bool(runs[best].done), "eps": float(runs[best].eps)}
        seconds = time.perf_counter() - begun
        return Solution(
            bases=bases,
            result=result,
            detail="",
            value=value,
            start_value=start_value,
            validation_value=None if validation is None else float(values[best]),
            history=History(np.zeros((1, 0)), np.array([0]), np.array([[begun_at]])),
            candidates=tuple(candidates),
            candidate_values=values,
            free={objective.space: np.ones(objective.x.shape[1], bool)},
            stages=(Stage(type(self).__name__, float(values[best]), result.name, seconds),),
            stats={**stats, "seconds": seconds, **evident},
        )


def _fit(
    objective: ActivationSparsity,
    given: list[Float[Array, "d d"]],
    random_starts: int,
    validation: ActivationSparsity | None,
    key: PRNGKeyArray,
    stopped: Callable[[], bool],
) -> list[_Run]:
    """The end of the run from every start. Raises `KeyboardInterrupt` if the fit is stopped."""
    x, measure = objective.x, objective.measure
    d = x.shape[1]
    # The order and the starts are drawn by NumPy: JAX's permutation and QR take longer to compile than a small fit
    # runs.
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
    with full_precision():
        blocks = _shuffled(x, rng)
        starts = [jnp.asarray(_haar(rng, d).astype(x.dtype)) for _ in range(len(given) + random_starts)]
        starts[: len(given)] = given
        runs = []
        for r in starts:
            if stopped():
                raise KeyboardInterrupt
            if validation is None:
                runs.append(_fall(blocks, r, measure))
            else:
                held_out = lambda run: judged_value(validation, {validation.space: run.search.anchor})  # noqa: E731
                runs.append(_climb_down(blocks, r, measure, held_out))
    return runs


def _match(blocks: _Blocks, r, measure: Measure) -> _Run:
    """Stage 1: fixed-point steps on growing subsamples, then quasi-Newton steps away from saddles, where these are
    slow."""
    steps, sizes = 0, _subsamples(blocks)
    for used, matching, tolerance in [*((size, True, 0.1) for size in sizes), (sizes[-1], False, 0.03)]:
        run = _descend(blocks, used, r, measure, START_EPS, START_EPS, matching, tolerance, STEPS, True)
        r, steps = run.end, steps + int(run.steps)
    return run._replace(steps=steps)


def _fall(blocks: _Blocks, r, measure: Measure) -> _Run:
    """All stages; returns the run at the final ε."""
    final = float(measure.eps)
    matched = _match(blocks, r, measure)
    largest = _subsamples(blocks)[-1]
    fallen = _descend(blocks, largest, matched.end, measure, max(START_EPS, final), final, False, SETTLED, STEPS, True)
    last = _finish(blocks, fallen.end, measure, final)
    return last._replace(steps=matched.steps + int(fallen.steps) + int(last.steps))


def _climb_down(blocks: _Blocks, r, measure: Measure, held_out: Callable[[_Run], float]) -> _Run:
    """Stage 1, then stage 3 at each rung of the ladder until `held_out` has risen for `PATIENCE` rungs, then stage 3 at
    the vertex of the parabola through the best rung and its neighbours. Returns the run with the lowest `held_out`."""
    first, ratio = LADDER
    last = float(measure.eps) / 5
    rungs = 1 + max(0, round(np.log(last / first) / np.log(ratio)))
    matched = _match(blocks, r, measure)
    runs, values, best = [], [], 0
    while len(runs) < min(rungs, best + PATIENCE + 1):
        r = runs[-1].search.anchor if runs else matched.end
        runs.append(_finish(blocks, r, measure, first * ratio ** len(runs)))
        values.append(held_out(runs[-1]))
        best = int(np.argmin(values))
    if 0 < best < len(runs) - 1:
        square, linear, _ = np.polyfit([-1, 0, 1], values[best - 1 : best + 2], 2)
        vertex = best - linear / (2 * square)
        runs.append(_finish(blocks, runs[best].search.anchor, measure, first * float(ratio**vertex)))
        values.append(held_out(runs[-1]))
    return runs[int(np.argmin(values))]._replace(steps=matched.steps + sum(int(run.steps) for run in runs))


def _finish(blocks: _Blocks, r, measure: Measure, eps: float) -> _Run:
    """Quasi-Newton steps on all examples until no direction moves by more than 0.3% of min(ε, 1)."""
    tolerance = 0.003 * min(1.0, 1.0 / eps)
    return _descend(blocks, len(blocks.x), r, measure, eps, eps, False, tolerance, STEPS, False)


@jax.jit
def _descend(blocks: _Blocks, used, r, measure: Measure, eps, final, matching, tolerance, max_steps, look) -> _Run:
    """One stage on the first `used` blocks from `r`: fixed-point steps at ε if `matching`, else quasi-Newton steps
    while ε falls to `final`. It ends when a step is shorter than `tolerance` times ε (if `matching`: than `tolerance`)
    and, with `look`, no pair of directions is at a saddle. No argument has a default, because a default would be
    compiled in as a constant, and the program compiled twice."""
    d = r.shape[0]
    eye, zero = jnp.eye(d, dtype=r.dtype), jnp.zeros((), jnp.int32)
    eps, final = jnp.asarray(eps, r.dtype), jnp.asarray(final, r.dtype)

    def body(run: _Run) -> _Run:
        # Not `with_eps`, which would turn float32 activations into float64 if double precision is on.
        scaled = eqx.tree_at(lambda m: m.eps, measure, run.eps)
        m = _over_blocks(blocks, used, lambda x, w: block_sums(x, w, run.trial, scaled))
        search = quasi_newton.advance(run.search, run.trial, m, run.fresh | matching)
        target = jnp.where(matching, shifted(m), eye + quasi_newton.tangent(search))
        trial = project(target, search.anchor)

        # The longest step of any direction, in multiples of ε (if `matching`: as it is).
        moved = jnp.max(jnp.linalg.norm(trial - search.anchor, axis=1)) / jnp.where(matching, 1, run.eps)
        accepted = search.failures == 0
        stuck = search.failures > quasi_newton.MAX_FAILURES
        last = run.eps <= final
        fall = ~last & (stuck | accepted & (moved < SETTLED))
        done = last & (stuck | accepted & (moved < tolerance))

        def exact():
            pairs = _over_blocks(blocks, used, lambda x, w: quasi_newton.pair_sums(x, w, search.anchor, scaled))
            return quasi_newton.escape(m, pairs)

        # These are the moments of the anchor only right after a step was accepted.
        away = jax.lax.cond(done & accepted & look & ~matching, exact, lambda: jnp.zeros_like(r))
        saddle = jnp.any(away != 0)
        search = search._replace(newton=jnp.where(saddle, away, search.newton))
        # The pairs are disjoint, so the rows of (I + Ω) R are orthogonal and need only be normalised.
        turned = search.anchor + matmul(away, search.anchor)
        trial = jnp.where(saddle, turned / jnp.linalg.norm(turned, axis=1, keepdims=True), trial)
        eps = jnp.where(fall, jnp.maximum(run.eps * FALL, final), run.eps)
        return _Run(search, trial, eps, fall, run.steps + 1, done & ~saddle)

    first = _Run(quasi_newton.start(r), r, eps, jnp.array(True), zero, jnp.array(False))
    return jax.lax.while_loop(lambda run: ~run.done & (run.steps < max_steps), body, first)


def _over_blocks(blocks: _Blocks, used, sums):
    """The mean over the examples of the first `used` blocks, from the sums over each block."""
    parts = jax.eval_shape(sums, blocks.x[0], blocks.weights[0])
    zeros = jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), parts)

    def body(i, total):
        return jax.tree.map(jnp.add, total, sums(blocks.x[i], blocks.weights[i]))

    total = jax.lax.fori_loop(0, used, body, zeros)
    counted = jnp.where(jnp.arange(len(blocks.x)) < used, jnp.sum(blocks.weights, axis=1), 0)
    return jax.tree.map(lambda part: part / jnp.sum(counted), total)


def _subsamples(blocks: _Blocks) -> list[int]:
    """How many blocks each of the first stages uses."""
    count, rows, d = blocks.x.shape
    return sorted({min(count, -(-examples * d // rows)) for examples in SUBSAMPLES})


def _shuffled(x: Float[Array, "n d"], rng: np.random.Generator) -> _Blocks:
    count = -(-len(x) // BLOCK)
    rows = -(-len(x) // count)
    order = np.full(count * rows, len(x))
    order[: len(x)] = rng.permutation(len(x))
    return _gather(x, order.reshape(count, rows))


@jax.jit
def _gather(x, order) -> _Blocks:
    rms = jnp.sqrt(jnp.mean(jnp.square(x)))
    return _Blocks(jnp.take(x / rms, order, axis=0, mode="fill", fill_value=0), (order < len(x)).astype(x.dtype))


def _haar(rng: np.random.Generator, d: int) -> np.ndarray:
    q, r = np.linalg.qr(rng.standard_normal((d, d)))
    return q * np.sign(np.diagonal(r))
