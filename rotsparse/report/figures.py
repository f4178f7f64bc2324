"""The report's figures, drawn with Matplotlib's object interface: no pyplot and no global state, so any thread may
draw.

Colours are those of Okabe & Ito ("Color Universal Design", 2008), which people with any colour vision can tell apart.
Important curves also have a label, or another width or line style.
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from rotsparse.engine.solution import Solution
from rotsparse.evaluation.compare import Comparison
from rotsparse.evaluation.names import HIGHER_IS_SPARSER, basis_name, metric_name
from rotsparse.report.data import AFTER, BEFORE, PictureData
from rotsparse.report.ordering import diagonal_order

DPI = 200
INK, GREY, PALE, LEARNED, RIVAL = "#222222", "#8a8a8a", "#c4c4c4", "#d55e00", "#0072b2"
PALETTE = ("#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#b8860b")
# Entries that the metric "fraction_below_0.1_rms" counts are white in the pictures of matrices.
SMALL = 0.1
SHARE_SMALL = "fraction_below_0.1_rms"
# Magma, beginning at white with a slow ramp. Its lightness is monotonic, so it also works in grey.
INKS = LinearSegmentedColormap.from_list(
    "inks",
    [(0.0, "#ffffff"), *((0.18 + 0.82 * t, colormaps["magma"](0.88 - 0.88 * t)) for t in np.linspace(0, 1, 32))],
    N=512,
)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def overview(data: PictureData, comparison: Comparison) -> Figure:
    """Mean |Jacobian| before and after, and the sorted magnitudes, in one figure of 1600 × 680 pixels."""
    width, height, side = 8, 3.4, 2.2
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    place = lambda x, y, w, h: figure.add_axes((x / width, y / height, w / width, h / height))  # noqa: E731
    left, bottom = 0.28, 0.74
    matrices = [place(left, bottom, side, side), place(left + side + 0.22, bottom, side, side)]
    image = _before_and_after(list(matrices), data, comparison, size=9)
    _colour_bar(figure, image, "mean |∂ output / ∂ input|  (rms = 1)", cax=place(1.4, 0.4, 2.4, 0.07))

    ax = place(5.52, bottom, 2.28, side)
    rivals = [basis for basis in data.curves if basis not in (BEFORE, AFTER)]
    best = max(rivals, key=lambda basis: _share_small(comparison, basis), default=None)
    handles = {}
    for basis in rivals:
        if basis != best:
            (handles["other baselines"],) = ax.plot(data.ranks, data.curves[basis], color=PALE, lw=0.8)
    styles = {best: (RIVAL, 1.4), BEFORE: (INK, 1.4), AFTER: (LEARNED, 2.4)}
    for basis, (colour, lw) in styles.items():
        if basis:
            (handles[basis_name(basis)],) = ax.plot(data.ranks, data.curves[basis], color=colour, lw=lw)
    _magnitude_axes(ax, data, top=10)
    ax.legend(
        list(handles.values())[::-1],
        list(handles)[::-1],
        frameon=False,
        fontsize=7,
        labelcolor=INK,
        loc="upper right",
        borderpad=0,
        labelspacing=0.3,
    )
    _title(ax, "All entries of all examples", "sorted, largest first", size=9)
    return figure


def heat_maps(data: PictureData, comparison: Comparison) -> Figure:
    """Mean |Jacobian| before and after."""
    figure = _figure(8, 4.05)
    axes = figure.subplots(1, 2)
    image = _before_and_after(list(axes), data, comparison, size=10)
    _colour_bar(figure, image, "mean |∂ output / ∂ input|  (rms = 1)", ax=axes)
    return figure


def examples(data: PictureData) -> Figure:
    """|Jacobian| of single examples, before (top) and after (bottom), in the order of the means."""
    count = len(data.examples[BEFORE])
    figure = _figure(8, 1.1 + 2 * 6.5 / count)
    axes = figure.subplots(2, count, squeeze=False)
    for row, basis, title in zip(axes, (BEFORE, AFTER), ("Before", "After"), strict=True):
        for i, (ax, z) in enumerate(zip(row, data.examples[basis], strict=True)):
            image = _matrix(ax, data, basis, z)
            share = f"{np.mean(z < SMALL):.0%} below {SMALL} rms"
            ax.set_title(f"example {i + 1}: {share}", loc="left", fontsize=8, color=INK)
        row[0].set_ylabel(f"{title}: {basis_name(basis)}", fontsize=9, fontweight="bold", color=INK)
    _colour_bar(figure, image, "|∂ output / ∂ input|  (rms = 1)", ax=axes)
    return figure


def sorted_magnitudes(data: PictureData, comparison: Comparison) -> Figure:
    """|z| of all entries of all examples, largest first, for every basis."""
    figure = _figure(8, 4.3)
    ax = figure.subplots()
    # Order the legend from top to bottom as the curves are ordered from right to left at the threshold.
    bases = sorted(data.curves, key=lambda basis: _share_small(comparison, basis))
    for basis in bases:
        label = f"{_share_small(comparison, basis):.0%}  {basis_name(basis)}"
        ax.plot(data.ranks, data.curves[basis], label=label, **_line(basis, bases))
    _magnitude_axes(ax, data)
    legend = ax.legend(
        title=f"share of entries below {SMALL} rms",
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        alignment="left",
    )
    legend.get_title().set(fontsize=8, color=GREY)
    for text, basis in zip(legend.get_texts(), bases, strict=True):
        if basis == AFTER:
            text.set(color=LEARNED, fontweight="bold")
    return figure


def curves(comparison: Comparison) -> Figure:
    """Shares of small entries against the threshold, by one rms and row by row, and the energy in the largest entries,
    of every basis."""
    figure = _figure(8, 3.6)
    panels = figure.subplots(1, 3, sharey=True)
    # In the order of `sorted_magnitudes`, so that a basis has one colour in both figures.
    bases = sorted(comparison.curves, key=lambda basis: _share_small(comparison, basis))
    for basis in bases:
        c = comparison.curves[basis]
        points = ((c.thresholds, c.below), (c.thresholds, c.below_by_row), (c.top, c.energy))
        for ax, (sizes, shares) in zip(panels, points, strict=True):
            ax.plot(sizes, shares, label=basis_name(basis), **_line(basis, bases))
    titles = ("Small entries", "By row", "Largest entries")
    below = ("in units of one rms of all entries", "in units of the rms of their row", "of the mean squared Jacobian")
    labels = ("|z| below … rms", "|z| below … rms of the row", "largest entries")
    for ax, title, line, label in zip(panels, titles, below, labels, strict=True):
        _style(ax)
        ax.set_xscale("log")
        ax.set_ylim(0, 1)
        ax.minorticks_off()
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))
        ax.yaxis.set_major_formatter(PercentFormatter(1))
        ax.set_xlabel(label)
        _title(ax, title, line, size=9)
    panels[0].set_ylabel("share of entries; at the right, of the energy")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=7, labelcolor=INK)
    return figure


def history(solution: Solution, floor: float | None = None) -> Figure:
    """The objective of every restart against the step, the values by which rotations were chosen, and the floor."""
    figure = _figure(8, 3.6)
    ax = figure.subplots()
    course = solution.history
    chosen = int(np.argmin(solution.candidate_values))
    checked = "all" if solution.validation_value is None else "held-out"
    others = [r for r in range(len(course.objective)) if r != chosen]
    for r in [*others, chosen]:
        line, mark, lw, ms = (LEARNED, RIVAL, 1.8, 4) if r == chosen else (GREY, GREY, 0.9, 2.5)
        ax.plot(course.objective[r], color=line, lw=lw)
        ax.plot(course.checked_at, course.checked[r], color=mark, lw=0, marker="o", ms=ms, clip_on=False, zorder=3)
    handles = [
        *ax.plot([], [], color=LEARNED, lw=1.8, label="at every step" + (", chosen restart" if others else "")),
        *ax.plot([], [], color=RIVAL, lw=0, marker="o", ms=4, label=f"on {checked} examples, by which it is chosen"),
    ]
    if others:
        handles += ax.plot([], [], color=GREY, lw=0.9, marker="o", ms=2.5, label="other restarts")
    if floor is not None:
        handles.append(ax.axhline(floor, color=INK, lw=1, ls="--", label=f"floor, {floor:.3g}: no rotations get below"))
    _style(ax)
    negative = (course.checked < 0).any() or (floor is not None and floor < 0)
    ax.set_ylim(bottom=None if negative else 0)
    ax.set_xlim(0, max(1, course.checked_at[-1]))
    ax.set_xlabel("step")
    ax.set_ylabel("objective")
    ax.legend(handles=handles, frameon=False, fontsize=8, labelcolor=INK)
    return figure


def metrics(comparison: Comparison) -> Figure:
    """Every metric with its 95% interval: one panel a metric, one line a basis, the best with a larger mark."""
    bases = list(comparison.metrics)
    names = list(comparison.metrics[bases[0]])
    columns = 3
    rows = -(-len(names) // columns)
    figure = _figure(8, 0.2 + rows * (0.65 + 0.165 * len(bases)))
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    heights = np.arange(len(bases))[::-1]
    colours = [{AFTER: LEARNED, BEFORE: INK}.get(basis, GREY) for basis in bases]
    for ax, metric in zip(axes.flat, names, strict=False):
        values, lows, highs = zip(*(comparison.metrics[basis][metric] for basis in bases), strict=True)
        best = bases.index(comparison.best(metric))
        ax.hlines(heights, lows, highs, colors=colours, lw=2)
        ax.scatter(values, heights, c=colours, s=14, clip_on=False, zorder=3)
        ax.scatter(values[best], heights[best], c=colours[best], marker="D", s=36, clip_on=False, zorder=3)
        _style(ax, grid="x")
        ax.set_yticks(heights, [basis_name(basis) for basis in bases])
        ax.tick_params(axis="y", length=0)
        ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.10g}"))
        ax.set_xlim(left=0 if min(lows) >= 0 else None)
        ax.set_ylim(-0.7, len(bases) - 0.3)
        better = "higher is sparser →" if HIGHER_IS_SPARSER[metric] else "← lower is sparser"
        _title(ax, metric_name(metric), better, size=9)
    for ax in axes.flat[len(names) :]:
        ax.set_axis_off()
    for ax in axes[:, 0]:
        for text, basis in zip(ax.get_yticklabels(), bases, strict=True):
            if basis == AFTER:
                text.set(color=LEARNED, fontweight="bold")
    return figure


# --- parts --------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def _style(ax: Axes, grid: str = "both") -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.grid(axis=grid, color="#e6e6e6", lw=0.6)  # pyright: ignore[reportArgumentType]
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=8, labelcolor=INK, color=GREY)
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set(fontsize=8, color=INK)


def _title(ax: Axes, title: str, below: str, size: float) -> None:
    """A bold title with a line of smaller text below it."""
    ax.set_title(title, loc="left", fontsize=size, fontweight="bold", color=INK, pad=4 + 1.4 * (size - 1.5))
    line = ax.annotate(below, (0, 1), (0, 4), xycoords="axes fraction", textcoords="offset points")
    line.set(fontsize=size - 1.5, color="#5a5a5a")


def _line(basis: str, bases: Sequence[str]) -> dict[str, Any]:
    """How the curve of one of the bases is drawn: neurons and learned stand out."""
    if basis == BEFORE:
        return {"color": INK, "lw": 1.6, "zorder": 2}
    if basis == AFTER:
        return {"color": LEARNED, "lw": 2.6, "zorder": 3}
    cycle, i = divmod([b for b in bases if b not in (BEFORE, AFTER)].index(basis), len(PALETTE))
    return {"color": PALETTE[i], "lw": 1.1, "ls": ("-", "--", ":")[cycle % 3], "zorder": 2}


def _before_and_after(
    axes: Sequence[Axes] | np.ndarray, data: PictureData, comparison: Comparison, size: float
) -> AxesImage:
    for ax, basis, title in zip(axes, (BEFORE, AFTER), ("Before", "After"), strict=True):
        image = _matrix(ax, data, basis, data.mean[basis])
        share = f"{_share_small(comparison, basis):.0%} of entries below {SMALL} rms"
        _title(ax, f"{title}: {basis_name(basis)}", share, size)
        ax.set_xlabel("input direction", fontsize=8, color=INK)
    axes[0].set_ylabel("output direction", fontsize=8, color=INK)
    return image


def _matrix(ax: Axes, data: PictureData, basis: str, matrix: np.ndarray) -> AxesImage:
    """One matrix with rows and columns in the order of its basis's mean, on the shared colour scale."""
    rows, columns = diagonal_order(data.mean[basis])
    norm = LogNorm(SMALL, max(1.0, *(float(m.max()) for m in data.mean.values())), clip=True)
    image = ax.imshow(matrix[rows][:, columns], cmap=INKS, norm=norm, aspect="auto", interpolation_stage="data")
    ax.set_box_aspect(1)
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set(color=GREY, linewidth=0.6)
    return image


