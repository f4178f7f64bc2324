"""What stands in for dropped coordinates, trained: a vector for each site, which becomes a bias of what reads it.

A `SparseInput` gives a dropped coordinate the value of its shift c, and leaves those that stay as they are. The mean of
what is dropped is the c with the least error at that site; what the network minds is another matter, so here the shifts
of all sites are trained together, on `KL(whole ‖ sparse)` of the predictions. Rotations, scores and thresholds stay.
"""

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from rotsparse._core.modules import replace_fields
from rotsparse._core.precision import full_precision
from rotsparse.models.config import TransformerConfig
from rotsparse.models.model import Model
from rotsparse.models.transformer import Point, run_from, site_width
from rotsparse.sparse.inputs import SparseInput
from rotsparse.sparse.walk import before, gradients, head, through

Shifts = dict[Point, Array]
At = TypeVar("At", bound=Hashable)

# The first step, in units of the largest magnitude that a coordinate is dropped with. It falls to zero as a cosine.
_RATE = 0.01


def trained_shifts(
    model: Model,
    tokens: Int[np.ndarray, "sequences length"],
    inputs: Mapping[tuple[int, str], SparseInput],
    *,
    steps: int,
    key: PRNGKeyArray,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[tuple[int, str], SparseInput]:
    """The sparse inputs with other shifts, after `steps` steps of Adam, each on one sequence; they begin at the shifts
    that are there (`None`: at zero). `progress` is told the share that is done. Raises `ValueError` for inputs without
    a threshold: by a count, nothing says how large a coordinate is that is dropped."""
    for point, of in inputs.items():
        if of.threshold is None:
            raise ValueError(f"shifts are trained where a threshold drops coordinates: {point} has a count instead")
    fixed = {Point(*point): _arrays(model, Point(*point), of) for point, of in inputs.items()}
    units = {at: _unit(of) for at, of in fixed.items()}
    start: Shifts = {at: jnp.asarray(of.shift) for at, of in fixed.items()}
    moved: Shifts = {at: jnp.zeros_like(of) for at, of in start.items()}
    optimiser = optax.adam(optax.cosine_decay_schedule(_RATE, steps))

    @jax.jit
    def update(moved, state, gradients):
        updates, state = optimiser.update({at: units[at] * g for at, g in gradients.items()}, state)
        return optax.apply_updates(moved, updates), state

    state, order = optimiser.init(moved), np.zeros(0, int)
    for i in range(steps):
        if not len(order):
            order = np.asarray(jax.random.permutation(jax.random.fold_in(key, i), len(tokens)))
        sequence, order = tokens[order[:1]], order[1:]
        shifts = {at: of + units[at] * moved[at] for at, of in start.items()}
        moved, state = update(moved, state, _gradients(model, sequence, fixed, shifts))
        progress((i + 1) / steps)
    return {
        point: replace_fields(of, shift=np.asarray(start[at] + units[at] * moved[at]))
        for (point, of), at in zip(inputs.items(), fixed, strict=True)
    }


def _arrays(model: Model, point: Point, of: SparseInput) -> SparseInput:
    """With arrays for numbers and with a shift, so that what is compiled for one serves all."""
    shift = np.zeros(site_width(model.config, point.site), np.float32) if of.shift is None else of.shift
    return jax.tree.map(jnp.asarray, replace_fields(of, shift=shift))


def _unit(of: SparseInput) -> Float[Array, "d"]:
    """The largest magnitude that each coordinate is dropped with: none where the threshold is negative."""
    assert of.threshold is not None and of.shift is not None
    scores = jnp.ones(len(of.shift)) if of.scores is None else jnp.asarray(of.scores)
    return jnp.where(scores > 0, jnp.maximum(jnp.asarray(of.threshold), 0) / jnp.where(scores > 0, scores, 1), 0)


def _gradients(
    model: Model, sequence: Int[np.ndarray, "1 length"], fixed: Mapping[Point, SparseInput], shifts: Shifts
) -> Shifts:
    """Of the divergence, with respect to the shifts."""
    whole = before(model, sequence)
    streams, change = [whole], _shifted(fixed, shifts)
    for layer in range(model.config.n_layers):
        whole = through(model, layer, whole)[0]
        of_layer = {at.site: of for at, of in change.items() if at.layer == layer}
        streams.append(through(model, layer, streams[-1], change=of_layer)[0])
    last = _of_divergence(head(model), whole, streams.pop(), model.config)
    return dict(gradients(model, streams, last, change=_shifted, fixed=fixed, moved=shifts))


def _shifted(fixed: Mapping[At, SparseInput], shifts: Mapping[At, Array]) -> dict[At, SparseInput]:
    return {at: replace_fields(of, shift=shifts[at]) for at, of in fixed.items()}


@partial(jax.jit, static_argnames="config")
def _of_divergence(params, whole, sparse, config: TransformerConfig):
    """The gradient of `KL(whole ‖ sparse)`, the mean over tokens, with respect to the sparse model's last stream."""

    def log_p(stream):
        return jax.nn.log_softmax(run_from(params, config, stream, config.n_layers)[0])

    with full_precision():
        _, pull = jax.vjp(log_p, sparse)
        expected = jnp.exp(log_p(whole))
        # Of `Σ p log q` only q depends on the stream.
        return pull(-expected / expected[..., 0].size)[0]
