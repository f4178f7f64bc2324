"""How a graph is drawn: places from left to right, nodes in an order in which edges cross little, edges as smooth
curves. The same drawing is written as SVG and shown on the page of directions."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rotsparse._core.printable import html

# Sizes in pixels: between nodes of a column, between modules, between columns, for titles, and for labels beside nodes.
STEP, GAP, ACROSS, TOP, MARGIN = 15.0, 9.0, 300.0, 34.0, 80.0
_SWEEPS = 12

# An effect whose sign differs between examples: the mean is below this share of the root mean square.
MIXED = 0.5


LEGEND = (
    ("pos", "moves it up"),
    ("neg", "moves it down"),
    ("mix", "sign differs between examples"),
)


class Dot(NamedTuple):
    """A node. `side`: where its label stands, "start" (left), "middle" (on a place between others) or "end".
    `activation`: of a single example, in standard deviations."""

    name: str
    label: str
    place: int
    number: int
    x: float
    y: float
    radius: float
    activation: float | None
    module: int | None
    about: str


class Curve(NamedTuple):
    """An edge. `kind`: "pos", "neg" or "mix", by the sign of the effect."""

    source: str
    target: str
    path: str
    width: float
    kind: str
    about: str


class Drawing(NamedTuple):
    """`titles`: of the places, with their x."""

    width: float
    height: float
    titles: list[tuple[str, float]]
    dots: list[Dot]
    curves: list[Curve]


def drawing(titles: Sequence[str], nodes: Sequence, edges: Sequence, module: Mapping[str, int]) -> Drawing:
    """Where the nodes and edges of a `graph.Graph` are drawn. The weakest edge comes first, so that strong ones lie
    above it."""
    columns: list[list] = [[node for node in nodes if node.place == k] for k in range(len(titles))]
    ordered = _ordered(columns, edges, module)
    heights = [_positions(column, module) for column in ordered]
    tallest = max((h[-1] for h in heights if h), default=0.0)
    across = min(ACROSS, 1500 / max(len(titles) - 1, 1))
    strongest = max((node.influence for node in nodes), default=0.0) or 1.0
    dots = {}
    for k, (column, ys) in enumerate(zip(ordered, heights, strict=True)):
        above = TOP + (tallest - (ys[-1] if ys else 0)) / 2
        for node, y in zip(column, ys, strict=True):
            radius = 2.2 + 3.8 * float(np.sqrt(node.influence / strongest))
            place = MARGIN + k * across, above + y, radius
            of = module.get(node.name)
            dots[node.name] = Dot(node.name, node.label, k, node.number, *place, node.activation, of, _told(node, of))
    most = max((edge.share for edge in edges), default=0.0) or 1.0
    curves = []
    for edge in sorted(edges, key=lambda e: e.share):
        a, b = dots[edge.source], dots[edge.target]
        middle = (a.x + b.x) / 2
        path = f"M{a.x:.1f},{a.y:.1f} C{middle:.1f},{a.y:.1f} {middle:.1f},{b.y:.1f} {b.x:.1f},{b.y:.1f}"
        kind = "mix" if abs(edge.effect) < MIXED * edge.size else "pos" if edge.effect > 0 else "neg"
        width = 0.5 + 5.5 * float(np.sqrt(edge.share / most))
        curves.append(Curve(edge.source, edge.target, path, width, kind, about(edge)))
    named = [(title, MARGIN + k * across) for k, title in enumerate(titles)]
    return Drawing(2 * MARGIN + (len(titles) - 1) * across, TOP + tallest + STEP, named, list(dots.values()), curves)


def about(edge) -> str:
    """An edge in words."""
    return (
        f"{edge.source} → {edge.target}: {edge.share:.3%} of the energy, mean effect {edge.effect:+.3f}, "
        f"rms {edge.size:.3f}"
    )


def _told(node, module: int | None) -> str:
    said = f"{node.name}" if node.label == str(node.number) else f"{node.name}: {node.label}"
    said += f", influence {node.influence:.3%}"
    if node.activation is not None:
        word = node.label != str(node.number)
        said += f", probability {node.activation:.3f}" if word else f", activation {node.activation:+.2f}"
    return said + ("" if module is None else f", module {module}")


def _ordered(columns: list[list], edges: Sequence, module: Mapping[str, int]) -> list[list]:
    """Every column in the order of the mean height of its neighbours (barycentre heuristic), modules kept together."""
    place = {node.name: i / max(len(column), 1) for column in columns for i, node in enumerate(column)}
    pulls: dict[str, list[tuple[str, float]]] = {name: [] for name in place}
    for edge in edges:
        pulls[edge.source].append((edge.target, edge.share))
        pulls[edge.target].append((edge.source, edge.share))
    for sweep in range(_SWEEPS):
        forward = sweep % 2 == 0
        for column in columns if forward else columns[::-1]:
            wanted = {}
            for node in column:
                weight = sum(w for _, w in pulls[node.name])
                mean = sum(w * place[name] for name, w in pulls[node.name])
                wanted[node.name] = mean / weight if weight > 0 else place[node.name]
            together: dict[int | None, list[float]] = {}
            for name, height in wanted.items():
                together.setdefault(module.get(name), []).append(height)
            mean_of = {of: float(np.mean(heights)) for of, heights in together.items()}
            column.sort(key=lambda n: (mean_of[module.get(n.name)], module.get(n.name, 0), wanted[n.name]))
            for i, node in enumerate(column):
                place[node.name] = (i + 0.5) / len(column)
    return columns


def _positions(column: Sequence, module: Mapping[str, int]) -> list[float]:
    """The heights of the nodes of a column, from 0 on."""
    found, y = [], 0.0
    for before, node in zip([None, *column], column, strict=False):
        if before is not None:
            apart = module.get(before.name) != module.get(node.name)
            y += STEP + (GAP if apart else 0.0)
        found.append(y)
    return found


STYLE = """
.graph { --ink: #1f2328; --soft: #5b6169; --p: #d95f02; --n: #2669d2; --m: #8a8f98; --paper: #fff; }
@media (prefers-color-scheme: dark) {
  .graph { --ink: #e7e9ec; --soft: #a2a9b3; --p: #ff8c3c; --n: #6aa2ff; --m: #8b929c; --paper: #14161a; }
}
.graph text { font: 10px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--soft); }
.graph text { paint-order: stroke; stroke: var(--paper); stroke-width: 3px; stroke-opacity: 0.75; }
.graph .title { font-size: 12px; font-weight: 600; fill: var(--ink); }
.graph path { fill: none; stroke-opacity: 0.55; } .graph path:hover { stroke-opacity: 1; }
.graph .pos { stroke: var(--p); } .graph .neg { stroke: var(--n); } .graph .mix { stroke: var(--m); }
.graph circle { fill: var(--ink); stroke: none; }
.graph circle.up { fill: var(--p); } .graph circle.down { fill: var(--n); }
""".strip()


def svg(of: Drawing, title: str, *, links: Sequence[str] | None = None, inline: bool = False) -> str:
    """A drawing as one SVG element, which needs nothing else: as a file, or `inline`, within a page."""
    below = 26
    parts = [f"<title>{html(title)}</title><style>{STYLE}</style>"]
    parts += [
        f'<text class="title" x="{x:.1f}" y="14" text-anchor="middle">{html(name)}</text>' for name, x in of.titles
    ]
    for c in of.curves:
        parts.append(
            f'<path class="{c.kind}" d="{c.path}" stroke-width="{c.width:.2f}"><title>{html(c.about)}</title></path>'
        )
    for dot in of.dots:
        parts.append(_dot(dot, len(of.titles), None if links is None else f"{links[dot.place]}{dot.number}"))
    x = MARGIN / 2
    for kind, said in LEGEND:
        if any(c.kind == kind for c in of.curves):
            y = of.height + 14
            parts.append(f'<path class="{kind}" d="M{x:.0f},{y - 3:.0f} h18" stroke-width="3"></path>')
            parts.append(f'<text x="{x + 23:.0f}" y="{y:.0f}">{said}</text>')
            x += 36 + 5.4 * len(said)
    width, space = max(of.width, x), "" if inline else ' xmlns="http://www.w3.org/2000/svg"'
    return (
        f'<svg{space} class="graph" role="img" viewBox="0 0 {width:.0f} '
        f'{of.height + below:.0f}" width="{width:.0f}" height="{of.height + below:.0f}">{"".join(parts)}</svg>\n'
    )


def label_place(dot: Dot, places: int) -> tuple[float, str]:
    """The x of a node's label and how it is anchored: left of the first column, otherwise right of the node."""
    if dot.place == 0 and places > 1:
        return dot.x - dot.radius - 4, "end"
    return dot.x + dot.radius + 4, "start"


def _valued(dot: Dot) -> str:
    """What stands behind a label: the activation in standard deviations, or the probability of a word."""
    if dot.activation is None:
        return ""
    return f" ({dot.activation:+.1f})" if dot.label == str(dot.number) else f" {dot.activation:.0%}"


def _dot(dot: Dot, places: int, link: str | None) -> str:
    kind = "" if dot.activation is None else ' class="up"' if dot.activation >= 0 else ' class="down"'
    x, anchor = label_place(dot, places)
    drawn = (
        f'<circle{kind} cx="{dot.x:.1f}" cy="{dot.y:.1f}" r="{dot.radius:.1f}">'
        f"<title>{html(dot.about)}</title></circle>"
        f'<text x="{x:.1f}" y="{dot.y + 3.5:.1f}" text-anchor="{anchor}">{html(dot.label)}'
        f"{_valued(dot)}</text>"
    )
    return drawn if link is None else f'<a href="{html(link)}" target="_top">{drawn}</a>'
