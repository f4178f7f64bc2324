"""Tables of metrics: one writer for the terminal, one for Markdown."""

from collections.abc import Mapping

from rich import box
from rich.table import Table
from rich.text import Text

from rotsparse._core.intervals import Interval
from rotsparse._core.printable import markdown, visible
from rotsparse.evaluation.metrics import HIGHER_IS_SPARSER
from rotsparse.evaluation.names import heading, number, shown

Metrics = Mapping[str, Mapping[str, Interval]]
"""`metrics[basis][metric]`; every basis has the same metrics."""


def rich_table(
    metrics: Metrics,
    *,
    controls: Metrics | None = None,
    seconds: Mapping[str, float] | None = None,
    title: str | None = None,
) -> Table:
    """A table that fits 80 columns, a basis a row. Green is the best of each column (bold) and every other one whose
    interval overlaps the best's. `controls` follow below a line and do not compete. `seconds`: what each basis took to
    fit, for a last column."""
    table = Table(title=title, box=box.SIMPLE_HEAD, caption="↑ higher is sparser, ↓ lower is sparser", padding=0)
    table.add_column("basis")
    best = _best(metrics)
    for name in best:
        table.add_column(heading(name).replace(" ", "\n", 1), justify="right", no_wrap=True)
    if seconds is not None:
        table.add_column("fit\ns", justify="right", no_wrap=True)

    def last(basis: str) -> list[Text]:
        return [] if seconds is None else [Text(f"{seconds[basis]:.1f}")]

    for basis, of in metrics.items():
        cells = []
        for name, m in of.items():
            overlaps = m.overlaps(metrics[best[name]][name])
            style = "bold green" if best[name] == basis else "green" if overlaps else ""
            cells.append(Text(number(name, m.value), style))
        table.add_row(Text(visible(basis.replace("_", " "))), *cells, *last(basis))
    if controls:
        table.add_section()
    for basis, of in (controls or {}).items():
        table.add_row(Text(basis), *(Text(number(name, m.value)) for name, m in of.items()), *last(basis))
    return table


def markdown_table(
    metrics: Metrics, *, controls: Metrics | None = None, seconds: Mapping[str, float] | None = None
) -> str:
    """The same in Markdown with half the widths of the intervals, the best of every column in bold."""
    best = _best(metrics)
    headings = [heading(name) for name in best] + ([] if seconds is None else ["fit, s"])
    lines = ["| basis | " + " | ".join(headings) + " |", "|---|" + "---:|" * len(headings)]
    for basis, of in {**metrics, **(controls or {})}.items():
        cells = [shown(name, m, bold=basis in metrics and best[name] == basis) for name, m in of.items()]
        cells += [] if seconds is None else [f"{seconds[basis]:.1f}"]
        lines.append(f"| {markdown(basis)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _best(metrics: Metrics) -> dict[str, str]:
    """For every metric, the basis that is sparsest by it (the first in a tie)."""
    names = next(iter(metrics.values()))
    sign = {name: 1 if HIGHER_IS_SPARSER[name] else -1 for name in names}
    return {name: max(metrics, key=lambda basis, n=name: sign[n] * metrics[basis][n].value) for name in names}
