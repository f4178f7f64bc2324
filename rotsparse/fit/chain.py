"""A chain of layers `x_{l+1} = f_l(x_l)`: fit all of its rotations, each layer by itself or all together.

Between two layers lies a *boundary*: number 0 is the chain's input, number l the output of layer l-1 and the input of
layer l, the last one the chain's output. `separate` and `joint` differ in nothing but how the spaces are named. With a
name for every layer's side, no two terms of `Σ_l E S(R_out,l J_l R_in,lᵀ)` share a space and the sum falls apart into
one problem a layer; with a name for every boundary, `Σ_l E S(R_{l+1} J_l R_lᵀ)` is one problem.

Separate fits answer a question: are the sparse outputs of one layer the sparse inputs of the next? Every space starts
at a Haar-random rotation of its own, so that two sides that agree cannot have it from a common start.
"""

import functools
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, PRNGKeyArray

from rotsparse._core import checks
from rotsparse._core.alignment import match
from rotsparse._core.intervals import Interval, bootstrap_counts, bootstrap_interval
from rotsparse._core.orthogonal import haar
from rotsparse._core.types import Data
from rotsparse.data.sources import Mapped, Source, in_memory
from rotsparse.fit._checkpoint import Checkpoints
from rotsparse.fit._log import RunLog
from rotsparse.fit.find_rotations import BATCH_SIZE, kept_moments
from rotsparse.fit.minimize import STEPS, minimize
from rotsparse.fit.solution import Result, Solution
from rotsparse.layers.base import Layer
from rotsparse.layers.jacobians import apply
from rotsparse.layers.rotations import Rotations
from rotsparse.objectives import Bases, Held, JacobianSparsity, WeightedSum, chunked_sum
from rotsparse.objectives.measures import Log, Measure
from rotsparse.solvers import Annealing, Solver

# A direction with a smaller share of the Jacobian than this, times the average one's, is not used by the layer: where
# it points is arbitrary (dead neurons; the null space of a layer with fewer outputs than inputs).
USED = 1e-3

DRAWS = 40
RESAMPLES = 1000


@dataclass(frozen=True)
class BoundaryMatch:
    """Whether the sparse outputs of layer `boundary - 1` are the sparse inputs of layer `boundary`.

    `outputs` and `inputs` count the directions that each layer uses. `cosines` are the `|cos|` of the best one-to-one
    match between them (one for each direction of the side with fewer), `cosine` their mean with its bootstrap interval
    over directions, `chance` that of random orthonormal directions, as many on either side: the mean and the range of
    95% of the draws. `shared`: both sides have one rotation.
    """

    boundary: int
    shared: bool
    outputs: int
    inputs: int
    cosines: Float[np.ndarray, "k"]
    cosine: Interval
    chance: Interval

    def __str__(self) -> str:
        between = f"Layers {self.boundary - 1} and {self.boundary}"
        if self.shared:
            return f"{between} share a rotation; what it costs them is the difference to a separate fit."
        if not len(self.cosines):
            return f"{between} cannot be compared: one of them uses no direction at all."
        if self.cosine.low > self.chance.high:
            verdict = "more than chance gives"
        elif self.cosine.high < self.chance.low:
            verdict = "less than chance gives"
        else:
            verdict = "no more than chance gives"
        return (
            f"{between}: the {self.outputs} output and {self.inputs} input directions match at a mean |cos| of "
            f"{self.cosine.value:.2f} [{self.cosine.low:.2f}, {self.cosine.high:.2f}], {verdict} "
            f"({self.chance.value:.2f} [{self.chance.low:.2f}, {self.chance.high:.2f}]); {np.sum(self.cosines > 0.9)} "
            f"of {len(self.cosines)} pairs are above 0.9."
        )


