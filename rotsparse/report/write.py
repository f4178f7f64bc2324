"""The report of a run: figures, and one self-contained HTML page."""

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from rotsparse._core.files import adopt, make_folder, write_atomically
from rotsparse.data.scales import Scale
from rotsparse.engine.solution import Solution
from rotsparse.evaluation.agreement import Agreement
from rotsparse.evaluation.compare import Comparison
from rotsparse.evaluation.control import Control
from rotsparse.report import figures
from rotsparse.report.data import PictureData
from rotsparse.report.page import Shown, render
from rotsparse.report.plot import DARK


def write_report(
    folder: Path,
    *,
    data: PictureData,
    comparison: Comparison,
    solution: Solution,
    examples: int,
    scale_inputs: Scale,
    scale_outputs: Scale = False,
    config: dict[str, Any],
    finding: str,
    remarks: Sequence[str] = (),
    control: Control | None = None,
    agreement: Mapping[str, Agreement] | None = None,
    graph: tuple[str, str] | None = None,
    directions: str | None = None,
    pictures: Mapping[str, tuple[Figure, str]] | None = None,
    floor: float | None = None,
    function_error: float | None = None,
    shown: Callable[[str], None] = lambda name: None,
) -> None:
    """Write the figures as PNG, SVG and PDF into `figures/`, and then `report.html`, each file atomically.

    `data` and `comparison` are of the same `examples` held-out examples and the same bases; `solution` is the fit of
    the one called "learned". The page begins with `finding` and `remarks`, and lists `config`, with its "versions" in a
    table of their own. `control` holds what null models reach, `agreement` is that of the restarts (`agreements`),
    `graph` the directions' graph as an SVG element and its caption, `directions` the address of their page, `pictures`
    are further figures with their captions, `floor` is a lower bound of the solution's objective, `function_error` the
    error of folding; `None` leaves them out. `shown` is told which figure is being drawn.

    Raises `OSError` if the folder is missing or cannot be written.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    adopt(folder)
    place = Path(folder) / "figures"
    make_folder(place)
    draw: dict[str, Callable[..., Figure]] = {
        "overview": lambda *theme: figures.overview(data, comparison, *theme),
        "heat_maps": lambda *theme: figures.heat_maps(data, comparison, *theme),
        "examples": lambda *theme: figures.examples(data, *theme),
        "sorted": lambda: figures.sorted_magnitudes(data, comparison),
        "curves": lambda: figures.curves(comparison),
        "history": lambda: figures.history(solution, floor),
        "metrics": lambda: figures.metrics(comparison),
    }
    pictures = pictures or {}
    draw |= {name: lambda figure=figure: figure for name, (figure, _) in pictures.items()}
    drawn, on_page = {}, {}
    for name, figure in draw.items():
        shown(f"the figure {name}")
        made = figure()
        of = drawn[name] = _Files(figures.png(made), figures.svg(made), figures.pdf(made))
        # Lines take the page's colours; the shades of a matrix are drawn once for each kind of page.
        dark = figures.png(figure(DARK), transparent=True) if name in ("heat_maps", "examples") else None
        on_page[name] = Shown(figures.inline(of.svg)) if dark is None else Shown(light=of.png, dark=dark)
    page = render(
        finding=finding,
        remarks=remarks,
        figures=on_page,
        comparison=comparison,
        solution=solution,
        agreement=agreement or {},
        examples=examples,
        scale_inputs=scale_inputs,
        scale_outputs=scale_outputs,
        config=config,
        control=control,
        graph=graph,
        directions=directions,
        captions={name: caption for name, (_, caption) in pictures.items()},
        floor=floor,
        function_error=function_error,
    )
    for name, of in drawn.items():
        for kind, content in of._asdict().items():
            write_atomically(place / f"{name}.{kind}", content)
    write_atomically(Path(folder) / "report.html", page.encode())


class _Files(NamedTuple):
    """A figure in every format."""

    png: bytes
    svg: bytes
    pdf: bytes
