"""What every experiment needs: options, data that may be missing, a run folder, and the look of its figures."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from _provenance import plain, provenance
from _start import start as start
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rotsparse._core.files import write_atomically, writing
from rotsparse.runs.folders import CONFIG, new_run, write_json

DATA = Path(os.environ.get("ROTSPARSE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
"""Where experiments look for data unless `--data` says otherwise."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What every experiment can be told."""

    data: Path = DATA
    """The folder with the data, for experiments that need any."""
    out: Path | None = None
    """The run folder (default: runs/experiments/NAME; of the quick form runs/experiments/NAME-quick)."""
    quick: bool = False
    """A smaller form: minutes."""
    overwrite: bool = False
    """Replace an earlier run in the same folder."""
    seed: int = 0


def require(paths: Sequence[Path], source: str) -> None:
    """Stop with exit code 0, visibly, where a file is missing: other experiments can still run. `source` says where to
    get the files."""
    missing = [path for path in paths if not path.exists()]
    if missing:
        print(f"SKIPPED: {', '.join(map(str, missing))} not found. {source} Then pass --data.", file=sys.stderr)
        sys.exit(0)


@dataclasses.dataclass(frozen=True)
class Run:
    """An experiment that is running: its folder, and what is known of it before there are results."""

    folder: Path
    config: dict[str, Any]
    provenance: dict[str, Any]

    def finish(self, metrics: Mapping[str, Any], report: str, **figures: Figure) -> None:
        """Write `metrics.json`, `report.md` and a PNG file for each figure, and print the report."""
        write_json(self.folder / "metrics.json", {"config": self.config, **self.provenance, **metrics})
        write_atomically(self.folder / "report.md", report.encode())
        for name, figure in figures.items():
            with writing(self.folder / f"{name}.png") as file:
                figure.savefig(file)
        print(report)


@contextlib.contextmanager
def run(name: str, config: Options) -> Iterator[Run]:
    """The run folder of an experiment, to be entered before anything is computed: a folder that cannot be written, or
    that holds another run, is a `ValueError` now and not in hours."""
    out = config.out or Path("runs/experiments") / (f"{name}-quick" if config.quick else name)
    asked = plain(config)
    with new_run(out, config=asked, overwrite=config.overwrite) as folder:
        write_json(folder / CONFIG, asked)
        yield Run(folder, asked, provenance())


def shown(m: Mapping[str, float], digits: int = 3) -> str:
    """A measurement and half the width of its interval."""
    return f"{m['value']:.{digits}f} ±{(m['high'] - m['low']) / 2:.{digits}f}"


def style(ax: Axes, title: str | None = None, *, grid: str = "both") -> None:
    """The look that all figures share. `grid`: along "x", "y" or "both"."""
    if title is not None:
        ax.set_title(title, loc="left", fontsize=10, fontweight="bold")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis=grid, color="#e6e6e6", lw=0.6)  # pyright: ignore[reportArgumentType]


def legend_beside(ax: Axes, *handles_and_labels) -> None:
    """A legend to the right of the axes."""
    ax.legend(*handles_and_labels, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
