"""The report's figures, drawn with Matplotlib's object interface: no pyplot, so any thread may draw. What is on an axes
is drawn by `report.plot`."""

import io
import re
from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from rotsparse.engine.solution import Solution
from rotsparse.evaluation.compare import Comparison
from rotsparse.evaluation.names import basis_name
from rotsparse.report import plot
from rotsparse.report.data import AFTER, BEFORE, PictureData
from rotsparse.report.plot import LIGHT, SHARE_SMALL, SMALL, Theme

DPI = 200
INK, GREY, LEARNED, RIVAL = LIGHT.ink, LIGHT.soft, LIGHT.learned, LIGHT.rival
PALETTE = (RIVAL, "#009e73", "#cc79a7", "#56b4e9", "#b8860b")

# The colours of a light figure in an SVG, as variables of the page that it is shown in.
_VARIABLES = {
    "ink": LIGHT.ink,
    "soft": LIGHT.soft,
    "below": "#5a5a5a",
    "grid": LIGHT.grid,
    "pale": LIGHT.pale,
    "learned": LIGHT.learned,
    "rival": LIGHT.rival,
}


def png(figure: Figure, *, transparent: bool = False) -> bytes:
    """The figure as a PNG file, on white unless it is `transparent`."""
    figure.set_facecolor("none" if transparent else "white")
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def svg(figure: Figure) -> bytes:
    """The figure as an SVG file with a transparent background."""
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    return _vector(figure, "svg", nothing)


def pdf(figure: Figure) -> bytes:
    """The figure as a PDF file with a transparent background."""
    return _vector(figure, "pdf", dict.fromkeys(("CreationDate", "Creator", "Producer")))


def _vector(figure: Figure, kind: str, metadata: dict) -> bytes:
    figure.set_facecolor("none")
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "rotsparse"}):  # the same figure gives the same bytes
        figure.savefig(buffer, format=kind, metadata=metadata)
    return buffer.getvalue()


def inline(drawn: bytes) -> str:
    """An SVG file of `svg` as an element of a page, whose colours follow the page: `var(--figure-ink)` and so on."""
    text = drawn.decode()
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text[text.index("<svg") :])
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for name, colour in _VARIABLES.items():
        text = text.replace(colour, f"var(--figure-{name})")
    return text.strip()


def overview(data: PictureData, comparison: Comparison, theme: Theme = LIGHT) -> Figure:
    """Mean |Jacobian| before and after, and the sorted magnitudes, in one figure of 1600 × 680 pixels."""
    width, height, side = 8, 3.4, 2.2
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    place = lambda x, y, w, h: figure.add_axes((x / width, y / height, w / width, h / height))  # noqa: E731
    left, bottom = 0.36, 0.74
    matrices = [place(left, bottom, side, side), place(left + side + 0.3, bottom, side, side)]
    image = _before_and_after(list(matrices), data, comparison, theme, size=9)
    _colour_bar(figure, image, "mean |∂ output / ∂ input|  (rms = 1)", theme, cax=place(1.4, 0.36, 2.4, 0.07))
    ax = place(5.66, bottom, 2.1, side)
    plot.sorted_magnitudes(ax, data, comparison, theme=theme)
    ax.set_ylim(top=10 * max(curve[0] for curve in data.curves.values()))
    _legend(ax, theme, loc="upper right", fontsize=7)
    ax.set_ylabel("")
    plot.title(ax, "All entries of all examples", "|∂ output / ∂ input|  (rms = 1), sorted", size=9, theme=theme)
    return figure


def heat_maps(data: PictureData, comparison: Comparison, theme: Theme = LIGHT) -> Figure:
    """Mean |Jacobian| before and after."""
    figure = _figure(8, 4.15)
    axes = figure.subplots(1, 2)
    image = _before_and_after(list(axes), data, comparison, theme, size=10)
    _colour_bar(figure, image, "mean |∂ output / ∂ input|  (rms = 1)", theme, ax=axes)
    return figure


def examples(data: PictureData, theme: Theme = LIGHT) -> Figure:
    """|Jacobian| of single examples, before (top) and after (bottom), in the same order."""
    count = len(data.examples[BEFORE])
    figure = _figure(8, 1.1 + 2 * 6.5 / count)
    axes = figure.subplots(2, count, squeeze=False)
    for row, basis, name in zip(axes, (BEFORE, AFTER), ("Before", "After"), strict=True):
        for i, (ax, z) in enumerate(zip(row, data.examples[basis], strict=True)):
            image = _matrix(ax, data, basis, z, theme)
            share = f"{np.mean(z < SMALL):.0%} below {SMALL} rms"
            ax.set_title(f"example {i + 1}: {share}", loc="left", fontsize=8, color=theme.ink)
        row[0].set_ylabel(f"{name}: {basis_name(basis)}", fontsize=9, fontweight="bold", color=theme.ink)
    _colour_bar(figure, image, "|∂ output / ∂ input|  (rms = 1)", theme, ax=axes)
    return figure


