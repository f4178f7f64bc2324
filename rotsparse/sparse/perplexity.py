"""What dropping coordinates costs a language model: the cross-entropy of a text, and how far its predictions move."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rotsparse._core.modules import replace_fields
from rotsparse._core.precision import full_precision
from rotsparse.models.model import Model
from rotsparse.models.transformer import run_from
from rotsparse.sparse.inputs import SparseInput
from rotsparse.sparse.walk import before, head, through

Trial = Mapping[tuple[int, str], SparseInput]


class Costs(NamedTuple):
    """In nats a token, for each sequence.

    `whole`: the cross-entropy of the whole model, every token but the first given those before it (perplexity is `exp`
    of its mean). `rise`: by how much each trial's is higher. `divergence`: `E KL(p ‖ q)`, p the next-token distribution
    of the whole model and q that of the trial. The rise is what users pay; the divergence does not reward luck, and few
    tokens measure it more precisely.
    """

    whole: Float[np.ndarray, "sequences"]
    rise: Float[np.ndarray, "trials sequences"]
    divergence: Float[np.ndarray, "trials sequences"]


def costs(
    model: Model,
    tokens: Int[np.ndarray, "sequences length"],
    trials: Sequence[Trial],
    *,
    batch: int = 2,
    progress: Callable[[float], None] = lambda share: None,
) -> Costs:
    """What each trial costs: in it, what enters the linear maps at some points has coordinates dropped, at every token.

    Layers in front of a trial's first point run only once for a batch. `progress` is told the share that is done.
    """
    found: list[Costs] = []
    changes = [_by_layer(trial) for trial in trials]
    for start in range(0, len(tokens), batch):
        rows = tokens[start : start + batch]
        dense = [before(model, rows)]  # in front of every layer
        for layer in range(model.config.n_layers):
            dense.append(through(model, layer, dense[-1])[0])
        whole = _log_probabilities(head(model), dense[-1], model.config)
        of_trials = []
        for number, change in enumerate(changes):
            first = min(change, default=model.config.n_layers)
            x = dense[first]
            for layer in range(first, model.config.n_layers):
                x, _ = through(model, layer, x, change=change.get(layer))
            of_trials.append(_compared(whole, _log_probabilities(head(model), x, model.config), rows))
            progress((start + len(rows) * (number + 1) / len(changes)) / len(tokens))
        nothing = np.zeros((0, len(rows)))
        parts = [np.asarray(part) for part in zip(*of_trials, strict=True)] if of_trials else [nothing, nothing]
        found.append(Costs(np.asarray(_cross_entropy(whole, rows)), *parts))
    return Costs(*(np.concatenate(parts, axis=-1) for parts in zip(*found, strict=True)))


def _by_layer(trial: Trial) -> dict[int, dict[str, SparseInput]]:
    """With arrays for numbers, so that others compile nothing anew."""
    changes: dict[int, dict[str, SparseInput]] = {}
    for (layer, site), of in trial.items():
        numbers = {"threshold": of.threshold, "count": of.count}
        arrays = {name: None if value is None else jnp.asarray(value) for name, value in numbers.items()}
        changes.setdefault(layer, {})[site] = replace_fields(of, **arrays)
    return changes


@partial(jax.jit, static_argnames="config")
def _log_probabilities(params, x, config):
    with full_precision():
        return jax.nn.log_softmax(run_from(params, config, x, config.n_layers)[0])


@jax.jit
def _compared(whole: Array, other: Array, tokens: Array):
    rise = _cross_entropy(other, tokens) - _cross_entropy(whole, tokens)
    return rise, jnp.mean(jnp.sum(jnp.exp(whole) * (whole - other), axis=-1), axis=-1)


def _cross_entropy(log_p, tokens):
    """A mean for each sequence."""
    return -jnp.mean(jnp.take_along_axis(log_p[:, :-1], jnp.asarray(tokens)[:, 1:, None], axis=-1)[..., 0], axis=-1)
