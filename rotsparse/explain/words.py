"""What directions have to do with the words of a language model: which ones an output promotes, and which an input is
aligned with."""

from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from rotsparse._core.precision import full_precision
from rotsparse._core.types import AnyArray
from rotsparse.explain.examples import word
from rotsparse.models.embedding import norm_of
from rotsparse.models.model import Model
from rotsparse.models.transformer import run_from, stream_before

# Pushes of inputs too are worth their time where so many tokens are affordable.
MANY = 64


class Word(NamedTuple):
    """A word and its score: how many standard deviations over the vocabulary it lies from the mean word."""

    word: str
    token: int
    score: float


class WordScores:
    """Scores of every word for every direction of a side. `scores`: `[d, vocabulary]`."""

    def __init__(self, scores: Float[np.ndarray, "d vocabulary"], words: Sequence[str] | None):
        self.scores, self._words = scores, words

    def highest(self, number: int, count: int = 8, *, sign: int = 1) -> list[Word]:
        """The words with the highest scores, or with `sign=-1` the lowest."""
        of = sign * self.scores[number]
        count = min(count, len(of))
        best = np.argpartition(-of, count - 1)[:count]
        best = best[np.argsort(-of[best], kind="stable")]
        return [Word(word(self._words, int(t)), int(t), float(self.scores[number, t])) for t in best]


def promoted(model: Model, layer: int, r_out: Float[AnyArray, "d d"], words: Sequence[str] | None) -> WordScores | None:
    """What a move along each output direction does to the logits if it reaches the last norm as it is: row o of
    `R_out (W_U diag(γ) P)ᵀ`, standardised over the vocabulary. `None` for a model without a next-token head.

    Later layers read the direction too: see `steered`.
    """
    config, params = model.config, model.params
    if not config.head or config.placement in ("post", "output") or "final_norm" not in params:
        return None
    head = norm_of(params["final_norm"], config).absorb(np.asarray(params.get("unembed", params["embed"]), np.float32))
    block = params["layers"][layer]
    if config.placement == "sandwich":
        head = np.asarray(norm_of(block["mlp_post_norm"], config).absorb(head))
    return _scores(head, r_out, words)


def steered(
    model: Model,
    point: tuple[int, str],
    r: Float[AnyArray, "d d"],
    tokens: Int[np.ndarray, "sequences positions"],
    words: Sequence[str] | None,
) -> WordScores | None:
    """What a push along each direction does to the logits through everything behind it, to first order: the mean
    derivative of a position's logits with respect to a move by the direction at every position, over some sequences,
    standardised over the vocabulary. `None` for a model without a next-token head.

    As many of the first tokens are used as are `affordable`, at least 24.
    """
    config, params = model.config, model.params
    if not config.head or not config.causal:
        return None
    count = max(24, affordable(model, point[0]))
    length = min(tokens.shape[1], max(12, count // 8))
    tokens = tokens[: max(1, count // length), :length]
    arrays = jax.tree.map(lambda array: jax.device_put(array, may_alias=True), params)
    slopes = _slopes(arrays, config, point, jnp.asarray(r, jnp.float32), jnp.asarray(tokens))
    return _standardised(np.asarray(slopes), words)


def affordable(model: Model, layer: int) -> int:
    """At how many tokens all directions can be pushed within half a minute on two cores; at most 512."""
    size = sum(np.size(a) for a in jax.tree.leaves(model.params["layers"][layer:])) + np.size(model.params["embed"])
    return min(512, int(_FLOPS / (2 * size * model.config.d_model)))


_FLOPS = 2.2e12
_AT_ONCE = 8  # directions


@eqx.filter_jit
def _slopes(params, config, point, directions, tokens):
    layer = point[0]
    stream = stream_before(params, config, tokens, layer)

    def logits(moved):
        return run_from(params, config, stream, layer, intervene={point: lambda x: x + moved})[0].mean(axis=(0, 1))

    with full_precision():
        _, push = jax.linearize(logits, jnp.zeros(directions.shape[1]))
        return jax.lax.map(push, directions, batch_size=_AT_ONCE)


def aligned(
    model: Model, layer: int, site: str, r_in: Float[AnyArray, "d d"], words: Sequence[str] | None
) -> WordScores | None:
    """How the embedding of each word lies along each input direction, behind the norm if the layer begins there,
    standardised over the vocabulary. `None` for a model without words, or whose embeddings have another width."""
    params, config = model.params, model.config
    if "embed" not in params or params["embed"].shape[1] != config.d_model:
        return None
    x = np.asarray(params["embed"], np.float32) * np.float32(config.embedding_scale)
    if site == "input" and config.placement in ("pre", "sandwich"):
        x = np.asarray(norm_of(params["layers"][layer]["mlp_norm"], config)(x))
    return _scores(x, r_in, words)


def _scores(vectors, r, words) -> WordScores:
    return _standardised(np.asarray(r, np.float32) @ np.asarray(vectors, np.float32).T, words)


def _standardised(scores, words) -> WordScores:
    scores = scores - scores.mean(axis=1, keepdims=True)
    spread = scores.std(axis=1, keepdims=True)
    return WordScores(np.divide(scores, spread, out=np.zeros_like(scores), where=spread > 0), words)
