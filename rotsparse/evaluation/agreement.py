"""Do the restarts of a fit agree where it matters? Directions sorted by influence, singly and as subspaces.

A count of directions that are found again says little where a few of them carry nearly all of the influence, or where
many together span a subspace that every start finds, in whatever basis of it.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from rotsparse._core.checks import activations
from rotsparse._core.types import Rows
from rotsparse.data.scales import Scale
from rotsparse.engine.solution import SAME, Solution
from rotsparse.evaluation.numbering import influences as shares
from rotsparse.evaluation.units import Matrix, MatrixOut
from rotsparse.layers.base import Layer

# Subspaces whose mean squared cosine is above this count as the same.
SAME_SUBSPACE = 0.9


class Block(NamedTuple):
    """The span of the `size` most influential fitted directions: `cosine` is the mean squared cosine of its principal
    angles with the span of as many of another restart (of the one that agrees least), `chance` what it would be on
    average for a random subspace, and `influence` the share that these directions carry."""

    size: int
    cosine: float
    chance: float
    influence: float


@dataclass(frozen=True)
class Agreement:
    """How far the restarts agree on the directions of one space, the most influential first.

    `order`: the fitted directions by influence, as rows of the rotation. `influence`: the share of the mean squared
    (scaled) Jacobian that each of them holds, as a row (output direction) or column (input direction). `cosines`: of
    each the `|cos|` with its match in the restart where that is lowest. `blocks`: the spans of the strongest 1, 2, 5,
    10, 20, … of them.
    """

    space: str
    order: Int[np.ndarray, "k"]
    influence: Float[np.ndarray, "k"]
    cosines: Float[np.ndarray, "k"]
    blocks: tuple[Block, ...]

    @property
    def side(self) -> str:
        """What the space is in words."""
        return {"in": "input", "out": "output"}.get(self.space, self.space)

    @property
    def again(self) -> Bool[np.ndarray, "k"]:
        """Which directions every other restart finds again."""
        return self.cosines > SAME

    @property
    def carried(self) -> float:
        """The share of the influence that directions carry which every other restart finds again."""
        return float(self.influence[self.again].sum())

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for `json.dump`."""
        return {
            "order": self.order.tolist(),
            "influence": self.influence.tolist(),
            "carried": self.carried,
            "blocks": [block._asdict() for block in self.blocks],
        }

    def sentence(self) -> str:
        """How many directions are found again and what they carry; and the largest subspace, if it carries 5% more."""
        found = int(self.again.sum())
        if found:
            verb, they = ("is", "it carries") if found == 1 else ("are", "they carry")
            said = (
                f"{found} of {len(self.order)} {self.side} directions {verb} found again by every start "
                f"(|cos| > {SAME}); {they} {self.carried:.0%} of the influence."
            )
        else:
            said = f"None of {len(self.order)} {self.side} directions is found again by every start (|cos| > {SAME})."
        same = [b for b in self.blocks if b.size > 1 and b.cosine > SAME_SUBSPACE and b.chance < SAME_SUBSPACE / 2]
        if same and same[-1].influence > self.carried + 0.05:
            block = same[-1]
            said += (
                f" Together, the {block.size} strongest span nearly the same subspace in every start (mean cos² "
                f"{block.cosine:.2f}, chance {block.chance:.2f}) and carry {block.influence:.0%}."
            )
        return said


def agreements(
    layer: Layer,
    x: Rows,
    solution: Solution,
    *,
    scale_inputs: Scale = True,
    scale_outputs: Scale = False,
    covariance: Matrix | None = None,
    covariance_out: MatrixOut | None = None,
) -> dict[str, Agreement]:
    """For every space of which directions were fitted, how far the restarts of a fit of this layer agree; `{}` after a
    single one. The influence is that on `x`, held-out inputs say. In a tied fit a direction's influence is the mean of
    those as an input and as an output. Options are as in `metrics.evaluate`.

    One pass over the Jacobians for each restart. Raises `ValueError` where shapes do not fit.
    """
    if len(solution.candidates) == 1:
        return {}
    x = activations("x", x, layer.d_in)
    units: dict[str, Any] = {"scale_inputs": scale_inputs, "scale_outputs": scale_outputs}
    units |= {"covariance": covariance, "covariance_out": covariance_out}
    best = solution.best
    candidates = [{name: np.asarray(r, np.float64) for name, r in of.items()} for of in solution.candidates]
    influences = [shares(layer, x, bases, units) for bases in candidates]
    found = {}
    for space, cosines in solution.agreement().items():
        free = np.flatnonzero(solution.free[space])
        if not len(free):
            continue
        orders = [free[np.argsort(-of[space][free], kind="stable")] for of in influences]
        ranked = [bases[space][order] for bases, order in zip(candidates, orders, strict=True)]
        others = [rows for i, rows in enumerate(ranked) if i != best]
        influence = influences[best][space][orders[best]]
        blocks = [
            Block(k, min(map(_mean_squared_cosine, [ranked[best][:k]] * len(others), [rows[:k] for rows in others])),
                  k / len(free), float(influence[:k].sum()))
            for k in _sizes(len(free))
        ]  # fmt: skip
        lowest = cosines.min(axis=0)[orders[best]]
        found[space] = Agreement(space, orders[best], influence, lowest, tuple(blocks))
    return found


def _mean_squared_cosine(a, b) -> float:
    """Of the principal angles between the spans of the orthonormal rows of two matrices `[k, d]`."""
    return float(np.square(a @ b.T).sum() / len(a))


def _sizes(most: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, … below a number."""
    sizes = [step * 10**power for power in range(len(str(most))) for step in (1, 2, 5)]
    return [size for size in sizes if size < most]
