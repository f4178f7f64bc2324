"""The directions of the network that adds (`examples.addition`), drawn as waves over the numbers."""

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from rotsparse._core.types import AnyArray
from rotsparse.evaluation.names import basis_name
from rotsparse.examples.addition import waves
from rotsparse.layers.rotations import Rotations
from rotsparse.report.figures import DPI, GREY, INK, LEARNED, RIVAL

CAPTION = (
    "The strongest input directions of each basis: the coordinate of every number from 0 to 58. The network adds with "
    "waves; a direction that is one wave shows its frequency (how often it goes round) and the share of its variance "
    "that this frequency holds. Neurons and principal components mix several."
)


def picture(
    embedding: Float[AnyArray, "modulus width"], bases: dict[str, Rotations], *, count: int = 6
) -> tuple[Figure, str]:
    """The directions along which the numbers vary most, in the bases of neurons, PCA and the fit; and a caption."""
    shown = {name: color for name, color in (("neurons", INK), ("pca", RIVAL), ("learned", LEARNED)) if name in bases}
    figure = Figure(figsize=(8, 1.2 * len(shown) + 0.5), dpi=DPI, facecolor="white", layout="constrained")
    grid = figure.subplots(len(shown), count, sharex=True, squeeze=False)
    for row, (name, color) in zip(grid, shown.items(), strict=True):
        found = waves(embedding, bases[name].r_in)
        strongest = np.argsort(-np.square(found.coordinates).sum(axis=0), kind="stable")[:count]
        for ax, i in zip(row, strongest, strict=False):
            ax.axhline(0, color=GREY, lw=0.4)
            ax.plot(found.coordinates[:, i], color=color, lw=1.1, marker=".", ms=2)
            ax.set_title(f"{found.frequency[i]}×: {found.purity[i]:.0%}", fontsize=7, color=INK, pad=3)
            ax.set_yticks([])
            ax.set_xticks([0, len(embedding) - 1])
            ax.tick_params(labelsize=6, colors=GREY, length=2)
            ax.set_facecolor("none")
            ax.spines["bottom"].set_color(GREY)
            for side in ("top", "right", "left"):
                ax.spines[side].set_visible(False)
        row[0].set_ylabel(basis_name(name), fontsize=8, fontweight="bold", color=INK)
    figure.supxlabel("number", fontsize=7, color=INK)
    return figure, CAPTION


def purity(embedding: Float[AnyArray, "modulus width"], rotations: Rotations) -> float:
    """The share of the embedding's variance that lies in the strongest frequency of its direction."""
    found = waves(embedding, rotations.r_in)
    power = np.square(found.coordinates).sum(axis=0)
    return float(power @ found.purity / power.sum())
