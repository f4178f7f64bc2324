"""Tables of metrics: one writer for the terminal, one for Markdown."""

from collections.abc import Iterable, Mapping

from rich import box
from rich.table import Table
from rich.text import Text

from rotsparse._core.intervals import Interval
from rotsparse._core.printable import markdown, visible
from rotsparse.evaluation.concentration import Concentration
from rotsparse.evaluation.names import CONCENTRATION, HIGHER_IS_SPARSER, heading, number, shown

Metrics = Mapping[str, Mapping[str, Interval]]
"""`metrics[basis][metric]`; every basis has the same metrics."""

CHOSEN = (
    "edges_99",
    "fraction_below_0.1_rms",
    "small_by_row",
    "small_without_top",
    "top_1_percent_energy",
    "gap_closed",
)
"""The metrics that 80 columns have room for, beside the energy in the top row and column. Markdown, JSON and the report
have everything."""
_SIDES = ("row", "column")


def rich_table(
    metrics: Metrics,
    *,
    concentration: Mapping[str, Concentration] | None = None,
    controls: Metrics | None = None,
    seconds: Mapping[str, float] | None = None,
    title: str | None = None,
) -> Table:
    """A table that fits 80 columns, a basis a row. Green is the best of each column (bold) and every other one whose
    interval overlaps the best's. `concentration`: of how many bases the energy in the top row and column is known.
    `controls` follow below a line and do not compete. `seconds`: what each basis took to fit, for a last column."""
    caption = "↑ higher is sparser, ↓ lower is sparser"
    caption += "\ntop row, top column: their share of the energy" if concentration else ""
    table = Table(title=title, box=box.SIMPLE_HEAD, caption=caption, padding=0)
    table.add_column("basis")
    best = _best(metrics)
    names = [name for name in best if name in CHOSEN] or list(best)
    for name in names:
        table.add_column(heading(name).replace(" ", "\n"), justify="right", no_wrap=True)
    for side in _SIDES if concentration else ():
        table.add_column(CONCENTRATION[side].replace(" ", "\n"), justify="right", no_wrap=True)
    if seconds is not None:
        table.add_column("fit\ns", justify="right", no_wrap=True)

    def last(basis: str) -> list[Text]:
        shares = _shares(concentration, basis, _SIDES)
        return [Text(share) for share in shares] + ([] if seconds is None else [Text(f"{seconds[basis]:.1f}")])

    for basis, of in metrics.items():
        cells = []
        for name in names:
            overlaps = of[name].overlaps(metrics[best[name]][name])
            style = "bold green" if best[name] == basis else "green" if overlaps else ""
            cells.append(Text(number(name, of[name].value), style))
        table.add_row(Text(visible(basis.replace("_", " "))), *cells, *last(basis))
    if controls:
        table.add_section()
    for basis, of in (controls or {}).items():
        table.add_row(Text(basis), *(Text(number(name, of[name].value)) for name in names), *last(basis))
    return table


def markdown_table(
    metrics: Metrics,
    *,
    concentration: Mapping[str, Concentration] | None = None,
    controls: Metrics | None = None,
    seconds: Mapping[str, float] | None = None,
) -> str:
    """All metrics in Markdown with half the widths of the intervals, the best of every column in bold, and the whole
    concentration."""
    best = _best(metrics)
    headings = [heading(name) for name in best] + (list(CONCENTRATION.values()) if concentration else [])
    headings += [] if seconds is None else ["fit, s"]
    lines = ["| basis | " + " | ".join(headings) + " |", "|---|" + "---:|" * len(headings)]
    for basis, of in {**metrics, **(controls or {})}.items():
        cells = [shown(name, m, bold=basis in metrics and best[name] == basis) for name, m in of.items()]
        cells += _shares(concentration, basis, CONCENTRATION)
        cells += [] if seconds is None else [f"{seconds[basis]:.1f}"]
        lines.append(f"| {markdown(basis)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _shares(concentration: Mapping[str, Concentration] | None, basis: str, parts: Iterable[str]) -> list[str]:
    """The energy in the top row and so on of a basis; nothing where it is not known (of a control)."""
    if not concentration:
        return []
    return [f"{getattr(concentration[basis], part):.0%}" if basis in concentration else "" for part in parts]


def _best(metrics: Metrics) -> dict[str, str]:
    """For every metric, the basis that is sparsest by it (the first in a tie)."""
    names = next(iter(metrics.values()))
    sign = {name: 1 if HIGHER_IS_SPARSER[name] else -1 for name in names}
    return {name: max(metrics, key=lambda basis, n=name: sign[n] * metrics[basis][n].value) for name in names}
