"""The page of a layer's directions, and the index of a run's layers: self-contained HTML that loads nothing."""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from rotsparse._core.files import adopt, write_atomically
from rotsparse._core.printable import html as escape

PAGE = "directions.html"
GRAPH = "graph.svg"


class Layer(NamedTuple):
    """A line of the index: the number of a layer, the address of its page, the verdict, and what was found again."""

    number: int
    address: str
    verdict: str
    again: str


def write_page(folder: Path, data: Mapping[str, Any]) -> Path:
    """Write the page of `page_data` into a run folder. Atomic. Raises `OSError` if it cannot be written."""
    return _write(folder, render(data))


def write_index(folder: Path, title: str, layers: Sequence[Layer]) -> Path:
    """Write the list of a run's layers. Atomic."""
    return _write(folder, index(title, layers))


def render(data: Mapping[str, Any]) -> str:
    """The page. Data stands in it as JSON in which no tag can begin; the script makes elements of it and never parses
    it as HTML."""
    content = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = {"title": escape(data["title"]), "style": _file("page.css"), "script": _file("page.js"), "data": content}
    return _filled("page.html", parts)


def index(title: str, layers: Sequence[Layer]) -> str:
    """The list of a run's layers, as HTML, with the graph of all of them as soon as it is in the folder."""
    rows = "".join(
        f'<li><a href="{escape(of.address)}"><b>Layer {of.number}</b><span>{escape(of.verdict)}</span>'
        f"<small>{escape(of.again)}</small></a></li>"
        for of in layers
    )
    return _filled("index.html", {"title": escape(title), "style": _file("page.css"), "layers": rows, "graph": GRAPH})


def _write(folder: Path, page: str) -> Path:
    adopt(folder)
    write_atomically(folder / PAGE, page.encode())
    return folder / PAGE


def _filled(name: str, parts: Mapping[str, str]) -> str:
    """A template with its parts in their places. What is put in is not looked at for further places."""
    first, *rest = _file(name).split("{{")
    pieces = [first]
    for piece in rest:
        place, _, after = piece.partition("}}")
        pieces += [parts[place], after]
    return "".join(pieces)


def _file(name: str) -> str:
    return files("rotsparse.explain").joinpath(name).read_text(encoding="utf-8")
