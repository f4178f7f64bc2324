"""Claim: saving the state of a fit once a minute costs less than 2% of the run time.

The state is that of annealing a pair of rotations of width 768 (four times 768×768 numbers a side and restart: the
rotations, the best so far, and two running means). Measured in two ways, in one process:

- one save by itself: for how long the fit waits (the arrays are copied to the host), and how long the thread works in
  the background (Orbax, hashes, flushing to the disk), which costs the fit at most that much of the processor;
- the same fit with and without saves (and the log beside them), in turns. Saves come every few seconds, so that their
  cost shows above the noise of the clock; what one save costs is scaled to one a minute.
"""

import contextlib
import dataclasses
import tempfile
import time
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from _results import Results, start
from rich.console import Console
from rich.table import Table

import rotsparse as rs
from rotsparse.engine._checkpoint import Session
from rotsparse.engine.log import read_log
from rotsparse.objectives import JacobianSparsity


@dataclasses.dataclass
class Config:
    """What checkpoints cost."""

    quick: bool = False
    """Shorter fits, one pair of them."""
    width: int = 768
    """Of the inputs and outputs."""
    seconds: float = 40.0
    """How long each fit runs, about."""
    every: float = 4.0
    """Seconds between two saves."""
    pairs: int = 3
    """How many times the fit runs with and without saves."""
    out: Path | None = None
    """A JSON file for the figures."""


def main(config: Config) -> None:
    results = Results(config)
    if config.quick:
        config = dataclasses.replace(config, seconds=12.0, every=2.0, pairs=1)
    rng = np.random.default_rng(0)
    weights = (rng.standard_normal((config.width, config.width)) / config.width**0.5).astype(np.float32)
    layer = rs.Dense(weights, activation="gelu")
    x = rng.standard_normal((256, config.width)).astype(np.float32)
    objective = JacobianSparsity(layer, x, rs.Log(0.1))
    start = {name: jnp.eye(config.width) for name in ("in", "out")}

    def fit(steps, run=None):
        method = rs.Anneal(steps=steps, batch_size=2)
        return rs.minimize(objective, start, method=method, key=jax.random.key(0), run=run).completed()

    with tempfile.TemporaryDirectory() as folder:
        fit(20, rs.Run(Path(folder) / "pace", every_minutes=None))
        lines = read_log(Path(folder) / "pace")
        pace = (lines[-1]["seconds"] - lines[0]["seconds"]) / (lines[-1]["step"] - lines[0]["step"])
        steps = max(40, int(config.seconds / pace))

        def timed(run=None):
            """Wall time of the steps, and processor time of everything."""
            begun = time.process_time()
            stats = fit(steps, run).stats
            return np.array([stats["seconds"] - stats["compile_seconds"], time.process_time() - begun])

        without, saving = [], []
        with recorded_saves() as saves:
            for pair in range(config.pairs):
                run = rs.Run(Path(folder) / f"{pair}", every_minutes=config.every / 60)
                turns = [lambda: without.append(timed()), lambda run=run: saving.append(timed(run))]
                for turn in turns if pair % 2 == 0 else turns[::-1]:
                    turn()
        checkpoint = next(Path(folder, "0/checkpoints").glob("step-*"))
        size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())

    count = len(saves) / config.pairs
    waited, worked = np.median(saves, axis=0)
    wall, processor = np.median(np.subtract(saving, without), axis=0) / count
    cores = np.median([p / w for w, p in without])
    figures = {
        "state, MB": size / 1e6,
        "steps of each fit": steps,
        "saves in each fit": count,
        "one save: the fit waits, s": waited,
        "one save: in the background, s": worked,
        "fit without saves, s": np.median(without, axis=0)[0],
        "fit with saves, s": np.median(saving, axis=0)[0],
        "a save by the difference, s": wall,
        "a save by the difference, s of processor time": processor,
        "once a minute: waiting alone": waited / 60,
        "once a minute: waiting and background": (waited + worked) / 60,
        "once a minute: by the difference": wall / 60,
        "once a minute: by the difference of processor time": processor / 60 / cores,
    }
    table = Table("checkpoints", f"width {config.width}, saved every {config.every:g} s")
    for name, value in figures.items():
        table.add_row(name, f"{value:.2%}" if name.startswith("once") else f"{value:,.4g}")
    Console().print(table)
    results.write({"width": config.width, **{name: float(value) for name, value in figures.items()}})


@contextlib.contextmanager
def recorded_saves():
    """For every checkpoint of the block: for how long the fit waited, and how long the thread worked, in seconds."""
    saves: list[list[float]] = []
    save, write = Session.save, Session._write

    def timed_save(session, step, *rest):
        saves.append([0.0, 0.0])
        begun = time.perf_counter()
        save(session, step, *rest)
        saves[-1][0] = time.perf_counter() - begun

    def timed_write(session, step, *rest):
        mine, begun = saves[-1], time.perf_counter()
        write(session, step, *rest)
        mine[1] = time.perf_counter() - begun

    with mock.patch.object(Session, "save", timed_save), mock.patch.object(Session, "_write", timed_write):
        yield saves


if __name__ == "__main__":
    start(main, Config)