@dataclass(frozen=True)
class ChainSolution:
    """The rotations of every layer, and the evidence.

    `values`, `neuron_values`, `random_values`: each layer's objective on the held-out examples at the result, in the
    neuron basis, and at one Haar-random pair. `matches`: one for each interior boundary. `solutions`: one for each
    problem that was solved (separate: one a layer; joint: one).
    """

    rotations: tuple[Rotations, ...]
    values: tuple[float, ...]
    neuron_values: tuple[float, ...]
    random_values: tuple[float, ...]
    matches: tuple[BoundaryMatch, ...]
    solutions: tuple[Solution, ...]

    def summary(self) -> str:
        """A few lines for a person."""
        lines = [str(s.result.value) for s in self.solutions if s.result is Result.INTERRUPTED]
        lines.append("held-out objective: found (neurons, random)")
        for layer, values in enumerate(zip(self.values, self.neuron_values, self.random_values, strict=True)):
            lines.append("layer {}: {:.4f} ({:.4f}, {:.4f})".format(layer, *values))
        return "\n".join([*lines, *map(str, self.matches)])


def fit_chain(
    layers: Sequence[Layer],
    x: Float[Data, "n d_in"] | Source,
    *,
    test: Float[Data, "m d_in"] | Source,
    key: PRNGKeyArray,
    joint: bool,
    hold: Sequence[int] = (),
    measure: Measure = Log(0.1),  # noqa: B008 (immutable)
    scale_inputs: bool = True,
    restarts: int = 1,
    solver: Solver | None = None,
    steps: int = STEPS,
    batch_size: int | None = None,
    progress: bool = False,
    checkpoint: Checkpoints | str | os.PathLike | None = None,
    log: RunLog | str | os.PathLike | None = None,
    mesh: Mesh | None = None,
) -> ChainSolution:
    """Rotations of every layer of the chain `x_{l+1} = f_l(x_l)` in which their per-example Jacobians are sparse.

    - `layers`: first to last; `x`: inputs of the first, `[n, d_in]`; `test`: held-out ones, on which every number is
      reported and nothing is chosen. Either may be a source: what enters a later layer is then computed from its rows
      whenever they are read, by the layers before (one forward pass, against a step's products with whole Jacobians).
    - `joint`: boundaries have one rotation, shared by both layers. Otherwise every layer has its own pair.
    - `hold`: numbers of boundaries (0 is the chain's input) that stay in the neuron basis.
    - `restarts`: independent Haar-random starts; the best is chosen for each problem, on `x`.
    - `solver`: `Annealing()` unless given, without the pair searches that may follow it in `find_rotations`; the rest
      (`mesh`, too) as there. `checkpoint` and `log` get a folder for each problem: `0`, `1`, ...

    After an interruption, problems that were not begun have no solution, and their rotations are random: the last
    solution's result is `Result.INTERRUPTED`.

    Separate layers are fitted one after the other, not vmapped: layers of one shape share a compilation either way, on
    a CPU one program for five gated blocks of width 64 took longer (25 s, 12 of them compiling, against 17 s), and
    each layer could not choose its own best step and restart.

    Raises `ValueError` where the layers do not fit each other or `x`, or `hold` names no boundary.
    """
    layers = tuple(layers)
    if not layers:
        raise ValueError("a chain needs at least one layer")
    if unknown := set(hold) - set(range(len(layers) + 1)):
        raise ValueError(f"hold names boundaries {sorted(unknown)}: expected numbers from 0 to {len(layers)}")
    if batch_size is None and (solver is None or isinstance(solver, Annealing)):
        batch_size = BATCH_SIZE
    names = [(f"{i}", f"{i + 1}") if joint else (f"{i} in", f"{i} out") for i in range(len(layers))]
    terms = [
        JacobianSparsity(
            layer,
            inputs,
            measure,
            scale_inputs=scale_inputs,
            space_in=a,
            space_out=b,
            batch_size=batch_size,
            moments=kept_moments(inputs, checkpoint, f"moments-{i}") if scale_inputs else None,
        )
        for i, (layer, inputs, (a, b)) in enumerate(zip(layers, _inputs("x", layers, x), names, strict=True))
    ]
    held_out = [term.on(inputs) for term, inputs in zip(terms, _inputs("test", layers, test), strict=True)]

    spaces = WeightedSum(terms).spaces
    neurons = {name: jnp.eye(d, dtype=terms[0].x.dtype) for name, d in spaces.items()}
    at_boundary = {name: i + side for i, pair in enumerate(names) for side, name in enumerate(pair)}
    held = {name: r for name, r in neurons.items() if at_boundary[name] in hold}
    key_start, key_fit, key_match = jax.random.split(key, 3)
    keys = jax.random.split(key_start, len(spaces))
    random = {name: haar(k, len(r), r.dtype) for k, (name, r) in zip(keys, neurons.items(), strict=True)} | held
    solutions, bases = [], dict(held)
    for i, group in enumerate(_connected(terms, held)):
        solution = minimize(
            Held(WeightedSum(group), held),
            random,
            key=jax.random.fold_in(key_fit, i),
            solver=solver,
            steps=steps,
            restarts=restarts,
            progress=progress,
            checkpoint=None if checkpoint is None else Checkpoints.of(checkpoint).part(f"{i}"),
            log=None if log is None else RunLog.of(log).part(f"{i}"),
            mesh=mesh,
        )
        solutions.append(solution)
        bases |= solution.bases
        if solution.result is Result.INTERRUPTED:
            bases = random | bases
            break

    used = [_used(term, bases) for term in held_out]
    matches = tuple(
        _match(i, names[i - 1][1] == names[i][0], used[i - 1][1], used[i][0], jax.random.fold_in(key_match, i))
        for i in range(1, len(layers))
    )
    values, neuron_values, random_values = (
        tuple(float(eqx.filter_jit(term.value)(at)) for term in held_out) for at in (bases, neurons, random)
    )
    rotations = tuple(Rotations(bases[a], bases[b]) for a, b in names)
    return ChainSolution(rotations, values, neuron_values, random_values, matches, tuple(solutions))


