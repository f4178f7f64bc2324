"""`rs.plot`: the pictures of a report, each on a Matplotlib axes that the caller gives.

    figure, ax = pyplot.subplots()
    rs.plot.sorted_magnitudes(ax, rs.plot.picture_data(layer, x_test, bases, scale_inputs=True))

Two bases have a colour of their own, the learned one and (where a comparison is at hand) the best of the others;
neurons are drawn in ink, everything else in grey. Colours are those of Okabe & Ito ("Color Universal Design", 2008),
which people with any colour vision can tell apart.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from rotsparse.engine.solution import Solution
from rotsparse.evaluation.compare import Comparison
from rotsparse.evaluation.names import HIGHER_IS_SPARSER, basis_name, metric_name
from rotsparse.report.data import AFTER, BEFORE, PictureData
from rotsparse.report.data import picture_data as picture_data

# Entries that the metric "fraction_below_0.1_rms" counts are as the paper in the pictures of matrices.
SMALL = 0.1
SHARE_SMALL = "fraction_below_0.1_rms"

# A metric whose positive values span more than this factor has a logarithmic axis.
SPAN = 20

# Space between the numbers of directions, in points.
_APART = 7.0


class Theme(NamedTuple):
    """Colours for one kind of page."""

    ink: str
    soft: str
    grid: str
    pale: str
    learned: str
    rival: str
    dark: bool

    @property
    def inks(self) -> LinearSegmentedColormap:
        """Magma, beginning at the paper with a slow ramp. Its lightness is monotonic, so it also works in grey."""
        ramp = np.linspace(0, 1, 32)
        shades = [colormaps["magma"](0.12 + 0.88 * t if self.dark else 0.88 - 0.88 * t) for t in ramp]
        stops = zip(0.18 + 0.82 * ramp, shades, strict=True)
        paper = (*shades[0][:3], 0.0) if self.dark else (1.0, 1.0, 1.0, 1.0)
        return LinearSegmentedColormap.from_list("inks", [(0.0, paper), *stops], N=512)


LIGHT = Theme("#222222", "#8a8a8a", "#e6e6e6", "#c4c4c4", "#d55e00", "#0072b2", False)
DARK = Theme("#e6e6e6", "#8b929c", "#363a41", "#565c66", "#ff8c3c", "#56b4e9", True)


def matrix(
    ax: Axes,
    z: Float[np.ndarray, "d_out d_in"],
    order: tuple[Int[np.ndarray, "d_out"], Int[np.ndarray, "d_in"]] | None = None,
    *,
    largest: float | None = None,
    theme: Theme = LIGHT,
) -> AxesImage:
    """Magnitudes of a Jacobian, in units of the rms of its entries, on a logarithmic scale from 0.1 to `largest`
    (default: of `z`). `order`: the numbers of the output and input directions from top to bottom and left to right
    (default: as they are), which the axes show."""
    rows, columns = (np.arange(n) for n in z.shape) if order is None else order
    norm = LogNorm(SMALL, max(1.0, float(z.max()) if largest is None else largest), clip=True)
    shown = z[rows][:, columns]
    image = ax.imshow(shown, cmap=theme.inks, norm=norm, aspect="auto", interpolation_stage="data")
    ax.set_box_aspect(1)
    ax.set_facecolor("none")
    for axis, numbers in ((ax.xaxis, columns), (ax.yaxis, rows)):
        side = min(ax.get_position().width * ax.figure.get_figwidth() * 72, 240)  # pyright: ignore
        step = max(1, int(np.ceil(len(numbers) * _APART / side)))
        at = np.arange(0, len(numbers), step)
        axis.set_ticks(at, [str(n) for n in numbers[at]])
    ax.tick_params(labelsize=4.5, labelcolor=theme.soft, color=theme.soft, length=1.5, width=0.4, pad=1)
    ax.tick_params(axis="x", labelrotation=90)
    for spine in ax.spines.values():
        spine.set(color=theme.soft, linewidth=0.6)
    return image


def by_influence(
    z: Float[np.ndarray, "d_out d_in"],
) -> tuple[Int[np.ndarray, "d_out"], Int[np.ndarray, "d_in"]]:
    """The order of rows and of columns by their energy, the largest first. Unlike an order that pairs rows with columns
    it draws no diagonal into noise."""
    square = np.square(z)
    return tuple(np.argsort(-square.sum(axis=axis), kind="stable") for axis in (1, 0))  # type: ignore[return-value]


def sorted_magnitudes(
    ax: Axes, data: PictureData, comparison: Comparison | None = None, *, theme: Theme = LIGHT
) -> None:
    """|z| of all entries of all examples, largest first, for every basis. With a comparison the best other basis is
    named."""
    for basis, style in _styles(list(data.curves), comparison, theme).items():
        ax.plot(data.ranks, data.curves[basis], **style)
    tidy(ax, theme)
    ax.set_yscale("log")
    ax.set_xlim(0, 1)
    ax.set_ylim(1e-3, 1.5 * max(curve[0] for curve in data.curves.values()))
    ax.minorticks_off()
    ax.axhline(SMALL, color=theme.ink, lw=0.8, ls=":")
    said = ax.annotate(f"{SMALL} rms", (1, SMALL), (-2, 2), textcoords="offset points", ha="right")
    said.set(fontsize=7, color=theme.ink)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.set_xlabel("share of entries")
    ax.set_ylabel("|∂ output / ∂ input|  (rms = 1)")


def small_entries(ax: Axes, comparison: Comparison, *, by_row: bool = False, theme: Theme = LIGHT) -> None:
    """The share of entries below every threshold, in units of the rms of all entries or, `by_row`, of their row."""
    _shares(ax, comparison, ("thresholds", "below_by_row" if by_row else "below"), theme)
    ax.set_xlabel("|z| below … rms of the row" if by_row else "|z| below … rms")


def energy(ax: Axes, comparison: Comparison, *, theme: Theme = LIGHT) -> None:
    """The share of the mean squared Jacobian in every number of its largest entries."""
    _shares(ax, comparison, ("top", "energy"), theme)
    ax.set_xlabel("largest entries")


def history(ax: Axes, solution: Solution, floor: float | None = None, *, theme: Theme = LIGHT) -> None:
    """The objective of every restart against the step, the values by which rotations were chosen, and the floor. The
    axis begins where the values do, and is logarithmic where they span more than a factor of 10."""
    course = solution.history
    chosen = int(np.argmin(solution.candidate_values))
    checked = "all" if solution.validation_value is None else "held-out"
    others = [r for r in range(len(course.objective)) if r != chosen]
    for r in [*others, chosen]:
        line, mark, lw, ms = (theme.learned, theme.rival, 1.8, 4) if r == chosen else (theme.soft, theme.soft, 0.9, 2.5)
        ax.plot(course.objective[r], color=line, lw=lw)
        ax.plot(course.checked_at, course.checked[r], color=mark, lw=0, marker="o", ms=ms, clip_on=False, zorder=3)
    handles = [
        *ax.plot([], [], color=theme.learned, lw=1.8, label="at every step" + (", chosen restart" if others else "")),
        *ax.plot(
            [], [], color=theme.rival, lw=0, marker="o", ms=4, label=f"on {checked} examples, by which it is chosen"
        ),
    ]
    if others:
        handles += ax.plot([], [], color=theme.soft, lw=0.9, marker="o", ms=2.5, label="other restarts")
    if floor is not None:
        said = f"floor, {floor:.3g}: no rotations get below"
        handles.append(ax.axhline(floor, color=theme.ink, lw=1, ls="--", label=said))
    tidy(ax, theme)
    values = np.concatenate([course.objective.ravel(), course.checked.ravel(), [] if floor is None else [floor]])
    values = values[np.isfinite(values)]
    if len(values) and values.max() > values.min():
        if values.min() > 0 and values.max() > 10 * values.min():
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=9))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            ax.yaxis.set_minor_formatter(NullFormatter())
            ax.minorticks_off()
            ax.set_ylim(values.min() / 1.15, values.max() * 1.15)
        else:
            room = 0.05 * (values.max() - values.min())
            ax.set_ylim(values.min() - room, values.max() + room)
    ax.set_xlim(0, max(1, course.checked_at[-1]))
    ax.set_xlabel("step")
    ax.set_ylabel("objective")
    ax.legend(handles=handles, frameon=False, fontsize=8, labelcolor=theme.ink)


def metric(ax: Axes, comparison: Comparison, name: str, *, theme: Theme = LIGHT) -> None:
    """A metric of every basis with its 95% interval, a line a basis, the best with a larger mark; on a logarithmic axis
    where the values span more than a factor of 20. Raises `ValueError` for an unknown metric."""
    bases, best = list(comparison.metrics), comparison.best(name)
    heights = np.arange(len(bases))[::-1]
    values, lows, highs = (np.array(of) for of in zip(*(comparison.metrics[b][name] for b in bases), strict=True))
    colours = [{AFTER: theme.learned, BEFORE: theme.ink}.get(basis, theme.soft) for basis in bases]
    sizes = [36 if basis == best else 14 for basis in bases]
    logarithmic = bool(lows.min() > 0 and highs.max() > SPAN * lows.min())
    ax.hlines(heights, lows, highs, colors=colours, lw=2)
    for value, height, colour, size in zip(values, heights, colours, sizes, strict=True):
        ax.scatter(value, height, c=colour, s=size, marker="D" if size > 14 else "o", clip_on=False, zorder=3)
    tidy(ax, theme, grid="x")
    ax.set_yticks(heights, [basis_name(basis) for basis in bases])
    ax.tick_params(axis="y", length=0)
    if logarithmic:
        ax.set_xscale("log")
        subs = (1.0,) if highs.max() > 100 * lows.min() else (1.0, 3.0)
        ax.xaxis.set_major_locator(LogLocator(subs=subs, numticks=6))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.minorticks_off()
        ax.set_xlim(lows.min() / 1.3, highs.max() * 1.3)
    else:
        ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        ax.set_xlim(left=0 if lows.min() >= 0 else None)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.10g}"))
    ax.set_ylim(-0.7, len(bases) - 0.3)
    better = "higher is sparser →" if HIGHER_IS_SPARSER[name] else "← lower is sparser"
    title(ax, metric_name(name), better + (", logarithmic" if logarithmic else ""), size=9, theme=theme)
    for text, basis in zip(ax.get_yticklabels(), bases, strict=False):  # none inside a grid of panels
        if basis == AFTER:
            text.set(color=theme.learned, fontweight="bold")


# --- parts --------------------------------------------------------------------------------------------------------


def tidy(ax: Axes, theme: Theme, grid: str = "both") -> None:
    """The look of an axes: no box, a faint grid."""
    ax.set_facecolor("none")
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(theme.soft)
    ax.grid(axis=grid, color=theme.grid, lw=0.6)  # pyright: ignore[reportArgumentType]
    ax.set_axisbelow(True)
    ax.tick_params(which="both", labelsize=8, labelcolor=theme.ink, color=theme.soft)
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set(fontsize=8, color=theme.ink)


def title(ax: Axes, said: str, below: str, *, size: float, theme: Theme) -> None:
    """A bold title with a line of smaller text below it."""
    ax.set_title(said, loc="left", fontsize=size, fontweight="bold", color=theme.ink, pad=4 + 1.4 * (size - 1.5))
    line = ax.annotate(below, (0, 1), (0, 4), xycoords="axes fraction", textcoords="offset points")
    line.set(fontsize=size - 1.5, color=theme.soft if theme.dark else "#5a5a5a")


def best_rival(bases: Sequence[str], comparison: Comparison | None) -> str | None:
    """The other basis with most small entries; `None` if there is none, or no comparison."""
    rivals = [basis for basis in bases if basis not in (BEFORE, AFTER)]
    if comparison is None or not rivals:
        return None
    return max(rivals, key=lambda basis: comparison.metrics[basis][SHARE_SMALL].value)


def _styles(bases: Sequence[str], comparison: Comparison | None, theme: Theme) -> dict[str, dict]:
    """How the line of every basis is drawn, in the order of drawing: grey ones first, and of these one has a label."""
    best = best_rival(bases, comparison)
    named = {best: (theme.rival, 1.6), BEFORE: (theme.ink, 1.6), AFTER: (theme.learned, 2.6)}
    others = [basis for basis in bases if basis not in named]
    count = "other bases" if best is None else f"{len(others)} other bases"
    styles: dict[str, dict] = {
        b: {"color": theme.pale, "lw": 0.9, "label": "" if i else count} for i, b in enumerate(others)
    }
    for basis, (colour, lw) in named.items():
        if basis in bases:
            assert basis is not None
            styles[basis] = {"color": colour, "lw": lw, "label": basis_name(basis)}
    return styles


def _shares(ax: Axes, comparison: Comparison, columns: tuple[str, str], theme: Theme) -> None:
    for basis, style in _styles(list(comparison.curves), comparison, theme).items():
        ax.plot(*(getattr(comparison.curves[basis], column) for column in columns), **style)
    tidy(ax, theme)
    ax.set_xscale("log")
    ax.set_ylim(0, 1)
    ax.minorticks_off()
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))
    ax.yaxis.set_major_formatter(PercentFormatter(1))
