"""What a page of directions shows, as JSON: every number is the library's, rounded, and every text is inert."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from rotsparse._core.printable import visible
from rotsparse.explain.directions import EDGES, OUT, SIDES, Direction, Explanation
from rotsparse.explain.examples import BEFORE, BEHIND, Context, Texts
from rotsparse.explain.graph import DRAWN, Graph, layer_graph
from rotsparse.explain.graph_drawing import LEGEND
from rotsparse.explain.words import Word
from rotsparse.layers.base import ClosedForm

# What a card shows: contexts at each end, partners, neurons of each edge, and words at each end.
ENDS, PARTNERS, NEURONS, WORDS = 6, 6, 5, 7

# The edges of the graph hold this share of the energy; at most so many are drawn.
SHARE, EDGES_DRAWN = 0.99, DRAWN

# Directions of a side that get a card: the most influential ones.
MOST_CARDS = 640

SIDES_OF = tuple(SIDES)  # the places of the graph, from left to right

NOTHING = -(2**15)  # no value
_NO_WORD = 2**32 - 1  # whose lower half is 2**16 - 1


class Drawing(NamedTuple):
    """A picture of a direction: a curve `[n]`, or an image `[height, width]` whose zero is white; and what it shows."""

    values: Float[np.ndarray, "..."]
    caption: str


def page_data(
    of: Explanation,
    *,
    title: str,
    facts: Mapping[str, str],
    verdict: Sequence[str],
    missing: Sequence[str] = (),
    drawings: Mapping[str, Sequence[Drawing]] | None = None,
    links: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The content of a page. `facts`: what is told at its foot. `verdict`: what was found in the run, and remarks.
    `missing`: what could not be told, and why. `drawings`: for a side, one of each direction. `links`: addresses of
    other pages, by their text."""
    words = _WordTable()
    sides = {side: _side(of, side, words, (drawings or {}).get(side)) for side in SIDES}
    text = isinstance(of.examples, Texts)
    return {
        "title": visible(title),
        "verdict": [visible(said) for said in verdict],
        "missing": [visible(said) for said in missing],
        "facts": [[visible(name), visible(value)] for name, value in facts.items()],
        "links": [[visible(name), address] for name, address in (links or {}).items()],
        "text": text,
        "examples": f"{len(of.examples.x):,} {'tokens' if text else 'examples'}",
        "jacobians": f"{len(of.x_test):,}",
        "edges": [EDGES[0], EDGES[-1]],
        "before": BEFORE if text else 0,
        "window": BEFORE + 1 + BEHIND if text else 1,
        "ends": ENDS,
        "pictures": _pictures(of, sides),
        "sides": sides,
        "graph": _graph(layer_graph(of, share=SHARE, title=title).strongest(EDGES_DRAWN)),
        "words": words.words,
    }


def _side(of: Explanation, side: str, table: "_WordTable", drawings: Sequence[Drawing] | None) -> dict[str, Any]:
    directions = of.directions(side)
    shown = directions[:MOST_CARDS]
    text = isinstance(of.examples, Texts)
    contexts = [_contexts(direction) for direction in shown]
    scores = {name: [d.words(WORDS, through=name == "through") for d in shown] for name in ("scores", "through")}
    return {
        "name": SIDES[side],
        "count": len(directions),
        "facts": [_facts(direction) for direction in shown],
        "histograms": [direction.histogram() for direction in shown],
        "partners": [_partners(direction, len(of.directions("in" if side == OUT else OUT))) for direction in shown],
        **{name: [_spelled(ends) for ends in of_name] for name, of_name in scores.items()},
        "drawings": None if drawings is None else [_drawing(d) for d in drawings[: len(shown)]],
        **_packed(contexts, table, text),
    }


def _graph(of: Graph) -> dict[str, Any]:
    """The drawing of the graph, and its modules beside those of random graphs."""
    modules = of.modules()
    drawn = of.drawing(modules)
    dots = [
        [SIDES_OF[d.place], d.number, round(d.x, 1), round(d.y, 1), round(d.radius, 1), d.about] for d in drawn.dots
    ]
    curves = [[c.path, round(c.width, 2), c.kind, c.about] for c in drawn.curves]
    groups = [[name.split("-") for name in group] for group in modules.groups]
    return {
        "size": [round(drawn.width), round(drawn.height)],
        "titles": [[title, round(x, 1)] for title, x in drawn.titles],
        "dots": dots,
        "curves": curves,
        "modules": [[[side, int(number)] for side, number in group] for group in groups],
        "said": [of.stages[0].cut, str(modules)],
        "legend": [list(entry) for entry in LEGEND],
    }


