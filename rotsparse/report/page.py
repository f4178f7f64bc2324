"""The report as one self-contained HTML page: figures are embedded, and it loads nothing."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from string import Template
from typing import Any, NamedTuple

import jax

from rotsparse._core.alignment import chance_cosine
from rotsparse._core.intervals import Interval
from rotsparse._core.printable import html as escape
from rotsparse.data.scales import Scale, named
from rotsparse.engine.solution import SAME, Solution
from rotsparse.evaluation.agreement import Agreement
from rotsparse.evaluation.compare import Comparison
from rotsparse.evaluation.control import Control
from rotsparse.evaluation.names import (
    CONCENTRATION,
    CONCENTRATION_MEANING,
    HIGHER_IS_SPARSER,
    LABELS,
    basis_name,
    heading,
    metric_meaning,
    metric_name,
    metric_value,
)
from rotsparse.evaluation.tables import CHOSEN
from rotsparse.evaluation.verdict import EDGES, SHARE, WITHOUT_TOP
from rotsparse.report.data import AFTER, BEFORE
from rotsparse.report.subject import title


class Shown(NamedTuple):
    """A figure on the page: an SVG element, or PNG files for light and for dark pages."""

    svg: str | None = None
    light: bytes = b""
    dark: bytes = b""


def render(
    *,
    finding: str,
    remarks: Sequence[str] = (),
    figures: Mapping[str, Shown],
    comparison: Comparison,
    solution: Solution,
    agreement: Mapping[str, Agreement],
    examples: int,
    scale_inputs: Scale,
    scale_outputs: Scale,
    config: dict[str, Any],
    control: Control | None = None,
    graph: tuple[str, str] | None = None,
    directions: str | None = None,
    captions: Mapping[str, str] | None = None,
    floor: float | None = None,
    function_error: float | None = None,
) -> str:
    """The page. `figures` are by the names of `write_report`, and further ones that have their caption in `captions`;
    `examples` is the number of held-out ones; `directions` the address of the page of directions, if there is one."""
    captions, own = captions or {}, _captions(examples, scale_inputs, scale_outputs, floor is not None)
    embedded = {name: _figure(figures[name], caption) for name, caption in {**own, **captions}.items()}
    config = dict(config)
    versions, again = config.pop("versions", {}), config.pop("again", None)
    return filled(
        "page.html",
        title=escape(title(config)),
        again="" if again is None else f"<pre><code>{escape(again)}</code></pre>",
        finding=escape(finding),
        remarks="".join(f"<p>{escape(remark)}</p>" for remark in remarks),
        tiles=_tiles(comparison, solution, function_error),
        heat_maps=embedded["heat_maps"] + "".join(embedded[name] for name in captions),
        directions=_directions(directions),
        graph="" if graph is None else _graph(*graph),
        nulls="" if control is None else _nulls(control),
        examples=f"{examples:,}",
        table=_table(comparison, [metric for metric in _metrics(comparison) if metric in CHOSEN], concentration=True),
        all_metrics=_table(comparison, _metrics(comparison)),
        glossary=_glossary(comparison),
        single=embedded["examples"],
        sorted=embedded["sorted"],
        curves=embedded["curves"],
        metrics=embedded["metrics"],
        fit=fact_rows(_fit_facts(solution, floor, function_error)),
        history=embedded["history"],
        agreement=_agreement(solution, agreement),
        config=fact_rows(config.items()),
        versions=fact_rows(versions.items()),
    )


def _captions(examples: int, scale_inputs: Scale, scale_outputs: Scale, has_floor: bool) -> dict[str, str]:
    by, of = _deviation(scale_inputs), _deviation(scale_outputs)
    scaled = f" Every column is multiplied by the {by} of its input direction." if scale_inputs else ""
    scaled += f" Every row is divided by the {of} of its output direction." if scale_outputs else ""
    limit = " No rotations get below the floor; to reach it, one pair would have to diagonalise all Jacobians."
    return {
        "heat_maps": "Every square says how far one output direction (row) moves for a small change along one input "
        f"direction (column), in absolute value, averaged over {examples:,} held-out examples.{scaled} White is at "
        "most 0.1 of the root mean square (rms) of all entries (on dark pages the background is); the colour scale is "
        "logarithmic and shared. The numbers are those of the directions: learned ones are numbered by their "
        "influence, and neurons stand in the order of theirs. No rule brings large entries to the diagonal.",
        "examples": "The same for single examples, above in the basis of neurons, below in the learned one. Rows and "
        "columns keep the order of the averages. The fit makes every one of these sparse, not their average.",
        "sorted": "The entries of all held-out examples, the largest at the left. The further left a curve falls "
        "below the dotted line, the more entries are practically zero. A curve that drops vertically ends in exact "
        "zeros, such as the rows of inactive ReLU neurons. Named are the learned basis, neurons, and of the other "
        "bases the one with most entries below the line.",
        "curves": "The same as shares, in three ways. Left: how many entries are smaller than a fraction of the rms of "
        "all entries. Middle: the same in units of the rms of each entry's own row; where a single row holds most of "
        "the energy, only this curve speaks of the others. Right: how much of the mean squared Jacobian its largest "
        "entries hold.",
        "metrics": "A point for every basis, with its 95% interval where that is wider than the point. A diamond "
        "marks the best. Axes are logarithmic where the values span more than a factor of twenty.",
        "history": "The objective during the fit, logarithmic if it falls by more than a factor of ten. If it still "
        "falls at the end, more steps may help." + (limit if has_floor else ""),
    }


def _deviation(scale: Scale) -> str:
    return "standard deviation" if isinstance(scale, bool) else f"standard deviation ({named(scale)})"


def _figure(shown: Shown, caption: str) -> str:
    caption = escape(caption)
    if shown.svg is not None:
        picture = f'<div class="drawn" role="img" aria-label="{caption}">{shown.svg}</div>'
    else:
        light, dark = (
            f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}" for png in (shown.light, shown.dark)
        )
        source = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        picture = f'<picture>{source}<img alt="{caption}" src="{light}"></picture>'
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _graph(svg: str, caption: str) -> str:
    return (
        "<h2>Which directions move which</h2>"
        f'<figure><div class="drawn scroll">{svg}</div><figcaption>{escape(caption)}</figcaption></figure>'
    )


def _directions(address: str | None) -> str:
    what = "What its directions respond to, and what they move"
    if address is None:
        return (
            f'<p class="note">{what}: <code>rotsparse explain</code> writes <code>directions.html</code> beside this '
            "page.</p>"
        )
    return f'<a class="go" href="{escape(address)}">{what} →</a>'


def _tiles(comparison: Comparison, solution: Solution, function_error: float | None) -> str:
    before, after = comparison.metrics[BEFORE], comparison.metrics[AFTER]
    tiles = []
    for metric in ("fraction_below_0.1_rms", "edges_99"):
        rival = comparison.metrics[_best_rival(comparison, metric)][metric]
        show = (lambda v: f"{v:.0%}") if metric.startswith("fraction") else (lambda v, m=metric: metric_value(m, v))
        change = f"{show(before[metric].value)} → {show(after[metric].value)}"
        tiles.append((metric_name(metric), change, f"best other basis: {show(rival.value)}"))
    if function_error is not None:
        tiles.append(("function error", f"{function_error:.1e}", "largest change of an output after folding"))
    error = solution.rotations.orthogonality_error()
    tiles.append(("orthogonality error", f"{error:.1e}", "largest entry of |RRᵀ − I|"))
    cells = ((escape(name), escape(value), escape(note)) for name, value, note in tiles)
    return "".join(f"<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>" for name, value, note in cells)


def _best_rival(comparison: Comparison, metric: str) -> str:
    return Comparison({basis: of for basis, of in comparison.metrics.items() if basis != AFTER}).best(metric)


def _table(comparison: Comparison, names: Sequence[str], *, concentration: bool = False) -> str:
    """Some metrics of every basis; with `concentration`, the energy in the top row and so on in further columns."""
    best = {metric: comparison.best(metric) for metric in names}
    heads = "".join(
        f'<th scope="col">{escape(LABELS[m])}&nbsp;{"↑" if HIGHER_IS_SPARSER[m] else "↓"}</th>' for m in names
    )
    parts = CONCENTRATION if concentration and comparison.concentration else {}
    heads += "".join(f'<th scope="col">{escape(label)}</th>' for label in parts.values())
    rows = []
    for basis, of in comparison.metrics.items():
        cells = []
        for name in names:
            mark = ' class="best"' if best[name] == basis else ""
            cells.append(f"<td{mark}>{_cell(name, of[name])}</td>")
        cells += [f"<td>{getattr(comparison.concentration[basis], part):.0%}</td>" for part in parts]
        mark = ' class="learned"' if basis == AFTER else ""
        rows.append(f'<tr{mark}><th scope="row">{escape(basis_name(basis))}</th>{"".join(cells)}</tr>')
    return (
        f'<table class="metrics"><thead><tr><th scope="col">basis</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _nulls(control: Control) -> str:
    """The metrics that null models reach, a null a row, below those of the layer after the same fit."""
    names = [name for name in (SHARE, WITHOUT_TOP, EDGES) if name in control.learned]
    heads = "".join(f'<th scope="col">{escape(heading(name))}</th>' for name in names)
    layers = {"this layer": control.learned} | {null: control.metrics(null) for null in control.nulls}
    rows = []
    for layer, of in layers.items():
        cells = (_cell(m, of[m]) for m in names)
        mark = ' class="learned"' if of is control.learned else ""
        rows.append(f'<tr{mark}><th scope="row">{escape(layer)}</th>{"".join(f"<td>{c}</td>" for c in cells)}</tr>')
    made = f" Each fit: {control.made}." if control.made else ""
    return (
        '<h2>The same fit of null models</h2><div class="scroll"><table class="metrics nulls"><thead><tr>'
        f'<th scope="col">layer</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        f'<p class="note">What the same fit finds where there is nothing to find.{escape(made)} Small: of this layer '
        "the 95% bootstrap interval over examples, of nulls the 95% prediction interval for one more draw.</p>"
    )


def _cell(metric: str, m: Interval) -> str:
    """A value, and its interval in small letters."""
    low, high = metric_value(metric, m.low), metric_value(metric, m.high)
    return f"{metric_value(metric, m.value)}<small>{low} to {high}</small>"


def _glossary(comparison: Comparison) -> str:
    meanings = [(LABELS[metric], metric_meaning(metric)) for metric in _metrics(comparison)]
    meanings += [("top row, top column, top entry, top example", CONCENTRATION_MEANING)]
    return "".join(f"<li><b>{escape(name)}</b>: {escape(meaning)}</li>" for name, meaning in meanings)


def _metrics(comparison: Comparison) -> list[str]:
    return list(comparison.metrics[AFTER])


def _fit_facts(solution: Solution, floor: float | None, function_error: float | None) -> Iterable[tuple[str, str]]:
    detail = f" ({solution.detail})" if solution.detail else ""
    yield "Result", f"{solution.result.name}: {solution.result.value}{detail}"
    if len(solution.stages) > 1:
        yield "Stages", "; ".join(map(str, solution.stages))
    if solution.certificate is not None:
        yield "Certificate", str(solution.certificate)
    held_out = "" if solution.validation_value is None else f"; on held-out examples {solution.validation_value:.4g}"
    yield "Objective", f"{solution.start_value:.4g} at the start, {solution.value:.4g} at the end{held_out}"
    if floor is not None:
        way = (solution.start_value - solution.value) / max(solution.start_value - floor, 1e-12)
        yield "Floor", f"{floor:.4g}, a bound for any rotations; the fit went {way:.0%} of the way from its start to it"
    if function_error is not None:
        yield "Function error", f"{function_error:.2e}: largest change of an output with the rotations in the weights"
    yield "Orthogonality error", f"{solution.rotations.orthogonality_error():.2e}: largest entry of |RRᵀ − I|"
    for name in ("steps", "best_step", "seconds"):
        if name in solution.stats:
            value = solution.stats[name]
            yield name.replace("_", " ").capitalize(), f"{value:.1f}" if isinstance(value, float) else str(value)


def _agreement(solution: Solution, agreement: Mapping[str, Agreement]) -> str:
    """Which directions of each side the other restarts found again, what influence they carry, how far the strongest of
    them agree as subspaces, and what chance would give."""
    if not agreement:
        return ""
    rows, tables = [], []
    for space, of in agreement.items():
        chance = chance_cosine(len(of.order), key=jax.random.key(0), draws=5).value
        side = {"in": "inputs", "out": "outputs"}.get(space, space)
        mean = solution.agreement()[space][:, solution.free[space]].mean()
        again = f"{int(of.again.sum())} of {len(of.order)} fitted directions found again"
        rows.append((side, f"{again}; mean |cos| {mean:.2f} (chance {chance:.2f}). {of.sentence()}"))
        tables.append(_blocks(side, of))
    return (
        f'<h2>Do the restarts agree?</h2><table class="facts">{fact_rows(rows)}</table>'
        f'<p class="note">{len(solution.candidates)} restarts from different starts. A direction is found again where '
        f"every other restart has one at |cos| &gt; {SAME}. Directions that are not found again are one choice among "
        "many: the data do not determine them, however sparse the result. Their influence is the share of the mean "
        f"squared Jacobian that they hold.</p>{''.join(tables)}"
        '<p class="note">Numbers are rows of the rotation. The span of the strongest directions is compared with that '
        "of as many of the restart that agrees least: where single directions disagree, their span may still be "
        "determined.</p>"
    )


def _blocks(side: str, of: Agreement) -> str:
    """The strongest directions of a side, alone and together."""
    heads = "".join(
        f'<th scope="col">{head}</th>'
        for head in ("the strongest", "numbers", "influence", "found again", "same span, cos²", "chance")
    )
    rows = []
    for size, cosine, chance, influence in of.blocks:
        numbers = ", ".join(map(str, of.order[: min(size, 5)])) + (", …" if size > 5 else "")
        cells = (
            f"{size}",
            numbers,
            f"{influence:.0%}",
            f"{int(of.again[:size].sum())}",
            f"{cosine:.2f}",
            f"{chance:.2f}",
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return (
        f'<div class="scroll"><table class="facts"><caption>{escape(side)}</caption><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def filled(template: str, **parts: str) -> str:
    """A page: one of this package's templates with its parts and the style of all reports."""
    style, page = (files("rotsparse.report").joinpath(n).read_text(encoding="utf-8") for n in ("style.css", template))
    return Template(page).substitute(style=style, **parts)


def fact_rows(facts: Iterable[tuple[str, Any]]) -> str:
    """Rows of a table of names and values."""
    return "".join(f'<tr><th scope="row">{escape(str(k))}</th><td>{escape(_text(v))}</td></tr>' for k, v in facts)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_text(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value)) or "none"
    return "none" if value is None else str(value)