def _inputs(name: str, layers: tuple[Layer, ...], x) -> list:
    """What enters each layer: arrays, or sources. Raises `ValueError` where a layer's outputs are not as wide as the
    next one's inputs."""
    kept, source = in_memory(x)
    inputs: list = [checks.activations(name, kept, layers[0].d_in)]
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
    """The terms in groups that have no free space in common: problems of their own. Terms without any free space are
    left out."""
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


def _used(term: JacobianSparsity, bases: Bases) -> tuple[np.ndarray, np.ndarray]:
    """The input and the output directions that hold more than a vanishing share of the layer's mean square Jacobian
    (with inputs of unit variance, where the objective scales them)."""
    r_in, r_out = bases[term.space_in], bases[term.space_out]

    def squares(x, weights):
        return jnp.einsum("n,noi->oi", weights, jnp.square(term.layer.jacobian(x, r_in, r_out)))

    with jax.default_matmul_precision("highest"):
        energy = np.asarray(chunked_sum(squares, term.x, term.chunk), np.float64)
    if term.covariance is not None:
        energy = energy * np.einsum("ij,ij->i", np.asarray(r_in) @ np.asarray(term.covariance), r_in)
    by_side = (np.asarray(r_in), energy.sum(axis=0)), (np.asarray(r_out), energy.sum(axis=1))
    of_in, of_out = (r[share > USED * share.mean()] for r, share in by_side)
    return of_in, of_out


def _match(boundary: int, shared: bool, outputs: np.ndarray, inputs: np.ndarray, key: PRNGKeyArray) -> BoundaryMatch:
    few, many = sorted((outputs, inputs), key=len)
    if not len(few):
        nothing = Interval(math.nan, math.nan, math.nan)
        return BoundaryMatch(boundary, shared, len(outputs), len(inputs), np.zeros(0), nothing, nothing)
    cosines = match(few, many).cosines
    key_bootstrap, key_chance = jax.random.split(key)
    resampled = bootstrap_counts(len(few), RESAMPLES, key=key_bootstrap) @ cosines / len(few)
    # Random directions on one side are enough: the Haar measure is invariant.
    d = few.shape[1]
    draws = [
        match(np.asarray(haar(k, d))[: len(few)], np.eye(d)[: len(many)]).cosines.mean()
        for k in jax.random.split(key_chance, DRAWS)
    ]
    low, high = np.quantile(draws, [0.025, 0.975])
    chance = Interval(float(np.mean(draws)), float(low), float(high))
    cosine = bootstrap_interval(cosines.mean(), resampled)
    return BoundaryMatch(boundary, shared, len(outputs), len(inputs), cosines, cosine, chance)