def _spelled(ends: tuple[list[Word], list[Word]]) -> list[list[list[str]]] | None:
    """The words at both ends with their scores; `None` where there are none."""
    return [[[of.word, f"{of.score:+.1f}"] for of in end] for end in ends] if any(ends) else None


def _facts(direction: Direction) -> dict[str, Any]:
    return {
        "influence": percent(direction.influence),
        "again": direction.found_again,
        "cosine": None if direction.cosine is None else f"{direction.cosine:.3f}",
        "variance": f"{direction.variance:.3g}",
        "skewness": f"{direction.skewness:+.2f}",
        "kurtosis": f"{direction.kurtosis:+.1f}",
    }


def percent(share: float) -> str:
    """A share with three digits: 12.3%, 1.23%, 0.123%, 0.012%."""
    return f"{share:.{1 if share >= 0.1 else 2 if share >= 0.01 else 3}%}"


def _partners(direction: Direction, others: int) -> list[list[Any]]:
    closed = isinstance(direction.of.layer, ClosedForm)
    found = []
    for partner in direction.partners(min(PARTNERS, others)):
        neurons = direction.neurons(partner.number, NEURONS) if closed else []
        found.append(
            [
                partner.number,
                f"{partner.effect:+.3f}",
                f"{partner.size:.3f}",
                percent(partner.share),
                percent(partner.often),
                [[neuron.number, f"{neuron.effect:+.3f}"] for neuron in neurons],
            ]
        )
    return found


def _contexts(direction: Direction) -> list[Context | None]:
    """Those at the positive end, those at the negative end, each with `ENDS` places, and those in between."""
    ends = [direction.top(ENDS), direction.bottom(ENDS)]
    return [*(c for end in ends for c in (*end, *[None] * (ENDS - len(end)))), *direction.between()]


def _packed(contexts: list[list[Context | None]], table: "_WordTable", text: bool) -> dict[str, Any]:
    """Contexts as base64 of their words' numbers (16 bits, or 32 if there are too many words), the values in hundredths
    (16 bits) and their places, all aligned so that the word that is meant is at the same place of every window."""
    before, window = (BEFORE, BEFORE + 1 + BEHIND) if text else (0, 1)
    slots = len(contexts[0])
    words = np.full((len(contexts), slots, window), _NO_WORD)
    values = np.full(words.shape, NOTHING, np.int16)
    places = np.zeros((len(contexts), slots, 2), np.int32)
    for i, of in enumerate(contexts):
        for j, context in enumerate(of):
            if context is None:
                continue
            start = before - context.at
            places[i, j] = context.sequence, context.position
            for k, (word, value) in enumerate(zip(context.words, context.values, strict=True), start=start):
                words[i, j, k] = table.number(word)
                if value is not None:
                    values[i, j, k] = np.clip(round(100 * value), NOTHING + 1, 2**15 - 1)
    # In the narrow form 65,535 stands for no word.
    wide = len(table.words) >= 2**16 - 1
    numbers = words.astype(np.uint32 if wide else np.uint16)
    packed = {"words": _bytes(numbers), "values": _bytes(values), "places": _bytes(places)}
    return {"slots": slots, "wide": wide, **packed}


def _pictures(of: Explanation, sides: Mapping[str, Any]) -> dict[str, Any] | None:
    """The pictures of all examples that are shown, in 256 shades of grey."""
    pictures = of.examples.pictures
    if pictures is None:
        return None
    shown = {int(p) for s in sides.values() for p in np.frombuffer(base64.b64decode(s["places"]), np.int32)[::2]}
    grey = np.clip(np.round(255 * np.asarray(pictures, np.float64)), 0, 255).astype(np.uint8)
    return {"size": list(grey.shape[1:]), "of": {str(i): _bytes(grey[i]) for i in sorted(shown)}}


def _drawing(drawing: Drawing) -> dict[str, Any]:
    """The values in hundredths of the largest."""
    values = np.asarray(drawing.values, np.float64)
    largest = np.abs(values).max()
    scaled = np.round(100 * values / (largest if largest > 0 else 1)).astype(int)
    return {"size": list(values.shape), "values": scaled.ravel().tolist(), "caption": visible(drawing.caption)}


def _bytes(array: np.ndarray) -> str:
    little = array.astype(array.dtype.newbyteorder("<"))
    return base64.b64encode(np.ascontiguousarray(little).data).decode("ascii")


class _WordTable:
    """Every text that is shown, once."""

    def __init__(self):
        self.words: list[str] = []
        self._numbers: dict[str, int] = {}

    def number(self, word: str) -> int:
        if word not in self._numbers:
            self._numbers[word] = len(self.words)
            self.words.append(word)
        return self._numbers[word]
