"""Do the top examples of a direction belong together? An intruder test without a judge.

A reader who understands a direction can tell its top examples from one that is none (Chang et al., "Reading Tea
Leaves", 2009). Here the reader is a vector for every example (which token it is, an embedding, an image), by its cosine
similarity: of some top examples and one intruder, the one that is least alike to the others is taken out. Chance is
`1 / (top + 1)`.

Top examples of a random direction are alike, too, where examples are: so compare with random rotations of the same
examples, and with the same fit of a network that learned nothing.
"""

import jax
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray

from rotsparse._core.intervals import numpy_generator
from rotsparse._core.types import AnyArray

# The intruder is from the middle half of the coordinate.
MIDDLE = (0.25, 0.75)


def intruder_rates(
    z: Float[AnyArray, "n d"],
    vectors: Float[AnyArray, "n f"],
    texts: Int[np.ndarray, "n"],
    *,
    top: int = 4,
    trials: int = 100,
    key: PRNGKeyArray,
) -> Float[np.ndarray, "2 d"]:
    """How often the intruder is found, for the positive and for the negative end of every direction.

    `z`: coordinates of `n` examples; `vectors`: what they are compared by; `texts`: the number of each one's text. The
    `top` examples with the largest (smallest) coordinates are of different texts. Each of `trials` draws one example
    from the middle half of the coordinate; if several are equally unlike the others, each is taken as often.

    Raises `ValueError` if there are fewer texts than `top` + 1.
    """
    z, v = np.asarray(z, np.float64), np.asarray(vectors, np.float64)
    if len(np.unique(texts)) <= top:
        raise ValueError(f"the {top} top examples should be of different texts: there are {len(np.unique(texts))}")
    length = np.linalg.norm(v, axis=1, keepdims=True)
    v = np.divide(v, length, out=np.zeros_like(v), where=length > 0)
    rng = numpy_generator(jax.random.fold_in(key, top))
    low, high = (np.quantile(z, share, axis=0) for share in MIDDLE)
    rates = np.empty((2, z.shape[1]))
    for i in range(z.shape[1]):
        middle = np.flatnonzero((low[i] <= z[:, i]) & (z[:, i] <= high[i]))
        for end, sign in enumerate((1, -1)):
            best = _best(sign * z[:, i], texts, top)
            drawn = rng.choice(middle, trials)
            rates[end, i] = _found(v[best], v[drawn])
    return rates


def _best(z: np.ndarray, texts: np.ndarray, top: int) -> np.ndarray:
    """The rows with the largest values, one of each text."""
    order = np.argsort(-z, kind="stable")
    _, first = np.unique(texts[order], return_index=True)
    return order[np.sort(first)[:top]]


def _found(best: np.ndarray, intruders: np.ndarray) -> float:
    """In how many of the trials, one for each intruder, the intruder is least alike to the others."""
    alike, strange = best @ best.T, best @ intruders.T
    own = (alike.sum(axis=1) - np.diag(alike))[:, None] + strange
    scores = np.concatenate([own, strange.sum(axis=0)[None]])
    # Sums of the same numbers in another order are equal.
    lowest = np.isclose(scores, scores.min(axis=0), rtol=0, atol=1e-9)
    return float(np.mean(lowest[-1] / lowest.sum(axis=0)))
