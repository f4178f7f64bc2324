"""What a fit of a chain of layers shows on held-out examples: how sparse every layer became, and whether the sparse
outputs of one layer are the sparse inputs of the next."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from rotsparse._core.alignment import match
from rotsparse._core.intervals import Interval, bootstrap_counts, bootstrap_interval
from rotsparse._core.orthogonal import haar
from rotsparse._core.types import Data
from rotsparse.data.sources import Source
from rotsparse.engine.solution import Solution, judged_value
from rotsparse.fit.chain import chain_objectives, chain_starts
from rotsparse.layers.base import Layer
from rotsparse.objectives.base import Bases
from rotsparse.objectives.jacobian import JacobianSparsity
from rotsparse.objectives.measures import Log, Measure

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
class ChainEvidence:
    """`values`, `neuron_values`, `random_values`: each layer's objective on the held-out examples at the solution, in
    the neuron basis, and at one Haar-random pair. `matches`: one for each interior boundary."""

    values: tuple[float, ...]
    neuron_values: tuple[float, ...]
    random_values: tuple[float, ...]
    matches: tuple[BoundaryMatch, ...]

    def summary(self) -> str:
        """A few lines for a person."""
        lines = ["held-out objective: found (neurons, random)"]
        for layer, values in enumerate(zip(self.values, self.neuron_values, self.random_values, strict=True)):
            lines.append("layer {}: {:.4f} ({:.4f}, {:.4f})".format(layer, *values))
        return "\n".join([*lines, *map(str, self.matches)])


def evaluate_chain(
    layers: Sequence[Layer],
    test: Float[Data, "m d_in"] | Source,
    solution: Solution,
    *,
    key: PRNGKeyArray,
    measure: Measure = Log(0.1),  # noqa: B008 (immutable)
    scale_inputs: bool = True,
) -> ChainEvidence:
    """The evidence for a solution of `fit_chain` on held-out inputs `test` of the first layer; `measure` and
    `scale_inputs` as there.

    Raises `ValueError` where the solution is not one of these layers, `KeyboardInterrupt` if the fit was interrupted.
    """
    bases = solution.completed().bases
    joint = "0 in" not in bases
    held_out = chain_objectives(layers, test, joint=joint, measure=measure, scale_inputs=scale_inputs)
    neurons, random = chain_starts(held_out, key=key)
    if {name: r.shape for name, r in bases.items()} != {name: r.shape for name, r in neurons.items()}:
        raise ValueError(f"the solution has spaces {sorted(bases)}, a chain of these layers {sorted(neurons)}")
    key_match = jax.random.split(key, 3)[2]
    used = [_used(term, bases) for term in held_out]
    matches = tuple(
        _match(i, joint, used[i - 1][1], used[i][0], jax.random.fold_in(key_match, i)) for i in range(1, len(used))
    )
    found, of_neurons, of_random = (
        tuple(judged_value(term, at) for term in held_out) for at in (bases, neurons, random)
    )
    return ChainEvidence(found, of_neurons, of_random, matches)


def _used(term: JacobianSparsity, bases: Bases) -> tuple[np.ndarray, np.ndarray]:
    """The input and the output directions that hold more than a vanishing share of the layer's mean square Jacobian
    (with inputs of unit variance, where the objective scales them)."""
    r_in, r_out = bases[term.space_in], bases[term.space_out]

    def squares(j, weights):
        return jnp.einsum("n,noi->oi", weights, jnp.square(j))

    energy = np.asarray(term.in_full_precision().summed(squares, r_in, r_out), np.float64)
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
