"""Edge ablation: how few edges between rotated inputs and rotated outputs does a stage need?

An edge (o, i) says that rotated output o sees rotated input i. With edges cut, each output coordinate is recomputed
from the inputs that it still sees, the others held at their mean:

    ẑ_o(x) = r_o · f(R_inᵀ (m_o ⊙ z + (1 - m_o) ⊙ z̄)),      z = R_in x,  m_o: the mask of output o

and `R_outᵀ ẑ` goes back into the network. Unlike a derivative this needs no small step, and unlike an objective it is
measured in what the network is for: its accuracy. (The protocol of Bushnaq et al., "The Local Interaction Basis",
2024.)
"""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rotsparse._core.checks import activations, weight
from rotsparse._core.orthogonal import matmul
from rotsparse._core.precision import full_precision
from rotsparse._core.types import Rows
from rotsparse.data.moments import chunks
from rotsparse.layers.base import Layer
from rotsparse.layers.jacobians import apply, jacobians
from rotsparse.layers.rotations import Rotations

Score = Callable[[Float[Array, "n d_out"]], float]
"""What a stage's outputs are worth to the network, larger is better: see `accuracy` and `log_likelihood`."""

Labels = Int[Array, "n"] | Int[np.ndarray, "n"]

# Rows of one call of the layer: a few megabytes of hidden activations for a width of a thousand.
_ROWS = 4096


def accuracy(logits: Callable[[Array], Array], labels: Labels) -> Score:
    """Share of examples whose largest logit is that of their label. `logits` maps a stage's outputs to the
    network's."""
    return _mean_score(logits, labels, lambda z, y: jnp.argmax(z, axis=-1) == y)


def log_likelihood(logits: Callable[[Array], Array], labels: Labels) -> Score:
    """Mean log-probability of the labels: minus the cross-entropy, in nats."""

    def log_probability(z, y):
        return jnp.take_along_axis(jax.nn.log_softmax(z, axis=-1), y[:, None], axis=-1)[:, 0]

    return _mean_score(logits, labels, log_probability)


