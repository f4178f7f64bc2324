"""Adversarial ablation: may the entries called practically zero be cut, whichever of them an adversary chooses?

A share of small entries says nothing of what they do together. Here half of them are cut as in `EdgeAblation` (the
output no longer sees the input, which is held at its mean): at random, and in the worst combination that a search by
gradients finds. If even that hardly changes the loss, they are zero for the network.
"""

from collections.abc import Callable
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from rotsparse._core.checks import activations
from rotsparse._core.intervals import numpy_generator
from rotsparse._core.precision import full_precision
from rotsparse._core.types import Rows
from rotsparse.evaluation.ablation import EdgeAblation
from rotsparse.layers.jacobians import apply

Loss = Callable[[Float[Array, "n d_out"]], Array]
"""A differentiable loss of the layer's outputs on all of the examples, in their order."""


@dataclass(frozen=True)
class AdversarialAblation:
    """`small` of all entries are called practically zero, and `cut` of these were cut at a time. The losses: `whole` of
    the layer as it is, `random` of each random combination, `worst` of the worst one found (`mask`: which entries were
    cut), and `every` with all small ones cut at once."""

    small: int
    cut: int
    whole: float
    random: tuple[float, ...]
    worst: float
    every: float
    mask: Bool[np.ndarray, "d_out d_in"]

    def sentence(self) -> str:
        """How far the loss rises."""
        rise = [value - self.whole for value in (float(np.mean(self.random)), self.worst, self.every)]
        return (
            f"Cutting {self.cut:,} of the {self.small:,} entries called practically zero raises the loss from "
            f"{self.whole:.4g} by {rise[0]:.2g} at random and by {rise[1]:.2g} in the worst combination found; "
            f"cutting all of them raises it by {rise[2]:.2g}."
        )


def adversarial_ablation(
    ablation: EdgeAblation,
    x: Rows,
    *,
    loss: Loss | None = None,
    threshold: float = 0.1,
    share: float = 0.5,
    draws: int = 8,
    steps: int = 20,
    key: PRNGKeyArray,
) -> AdversarialAblation:
    """Cut a `share` of the entries with `√importance < threshold · rms` (the rms of all entries of `√importance`) and
    measure the loss on `x` (`[n, d_in]`, held-out examples, not those that `ablation` was made from).

    Without a `loss`, that is the mean squared change of the outputs, relative to their variance. A cut is relaxed to a
    number between 0 and 1. From each of the random combinations, and from all small entries cut by `share`, the search
    goes on to as many entries at which the gradient of the loss is largest, while the loss rises and for at most
    `steps`. For a loss that is convex in the cuts, such as the default of a linear layer, it rises until nothing
    changes (Journée et al., "Generalized Power Method for Sparse Principal Component Analysis", 2010). What it finds is
    a lower bound of the worst case.

    All of `x` is processed at once: a few hundred examples. A step costs one call of the layer and its gradient for
    every output.

    Raises `ValueError` where no entry is small, or the arguments do not fit.
    """
    x = activations("x", x, ablation.layer.d_in)
    if not (0 < share < 1 and draws >= 1):
        raise ValueError(f"share should be between 0 and 1 and draws at least 1, got {share} and {draws}")
    whole = apply(ablation.layer, jnp.asarray(x))
    value_of = _relative_change(whole) if loss is None else loss
    small = np.flatnonzero(np.sqrt(ablation.importance) < threshold * np.sqrt(ablation.importance.mean()))
    count = round(share * len(small))
    if count == 0:
        raise ValueError(f"{len(small)} of {ablation.edges} entries are below {threshold} rms: there is nothing to cut")

    def of(cut: np.ndarray, part: float = 1) -> tuple[float, np.ndarray]:
        """The loss with these entries cut, wholly or in part, and its gradient at the small ones."""
        cuts = np.zeros(ablation.edges, x.dtype)
        cuts[cut] = part
        value, slope = _loss_and_slope(ablation.relaxed, value_of, x, cuts.reshape(ablation.importance.shape))
        return float(value), np.asarray(slope).ravel()[small]

    def climb(value: float, slope: np.ndarray, cut: np.ndarray) -> tuple[float, np.ndarray]:
        """The highest loss on the way from here, and the entries that are cut there."""
        for _ in range(steps):
            following = small[np.argsort(-slope, kind="stable")[:count]]
            after, slope = of(following)
            if after <= value:
                break
            value, cut = after, following
        return value, cut

    rng = numpy_generator(key)
    drawn = [rng.permutation(small)[:count] for _ in range(draws)]
    starts = [(*of(cut), cut) for cut in drawn]
    together = (-np.inf, of(small, share)[1], small)
    worst, mask = max((climb(*start) for start in (*starts, together)), key=lambda found: found[0])
    cuts = np.zeros(ablation.edges, bool)
    cuts[mask] = True
    return AdversarialAblation(
        small=len(small),
        cut=count,
        whole=float(value_of(whole)),
        random=tuple(value for value, _, _ in starts),
        worst=worst,
        every=of(small)[0],
        mask=cuts.reshape(ablation.importance.shape),
    )


def _relative_change(whole: Float[Array, "n d_out"]) -> Loss:
    """The mean squared change of outputs, relative to their variance."""
    variance = float(np.var(np.asarray(whole, np.float64), axis=0).sum())
    if variance == 0:
        raise ValueError("the layer's outputs do not vary on x, so their changes have no scale: give a loss")
    return lambda outputs: jnp.sum(jnp.square(outputs - whole)) / (len(whole) * variance)


@eqx.filter_jit
def _loss_and_slope(relaxed, loss, x, cuts):
    with full_precision():
        return jax.value_and_grad(lambda cuts: loss(relaxed(x, 1 - cuts)))(cuts)
