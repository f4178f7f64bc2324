"""A chain of layers `x_{l+1} = f_l(x_l)`: fit the rotations of each layer separately, or of all layers jointly.

Boundary 0 is the chain's input, boundary l is the output of layer l-1 and the input of layer l, and the last boundary
is the chain's output. Separate and joint fits differ only in how the spaces are named. With a name for each side of
each layer, no two terms of `Σ_l E S(R_out,l J_l R_in,lᵀ)` share a space, and the sum splits into one problem per
layer. With a name for each boundary, `Σ_l E S(R_{l+1} J_l R_lᵀ)` is one problem.

Separate fits test whether the sparse outputs of one layer are the sparse inputs of the next. Every space starts at its
own Haar-random rotation, so that agreement between two sides cannot come from a common start.
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from rotsparse._core import checks
from rotsparse._core.orthogonal import haar
from rotsparse._core.types import Data, Vectors
from rotsparse.data.sources import Mapped, Source, in_memory
from rotsparse.engine.history import History
from rotsparse.engine.method import Method
from rotsparse.engine.run import Run
from rotsparse.engine.solution import Result, Solution
from rotsparse.fit.find_rotations import kept_moments
from rotsparse.fit.minimize import minimize
from rotsparse.layers.base import Layer
from rotsparse.layers.jacobians import apply
from rotsparse.layers.rotations import Rotations
from rotsparse.objectives.base import Bases
from rotsparse.objectives.combined import Held, WeightedSum
from rotsparse.objectives.jacobian import JacobianSparsity
from rotsparse.objectives.measures import Log, Measure
from rotsparse.solvers.anneal import Anneal


def fit_chain(
    layers: Sequence[Layer],
    x: Float[Data, "n d_in"] | Source | Vectors,
    *,
    key: PRNGKeyArray,
    joint: bool,
    hold_boundaries: Sequence[int] = (),
    measure: Measure = Log(0.1),  # noqa: B008 (immutable)
    method: Method = Anneal(),  # noqa: B008 (immutable)
    restarts: int = 1,
    scale_inputs: bool = True,
    run: Run | str | os.PathLike | None = None,
) -> Solution:
    """Find rotations of every layer of the chain `x_{l+1} = f_l(x_l)` in which the per-example Jacobians are sparse.

    - `layers`: first to last. `x`: inputs of the first, `[n, d_in]`, or a source; inputs of later layers are then
      recomputed from its rows whenever they are read (one forward pass, cheap beside a step's products with whole
      Jacobians).
    - `joint`: fit one rotation for each boundary, shared by the layers on both sides; the solution's spaces are "0",
      "1", ... Otherwise fit a pair of rotations for each layer; the spaces are "0 in", "0 out", "1 in", ...
    - `hold_boundaries`: numbers of the boundaries that stay in the neuron basis (0 is the chain's input).
    - `restarts`: independent Haar-random starts; the best is chosen for each problem, on `x`.
    - `run`: as for `find_rotations`; each separate problem has its own folder: `0`, `1`, ...

    `layer_rotations(solution)` gives the rotations of each layer, and `evaluate_chain` measures them on held-out
    examples. An interrupted solution has rotations only for the problems that were begun.

    Separate layers are fitted one after another rather than vmapped: layers of equal shape share a compilation anyway,
    one program for five gated blocks of width 64 took longer on a CPU (25 s, 12 of them compiling, against 17 s), and
    each layer could not choose its own best step and restart.

    Raises `ValueError` if the layers do not fit each other or `x`, or if a number in `hold_boundaries` is not that of a
    boundary.
    """
    run = Run.of(run)
    terms = chain_objectives(layers, x, joint=joint, measure=measure, scale_inputs=scale_inputs, run=run)
    if unknown := set(hold_boundaries) - set(range(len(terms) + 1)):
        raise ValueError(f"hold_boundaries has {sorted(unknown)}: expected numbers from 0 to {len(terms)}")
    neurons, random = chain_starts(terms, key=key)
    held = {name: r for name, r in neurons.items() if _boundary(name) in hold_boundaries}
    key_fit = jax.random.split(key, 3)[1]
    solutions = []
    with run.listening() as listening:
        for i, group in enumerate(_connected(terms, held)):
            objective = Held(WeightedSum(group), held)
            solutions.append(
                minimize(
                    objective,
                    random,
                    method=method,
                    key=jax.random.fold_in(key_fit, i),
                    restarts=restarts,
                    run=listening.subrun(f"{i}"),
                )
            )
            if solutions[-1].result is Result.INTERRUPTED:
                break
    free = {name: np.full(len(r), name not in held) for name, r in neurons.items()}
    joined = _joined(solutions)
    return joined.lifted(lambda bases: held | bases, {k: v for k, v in free.items() if k in held | joined.bases})


def chain_objectives(
    layers: Sequence[Layer],
    x: Float[Data, "n d_in"] | Source | Vectors,
    *,
    joint: bool,
    measure: Measure,
    scale_inputs: bool = True,
    run: Run = Run(),  # noqa: B008 (immutable)
) -> list[JacobianSparsity]:
    """The objective of every layer on its own inputs; in a joint fit, neighbours share a space. Raises `ValueError` if
    the layers do not fit each other or `x`."""
    layers = tuple(layers)
    if not layers:
        raise ValueError("a chain needs at least one layer")
    names = [(f"{i}", f"{i + 1}") if joint else (f"{i} in", f"{i} out") for i in range(len(layers))]
    return [
        JacobianSparsity(
            layer,
            inputs,
            measure,
            scale_inputs=scale_inputs,
            space_in=a,
            space_out=b,
            moments=kept_moments(inputs, run, f"moments-{i}") if scale_inputs else None,
        )
        for i, (layer, inputs, (a, b)) in enumerate(zip(layers, _inputs(layers, x), names, strict=True))
    ]


def chain_starts(terms: Sequence[JacobianSparsity], *, key: PRNGKeyArray) -> tuple[Bases, Bases]:
    """The neuron basis of every space of a chain, and the Haar-random rotations from which `fit_chain` starts."""
    spaces = WeightedSum(terms).spaces
    neurons = {name: jnp.eye(d, dtype=terms[0].x.dtype) for name, d in spaces.items()}
    keys = jax.random.split(jax.random.split(key, 3)[0], len(spaces))
    return neurons, {name: haar(k, len(r), r.dtype) for k, (name, r) in zip(keys, neurons.items(), strict=True)}


def layer_rotations(solution: Solution) -> tuple[Rotations, ...]:
    """The rotations of each layer of a chain. Raises `KeyboardInterrupt` if the fit was interrupted."""
    bases = solution.completed().bases
    if "0 in" in bases:
        return tuple(Rotations(bases[f"{i} in"], bases[f"{i} out"]) for i in range(len(bases) // 2))
    return tuple(Rotations(bases[f"{i}"], bases[f"{i + 1}"]) for i in range(len(bases) - 1))


def _boundary(space: str) -> int:
    """The number of the boundary at which a space lies."""
    layer, _, side = space.partition(" ")
    return int(layer) + (side == "out")


def _inputs(layers: tuple[Layer, ...], x) -> list:
    """The inputs of each layer: arrays, or sources. Raises `ValueError` if a layer's outputs and the next layer's
    inputs differ in width."""
    kept, source = in_memory(x)
    inputs: list = [checks.activations("x", kept, layers[0].d_in)]
    if source is not None:
        inputs = [source]
    for i, (layer, after) in enumerate(itertools.pairwise(layers)):
        if layer.d_out != after.d_in:
            raise ValueError(
                f"layer {i} has {layer.d_out} outputs and layer {i + 1} {after.d_in} inputs: in a chain, with nothing "
                "between them, these are the same"
            )
        before = inputs[-1]
        inputs.append(apply(layer, before) if source is None else Mapped(before, functools.partial(apply, layer)))
    return inputs


def _connected(terms: Sequence[JacobianSparsity], held: Bases) -> list[list[JacobianSparsity]]:
    """Group the terms into independent problems: no two groups share a free space. Terms without a free space are left
    out. Raises `ValueError` if no term has one."""
    groups: list[tuple[set[str], list[JacobianSparsity]]] = []
    for term in terms:
        free = set(term.spaces) - set(held)
        joined = [group for group in groups if group[0] & free]
        members = [member for group in joined for member in group[1]]
        groups = [group for group in groups if group not in joined]
        if free:
            groups.append((free.union(*(group[0] for group in joined)), [*members, term]))
    if not groups:
        raise ValueError("nothing to optimise: every boundary is held")
    return [members for _, members in groups]


def _joined(solutions: Sequence[Solution]) -> Solution:
    """Join the solutions of independent problems: bases side by side, values summed."""
    first = solutions[0]
    if len(solutions) == 1:
        return first
    # Rank each problem's candidates, so that the first joined candidate is the best.
    ranked = [np.argsort(s.candidate_values, kind="stable") for s in solutions]
    union = lambda parts: {k: v for part in parts for k, v in part.items()}  # noqa: E731
    candidates = tuple(
        union(s.candidates[order[i]] for s, order in zip(solutions, ranked, strict=True))
        for i in range(len(first.candidates))
    )
    values = sum(s.candidate_values[order] for s, order in zip(solutions, ranked, strict=True))
    last, stats = solutions[-1], dict.fromkeys(("seconds", "compile_seconds"), 0.0)
    totals: dict[str, Any] = {name: sum(s.stats.get(name, 0.0) for s in solutions) for name in stats}
    totals["gradient_norm"] = float(np.sqrt(sum(s.stats["gradient_norm"] ** 2 for s in solutions)))
    totals["orthogonality_error"] = max(s.stats["orthogonality_error"] for s in solutions)
    bad = [s.result for s in solutions if s.result.broken_off] or [s.result for s in solutions if not s.result.ok]
    alike = all(s.history.objective.shape == first.history.objective.shape for s in solutions)
    alike = alike and all(np.array_equal(s.history.checked_at, first.history.checked_at) for s in solutions)
    history = last.history
    if alike:
        objective = np.sum([s.history.objective for s in solutions], axis=0)
        checked = np.sum([s.history.checked for s in solutions], axis=0)
        history = History(objective, first.history.checked_at, checked)
    return dataclasses.replace(
        first,
        bases=union(s.bases for s in solutions),
        result=bad[-1] if bad else first.result,
        detail="; ".join(filter(None, (s.detail for s in solutions))),
        value=sum(s.value for s in solutions),
        start_value=sum(s.start_value for s in solutions),
        history=history,
        candidates=candidates,
        candidate_values=np.asarray(values),
        free=union(s.free for s in solutions),
        stages=tuple(stage for s in solutions for stage in s.stages),
        stats=totals,
    )
