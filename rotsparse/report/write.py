"""The report of a run: figures, and one self-contained HTML page."""

import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from matplotlib.figure import Figure

from rotsparse._core.files import adopt, make_folder, write_atomically
from rotsparse._core.types import Data
from rotsparse.engine.solution import Solution
from rotsparse.evaluation.agreement import Agreement
from rotsparse.evaluation.compare import Comparison
from rotsparse.evaluation.control import Control
from rotsparse.evaluation.units import Matrix, MatrixOut
from rotsparse.layers.base import Layer
from rotsparse.layers.rotations import Rotations
from rotsparse.report import figures
from rotsparse.report.data import picture_data
from rotsparse.report.page import render


def write_report(
    folder: Path,
    *,
    layer: Layer,
    x_test: Float[Data, "n d_in"],
    bases: dict[str, Rotations],
    comparison: Comparison,
    solution: Solution,
    scale_inputs: bool,
    scale_outputs: bool = False,
    covariance: Matrix | None = None,
    covariance_out: MatrixOut | None = None,
    config: dict[str, Any],
    finding: str,
    remarks: Sequence[str] = (),
    control: Control | None = None,
    agreement: Mapping[str, Agreement] | None = None,
    pictures: Mapping[str, tuple[Figure, str]] | None = None,
    floor: float | None = None,
    function_error: float | None = None,
) -> None:
    """Write `figures/*.png` and then `report.html` into a run folder, each file atomically.

    `bases`, which `comparison` compares on held-out `x_test`, hold at least "neurons" and "learned"; `solution` is the
    fit of the latter. Scales and covariances are those of `comparison`. The page begins with `finding` and `remarks`,
    and lists `config`, with its "versions" in a table of their own. `control` holds what null models reach, `agreement`
    is that of the restarts (`agreements`), `pictures` are further figures with their captions, `floor` is a lower bound
    of the solution's objective, `function_error` the error of folding; `None` leaves them out.

    Raises `ValueError` for bases or inputs that do not fit, `OSError` if the folder is missing or cannot be written.
    """
    scales = {"scale_inputs": scale_inputs, "scale_outputs": scale_outputs}
    data = picture_data(layer, x_test, bases, **scales, covariance=covariance, covariance_out=covariance_out)
    if not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    adopt(folder)
    place = Path(folder) / "figures"
    make_folder(place)
    drawn = {
        "overview": figures.overview(data, comparison),
        "heat_maps": figures.heat_maps(data, comparison),
        "examples": figures.examples(data),
        "sorted": figures.sorted_magnitudes(data, comparison),
        "curves": figures.curves(comparison),
        "history": figures.history(solution, floor),
        "metrics": figures.metrics(comparison),
    }
    pictures = pictures or {}
    drawn |= {name: figure for name, (figure, _) in pictures.items()}
    pngs = {name: figures.png(figure) for name, figure in drawn.items()}
    page = render(
        finding=finding,
        remarks=remarks,
        figures=pngs,
        comparison=comparison,
        solution=solution,
        agreement=agreement or {},
        examples=len(x_test),
        **scales,
        config=config,
        control=control,
        captions={name: caption for name, (_, caption) in pictures.items()},
        floor=floor,
        function_error=function_error,
    )
    for name, content in pngs.items():
        write_atomically(place / f"{name}.png", content)
    write_atomically(Path(folder) / "report.html", page.encode())