def _colour_bar(figure: Figure, image: AxesImage, label: str, *, ax=None, cax: Axes | None = None) -> None:
    if cax is None:
        bar = figure.colorbar(image, ax=ax, shrink=0.8, aspect=35, pad=0.02)
    else:
        bar = figure.colorbar(image, cax=cax, orientation="horizontal")
    ticks = [t for t in (0.1, 0.3, 1, 3, 10, 30, 100, 300) if t <= image.get_clim()[1]]
    bar.set_ticks(ticks, labels=[f"≤ {t:g}" if t == SMALL else f"{t:g}" for t in ticks])
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=7, labelcolor=INK, color=GREY, pad=2)
    bar.outline.set(edgecolor=GREY, linewidth=0.6)
    bar.set_label(label, fontsize=8, color=INK, labelpad=3)


def _magnitude_axes(ax: Axes, data: PictureData, top: float = 1.5) -> None:
    _style(ax)
    ax.set_yscale("log")
    ax.set_xlim(0, 1)
    ax.set_ylim(1e-3, top * max(curve[0] for curve in data.curves.values()))
    ax.minorticks_off()
    ax.axhline(SMALL, color=INK, lw=0.8, ls=":")
    ax.annotate(f"{SMALL} rms", (1, SMALL), (-2, 2), textcoords="offset points", ha="right", fontsize=7, color=INK)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.set_xlabel("share of entries")
    ax.set_ylabel("|∂ output / ∂ input|  (rms = 1)")


def _share_small(comparison: Comparison, basis: str) -> float:
    return comparison.metrics[basis][SHARE_SMALL].value
