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
from rotsparse._core.types import AnyArray
from rotsparse.models.model import Model
from rotsparse.models.transformer import run_from
from rotsparse.sparse.inputs import SparseInput
from rotsparse.sparse.walk import before, head, on_device, through

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


def together() -> int:
    """Sequences that go through a layer together: two keep the cores of a CPU busy, an accelerator wants many."""
    return 2 if jax.default_backend() == "cpu" else 32


# Sequences whose predictions are compared together: their log-probabilities are the largest arrays here.
_PREDICTED = 2


def costs(
    model: Model,
    tokens: Int[np.ndarray, "sequences length"],
    trials: Sequence[Trial],
    *,
    batch: int | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> Costs:
    """What each trial costs: in it, what enters the linear maps at some points has coordinates dropped, at every token.

    `batch` sequences (`None`: `together()`) go through a layer at once, in all trials, so that one layer's weights and
    bases are on the device at a time; what is in front of a trial's first point is the whole model's. `progress` is
    told the share that is done.
    """
    found: list[Costs] = []
    changes = [_by_layer(trial) for trial in trials]
    last, batch = jax.device_put(head(model)), batch or together()
    for start in range(0, len(tokens), batch):
        rows = tokens[start : start + batch]
        streams = [before(model, rows)] * (1 + len(trials))
        for layer in range(model.config.n_layers):
            streams = _behind(model, layer, streams, changes)
            progress((start + len(rows) * (layer + 1) / (model.config.n_layers + 1)) / len(tokens))
        for at in (slice(i, i + _PREDICTED) for i in range(0, len(rows), _PREDICTED)):
            predicted = partial(_log_probabilities, last, config=model.config)
            whole = predicted(streams[0][at])
            of_trials = [np.asarray(_compared(whole, predicted(stream[at]), rows[at])) for stream in streams[1:]]
            rise, divergence = np.reshape(of_trials, (len(trials), 2, len(whole))).swapaxes(0, 1)
            found.append(Costs(np.asarray(_cross_entropy(whole, rows[at])), rise, divergence))
        progress((start + len(rows)) / len(tokens))
    return Costs(*(np.concatenate(parts, axis=-1) for parts in zip(*found, strict=True)))


def _behind(model: Model, layer: int, streams: list[Array], changes: Sequence[dict[int, dict[str, SparseInput]]]):
    """The streams behind a layer, of the whole model and of each trial. A trial's is the whole model's, the very same
    array, up to its first change."""
    model, bases = on_device(model, layer), dict[int, Array]()
    whole = through(model, layer, streams[0])[0]
    behind = [whole]
    for stream, change in zip(streams[1:], changes, strict=True):
        if stream is streams[0] and layer not in change:
            behind.append(whole)
        else:
            of_layer = jax.tree.map(partial(_placed, bases), change.get(layer))
            behind.append(through(model, layer, stream, change=of_layer)[0])
    return behind


def _placed(there: dict[int, Array], array: AnyArray) -> Array:
    """The array on the device. Trials share bases: each is brought `there` once."""
    if id(array) not in there:
        there[id(array)] = jax.device_put(array)
    return there[id(array)]


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
