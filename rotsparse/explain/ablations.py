"""What each direction is worth to the network: the rise of a score on a text when its coordinate is held at its mean.

A direction is held at a point of the network, `x + (z̄ - z) r`, at every token. The control takes away as much along a
random direction: `x + (z̄ - z) u`, with u drawn uniformly, has the same change of norm at every token. A direction
that costs no more than its control is worth no more than its size.

`estimate` is the first order of the cost, `E[(z̄ - z) ∂score/∂z]`, from one backward pass for all directions. An exact
cost takes a forward pass from the layer on.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from rotsparse._core.types import AnyArray
from rotsparse.models.language import cross_entropy
from rotsparse.models.model import Model
from rotsparse.models.transformer import run_from, stream_before

Metric = Callable[[Array, Array, Array], Array]
"""A score of logits `[batch, tokens, vocabulary]`, given the logits of the network as it is, and the tokens: a number
for every token that has a next one, `[batch, tokens-1]`. The lower, the better."""

# Sequences of one forward pass.
_BATCH = 4


class Cost(NamedTuple):
    """What holding a direction at its mean costs.

    `estimate`: to first order. `cost`: measured; `error`: its standard error over sequences; `controls`: the same cost
    along random directions, with changes of the same norm. These are `None` or empty where only the estimate was
    asked for.
    """

    side: str
    number: int
    estimate: float
    cost: float | None
    error: float | None
    controls: tuple[float, ...]


def rise(logits: Array, whole: Array, tokens: Array) -> Array:
    """The cross-entropy of the next token, in nats. (Its rise is the cost.)"""
    return cross_entropy(logits, tokens)


def divergence(logits: Array, whole: Array, tokens: Array) -> Array:
    """`KL(p ‖ q)` of the network's next tokens p from those of the changed one q, in nats."""
    p, q = (jax.nn.log_softmax(of[:, :-1].astype(jnp.float32), axis=-1) for of in (whole, logits))
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def logit_difference(wrong: int, right: int) -> Metric:
    """The logit of one token minus that of another, at every position."""

    def metric(logits, whole, tokens):
        return (logits[:, :-1, wrong] - logits[:, :-1, right]).astype(jnp.float32)

    return metric


def costs(
    model: Model,
    point: tuple[int, str],
    r: Float[AnyArray, "d d"],
    tokens: Int[np.ndarray, "sequences positions"],
    metric: Metric = rise,
    *,
    side: str,
    numbers: Sequence[int] = (),
    controls: int = 1,
    key: PRNGKeyArray,
) -> list[Cost]:
    """The cost of every direction of a rotation at a point: estimated for all, measured for `numbers`.

    `tokens` are whole sequences. An exact cost and each of its `controls` take a forward pass from the layer on over
    all of them. Raises `ValueError` for a model without a next-token head.
    """
    if not model.config.head or not model.config.causal:
        raise ValueError(f"a {model.config.architecture} model has no next-token head: nothing to score")
    directions = jnp.asarray(r, jnp.float32)
    drawn = jax.random.normal(key, (len(numbers), controls, len(directions)))
    drawn = drawn / jnp.linalg.norm(drawn, axis=-1, keepdims=True)
    parts = list(_parts(model, point, tokens))
    sums = [np.asarray(of.z_sum(directions), np.float64) for of in parts]
    mean = jnp.asarray(np.sum(sums, axis=0) / tokens.size, jnp.float32)
    estimates = np.sum([np.asarray(of.estimate(metric, directions, mean), np.float64) for of in parts], axis=0)
    before = np.concatenate([np.asarray(of.whole(metric)) for of in parts])
    found = {}
    for at, number in enumerate(numbers):
        along = [directions[number], *drawn[at]]
        scores = [np.concatenate([np.asarray(p.held(metric, directions[number], mean[number], u)) for p in parts])
                  for u in along]  # fmt: skip
        rises = [score - before for score in scores]
        error = float(rises[0].std(ddof=1) / np.sqrt(len(before))) if len(before) > 1 else float("nan")
        found[number] = float(rises[0].mean()), error, tuple(float(of.mean()) for of in rises[1:])
    scored = tokens.size - len(tokens)
    none = None, None, ()
    return [Cost(side, i, float(estimates[i] / scored), *found.get(i, none)) for i in range(len(directions))]


class _Part(eqx.Module):
    """A few sequences: their tokens, and the stream in front of the layer."""

    params: dict
    stream: Array
    tokens: Array
    config: object = eqx.field(static=True)
    point: tuple[int, str] = eqx.field(static=True)

    @eqx.filter_jit
    def z_sum(self, directions):
        return jnp.sum(self._value() @ directions.T, axis=(0, 1))

    @eqx.filter_jit
    def whole(self, metric):
        """The mean score of each sequence."""
        logits = self._logits(None)
        return metric(logits, logits, self.tokens).mean(axis=1)

    @eqx.filter_jit
    def held(self, metric, direction, mean, along):
        """The mean score of each sequence when a coordinate's distance from its mean is taken away along a vector."""

        def change(x):
            return x + (mean - x @ direction)[..., None] * along

        return metric(self._logits(change), self._logits(None), self.tokens).mean(axis=1)

    @eqx.filter_jit
    def estimate(self, metric, directions, mean):
        """The first order of the change of the summed score, for every direction."""
        value, whole = self._value(), jax.lax.stop_gradient(self._logits(None))

        def score(moved):
            return metric(self._logits(lambda x: x + moved), whole, self.tokens).sum()

        gradient = jax.grad(score)(jnp.zeros_like(value))
        return jnp.sum((mean - value @ directions.T) * (gradient @ directions.T), axis=(0, 1))

    def _value(self):
        run = run_from(self.params, self.config, self.stream, self.point[0], capture=(self.point,))  # type: ignore
        return run[1][self.point]

    def _logits(self, change):
        intervene = {} if change is None else {self.point: change}
        return run_from(self.params, self.config, self.stream, self.point[0], intervene=intervene)[0]  # type: ignore


def _parts(model: Model, point: tuple[int, str], tokens: np.ndarray) -> Iterator[_Part]:
    params = jax.tree.map(lambda array: jax.device_put(array, may_alias=True), model.params)
    before = eqx.filter_jit(stream_before)
    for start in range(0, len(tokens), _BATCH):
        batch = jnp.asarray(tokens[start : start + _BATCH])
        yield _Part(params, before(params, model.config, batch, point[0]), batch, model.config, (point[0], point[1]))