def sorted_magnitudes(data: PictureData, comparison: Comparison, theme: Theme = LIGHT) -> Figure:
    """|z| of all entries of all examples, largest first, for every basis."""
    figure = _figure(8, 3.8)
    ax = figure.subplots()
    plot.sorted_magnitudes(ax, data, comparison, theme=theme)
    for line in ax.lines:
        basis = next((b for b in data.curves if line.get_label() == basis_name(b)), None)
        if basis is not None:
            line.set_label(f"{comparison.metrics[basis][SHARE_SMALL].value:.0%}  {basis_name(basis)}")
    legend = _legend(ax, theme, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
    legend.set_title(f"share below {SMALL} rms")
    legend.get_title().set(fontsize=8, color=theme.soft)
    return figure


def curves(comparison: Comparison, theme: Theme = LIGHT) -> Figure:
    """Shares of small entries against the threshold, by one rms and row by row, and the energy in the largest entries,
    of every basis."""
    figure = _figure(8, 3.3)
    panels = figure.subplots(1, 3, sharey=True)
    plot.small_entries(panels[0], comparison, theme=theme)
    plot.small_entries(panels[1], comparison, by_row=True, theme=theme)
    plot.energy(panels[2], comparison, theme=theme)
    titles = ("Small entries", "By row", "Largest entries")
    below = ("in units of one rms of all entries", "in units of the rms of their row", "of the mean squared Jacobian")
    for ax, said, line in zip(panels, titles, below, strict=True):
        plot.title(ax, said, line, size=9, theme=theme)
    panels[0].set_ylabel("share of entries; at the right, of the energy")
    handles, names = _handles(panels[0])
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=8, labelcolor=theme.ink)
    return figure


def history(solution: Solution, floor: float | None = None, theme: Theme = LIGHT) -> Figure:
    """The course of the fit."""
    figure = _figure(8, 3.6)
    plot.history(figure.subplots(), solution, floor, theme=theme)
    return figure


def metrics(comparison: Comparison, theme: Theme = LIGHT) -> Figure:
    """Every metric with its 95% interval: one panel a metric, one line a basis, the best with a larger mark."""
    names, columns = comparison.names, 3
    rows = -(-len(names) // columns)
    figure = _figure(8, 0.2 + rows * (0.65 + 0.165 * len(comparison.metrics)))
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for ax, name in zip(axes.flat, names, strict=False):
        plot.metric(ax, comparison, name, theme=theme)
    for ax in axes.flat[len(names) :]:
        ax.set_axis_off()
    return figure


# --- parts --------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def _before_and_after(
    axes: Sequence[Axes] | np.ndarray, data: PictureData, comparison: Comparison, theme: Theme, size: float
) -> AxesImage:
    for ax, basis, name in zip(axes, (BEFORE, AFTER), ("Before", "After"), strict=True):
        image = _matrix(ax, data, basis, data.mean[basis], theme)
        share = f"{comparison.metrics[basis][SHARE_SMALL].value:.0%} of entries below {SMALL} rms"
        plot.title(ax, f"{name}: {basis_name(basis)}", share, size=size, theme=theme)
        ax.set_xlabel("input direction", fontsize=8, color=theme.ink)
    axes[0].set_ylabel("output direction", fontsize=8, color=theme.ink)
    return image


def _matrix(ax: Axes, data: PictureData, basis: str, matrix: np.ndarray, theme: Theme) -> AxesImage:
    """One matrix on the shared colour scale: learned directions by number, which is by influence, neurons by the
    influence that they have on average."""
    largest = max(float(m.max()) for m in data.mean.values())
    order = None if basis == AFTER else plot.by_influence(data.mean[basis])
    return plot.matrix(ax, matrix, order, largest=largest, theme=theme)


def _colour_bar(
    figure: Figure, image: AxesImage, label: str, theme: Theme, *, ax=None, cax: Axes | None = None
) -> None:
    if cax is None:
        bar = figure.colorbar(image, ax=ax, shrink=0.8, aspect=35, pad=0.02)
    else:
        bar = figure.colorbar(image, cax=cax, orientation="horizontal")
    ticks = [t for t in (0.1, 0.3, 1, 3, 10, 30, 100, 300) if t <= image.get_clim()[1]]
    bar.set_ticks(ticks, labels=[f"≤ {t:g}" if t == SMALL else f"{t:g}" for t in ticks])
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=7, labelcolor=theme.ink, color=theme.soft, pad=2)
    bar.ax.set_facecolor("none")
    bar.outline.set(edgecolor=theme.soft, linewidth=0.6)  # pyright: ignore
    bar.set_label(label, fontsize=8, color=theme.ink, labelpad=3)


def _handles(ax: Axes) -> tuple[list, list[str]]:
    """The named lines of an axes, the learned basis first."""
    found = [(h, label) for h, label in zip(*ax.get_legend_handles_labels(), strict=True) if label][::-1]
    return [h for h, _ in found], [label for _, label in found]


def _legend(ax: Axes, theme: Theme, **options):
    return ax.legend(*_handles(ax), frameon=False, labelcolor=theme.ink, borderpad=0, labelspacing=0.4, **options)
