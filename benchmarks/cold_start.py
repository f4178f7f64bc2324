"""Claim: the help of a command is there in a third of a second, and the first fit begins to take steps within seconds.

Every figure is the least of some fresh processes. The first fit is one of a small block, whose time is nearly all
compiling; a second one in the same process shows what compiling took.
"""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

from _results import Results, start
from rich.console import Console
from rich.table import Table

FIT = """
import time
import jax, numpy as np, rotsparse as rs
rng = np.random.default_rng(0)
layer = rs.MLP(rng.normal(size=(64, 32)).astype("f"), None, rng.normal(size=(32, 64)).astype("f"), None)
x = rng.normal(size=(256, 32)).astype("f")
for _ in range(2):
    begun = time.perf_counter()
    rs.find_rotations(layer, x, key=jax.random.key(0), method=rs.Anneal(steps=20))
    print(time.perf_counter() - begun)
"""


@dataclasses.dataclass
class Config:
    """Imports, help and the first fit, in fresh processes."""

    quick: bool = False
    """One process each."""
    model: Path | None = None
    """A model for `rotsparse inspect` (default: left out)."""
    out: Path | None = None
    """A JSON file for the figures."""


def main(config: Config) -> None:
    results = Results(config)
    command = [sys.executable, "-c", "from rotsparse_command import main; main()"]
    programs = {
        "python": [sys.executable, "-c", ""],
        "import jax": [sys.executable, "-c", "import jax"],
        "import rotsparse": [sys.executable, "-c", "import rotsparse"],
        "rotsparse --help": [*command, "--help"],
        "rotsparse fit --help": [*command, "fit", "--help"],
    }
    if config.model is not None:
        programs["rotsparse inspect"] = [*command, "inspect", str(config.model)]
    repeats = 1 if config.quick else 5
    seconds = {name: min(taken(program) for _ in range(repeats)) for name, program in programs.items()}
    said = subprocess.run([sys.executable, "-c", FIT], capture_output=True, text=True, check=True).stdout.split()
    seconds |= {"first fit": float(said[0]), "second fit": float(said[1])}
    table = Table("what", "seconds")
    for name, value in seconds.items():
        table.add_row(name, f"{value:.2f}")
    Console().print(table)
    results.write(seconds)


def taken(program: list[str]) -> float:
    """Seconds of a process, from its start to its end."""
    begun = time.perf_counter()
    subprocess.run(program, capture_output=True, check=True)
    return time.perf_counter() - begun


if __name__ == "__main__":
    start(main, Config)