class EdgeAblation:
    """The edges of a layer in a basis, ranked by importance, and the layer with only some of them.

    `importance[o, i] = E[Z_oi²] sd_i²`: the mean squared Jacobian entry times the variance of rotated input i, over the
    examples `x` (`[n, d_in]`), as are the means at which cut inputs are held. Give it training inputs, and evaluate on
    others.

    `reader`: `[m, d_out]`, what the network reads of the layer's output: the Jacobian of all later layers, or any
    matrix with `readerᵀ reader = E[J_laterᵀ J_later]`. Row o of the importance is then multiplied by `‖reader r_o‖²`,
    so that an edge into an output that nothing reads is the first to be cut.

    `copies`: the layer's input is this many vectors side by side that share the rotation `r_in` (positions of a
    sequence); one edge then stands for that input in every copy. Their importances add up.

    Raises `ValueError` where the shapes do not fit each other, or `x` is unusable.
    """

    importance: Float[np.ndarray, "d_out d_in"]

    def __init__(self, layer: Layer, x: Rows, rotations: Rotations, *, reader=None, copies: int = 1):
        x = activations("x", x, layer.d_in)
        d_in = rotations.r_in.shape[0]
        if (copies * d_in, rotations.r_out.shape[0]) != (layer.d_in, layer.d_out):
            raise ValueError(
                f"the rotations have widths {d_in} and {rotations.r_out.shape[0]}, expected {layer.d_in}/{copies} "
                f"(inputs / copies) and {layer.d_out}"
            )
        self.layer = layer
        self.copies = copies
        self._r_in = np.kron(np.eye(copies, dtype=x.dtype), np.asarray(rotations.r_in, x.dtype))
        self._r_out = jnp.asarray(rotations.r_out, x.dtype)
        z = np.asarray(x, np.float64) @ self._r_in.T.astype(np.float64)
        self._mean = jnp.asarray(z.mean(axis=0), x.dtype)
        square = sum(np.square(c, dtype=np.float64).sum(axis=0) for c in jacobians(layer, x, self._r_in, self._r_out))
        square = square / len(x) * z.var(axis=0)
        self.importance = square.reshape(layer.d_out, copies, d_in).sum(axis=1)
        if reader is not None:
            read = np.asarray(weight("reader", reader, (None, layer.d_out)), np.float64) @ np.asarray(rotations.r_out).T
            self.importance *= np.square(read).sum(axis=0)[:, None]
        # Stable, so that ties (edges that are exactly zero) are cut in the same order everywhere.
        self._order = np.argsort(-self.importance, axis=None, kind="stable")

    @property
    def edges(self) -> int:
        """The number of all edges, `d_out · d_in`."""
        return self.importance.size

    def mask(self, kept: int) -> Bool[np.ndarray, "d_out d_in"]:
        """Which edges are among the `kept` most important ones."""
        if not 0 <= kept <= self.edges:
            raise ValueError(f"kept should be a number of edges from 0 to {self.edges}, got {kept}")
        mask = np.zeros(self.edges, bool)
        mask[self._order[:kept]] = True
        return mask.reshape(self.importance.shape)

    def outputs(self, x: Rows, kept: int | Bool[np.ndarray, "d_out d_in"]) -> Float[Array, "n d_out"]:
        """The layer's outputs (in the neuron basis) with the `kept` most important edges only, or those of a mask.

        Outputs that share a mask are computed together: the cost is one call of the layer for every distinct mask.
        """
        x = activations("x", x, self.layer.d_in, at_least=1)
        mask = self.mask(kept) if isinstance(kept, int | np.integer) else np.asarray(kept, bool)
        masks, group = np.unique(mask, axis=0, return_inverse=True)
        r_in = jnp.asarray(self._r_in)
        parts = []
        for rows, count in chunks(x, _ROWS):
            z, out = matmul(rows, r_in.T), jnp.zeros((len(rows), self.layer.d_out), x.dtype)
            for m, inputs in enumerate(masks):
                seen, mine = jnp.asarray(np.tile(inputs, self.copies)), jnp.asarray(group.ravel() == m)
                out = _masked_outputs(self.layer, z, self._mean, r_in, self._r_out, seen, mine, out)
            parts.append(matmul(out, self._r_out)[:count])
        return jnp.concatenate(parts)

    def relaxed(self, x: Float[Array, "n d_in"], kept: Float[Array, "d_out d"]) -> Float[Array, "n d_out"]:
        """`outputs` with masks of numbers from 0 (cut) to 1 (kept), by which deviations from the mean are multiplied:
        differentiable in them. All examples at once, one call of the layer for every output (d = d_in / copies)."""
        r_in = jnp.asarray(self._r_in)
        z = x @ r_in.T

        @jax.checkpoint
        def output(of):
            row, seen = of
            return self.layer((self._mean + jnp.tile(seen, self.copies) * (z - self._mean)) @ r_in) @ row

        return jax.lax.map(output, (self._r_out, kept)).T @ self._r_out

    def curve(self, x: Rows, score: Score, kept: Sequence[int]) -> Float[np.ndarray, "k"]:
        """The score with each number of `kept` edges."""
        return np.array([score(self.outputs(x, k)) for k in kept])

    def fewest(self, x: Rows, score: Score, tolerance: float, *, near: int | None = None) -> int:
        """The fewest edges with which the score is at most `tolerance` below that of the whole layer, by bisection.

        It assumes, as bisection does, that more edges are no worse. Midpoints are geometric: small numbers of edges are
        where the answer usually lies, and cheap. `near`: a guess to look around first (the answer on fewer examples,
        say), which saves the expensive evaluations of many edges.
        """
        if not tolerance >= 0:
            raise ValueError(f"tolerance is how far the score may fall: expected a number ≥ 0, got {tolerance}")
        enough = score(apply(self.layer, jnp.asarray(x))) - tolerance
        return fewest(lambda kept: score(self.outputs(x, kept)) >= enough, self.edges, near=near)


def fewest(suffices: Callable[[int], bool], at_most: int, *, near: int | None = None) -> int:
    """The smallest k in 0..at_most with `suffices(k)`, by bisection with geometric midpoints. `suffices` should be
    monotone, and true at `at_most`. From `near` the bracket doubles until it holds the answer."""
    if suffices(0):
        return 0
    too_few, enough = 0, at_most
    if near is not None and 0 < near < at_most:
        guess = near
        while guess < at_most and not suffices(guess):
            too_few, guess = guess, 2 * guess
        enough = min(guess, at_most)
        while too_few == 0 and enough > 1 and suffices(enough // 2):
            enough //= 2
        too_few = max(too_few, enough // 2)
    while enough - too_few > 1:
        middle = int(np.sqrt(max(too_few, 1) * enough))
        middle = min(max(middle, too_few + 1), enough - 1)
        too_few, enough = (too_few, middle) if suffices(middle) else (middle, enough)
    return enough


@eqx.filter_jit
def _masked_outputs(layer, z, mean, r_in, r_out, seen, mine, out):
    """`out` with the columns `mine` replaced by the rotated outputs that see the inputs `seen` only."""
    with full_precision():
        return jnp.where(mine, layer(jnp.where(seen, z, mean) @ r_in) @ r_out.T, out)


def _mean_score(logits, labels, per_example):
    labels = jnp.asarray(labels)

    @eqx.filter_jit
    def chunk_score(y, labels):
        with full_precision():
            return per_example(logits(y), labels)

    def score(y):
        if len(y) != len(labels):
            raise ValueError(f"{len(y)} outputs for {len(labels)} labels: they should be of the same examples")
        return float(np.mean(np.asarray(chunk_score(y, labels)), dtype=np.float64))

    return score
