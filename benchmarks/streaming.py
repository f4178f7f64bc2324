"""Claim: a store of 20 GB is fitted with less than 2 GB of resident memory, at 90% or more of the speed of a fit whose
examples are in memory.

The store is generated: shards of float32 activations of width 128, in the format that `rotsparse capture` writes. The
layer is a random GELU block of that width. Both fits take the same steps on as many random examples; the one in memory
has only as many examples as the part of the store that a fit keeps. Speed is the time of the steps, without compilation
and without the pass for the covariance, which is timed by itself. The page cache is emptied of the store first, so
minibatches come from the disk. The store is removed at the end, unless `--keep`.
"""

import dataclasses
import os
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from _results import Results, start
from rich.console import Console

import rotsparse as rs
from rotsparse._core import files
from rotsparse.data.sources import RESIDENT_EXAMPLES, Source
from rotsparse.data.store import StoreWriter
from rotsparse.objectives import JacobianSparsity
from rotsparse.objectives.base import thinned


@dataclasses.dataclass
class Config:
    """Speed and memory of a fit from a large store."""

    quick: bool = False
    """A store of 1 GB."""
    gigabytes: float = 20.0
    """The size of the store."""
    width: int = 128
    """Numbers an example. The smaller, the more reading a step needs for its arithmetic."""
    batch_size: int = 16
    """Examples a step."""
    steps: int = 2000
    """Steps of each fit."""
    rounds: int = 3
    """Each fit is run so many times, in turn; the fastest counts."""
    folder: Path | None = None
    """Where the store is written (default: a temporary folder)."""
    keep: bool = False
    """Leave the store there, and use one that is there."""
    out: Path | None = None
    """A JSON file for the figures."""


def write_store(folder: Path, rows: int, width: int) -> None:
    """Correlated Gaussian rows with a mean, in shards of 256 MiB."""
    rng = np.random.default_rng(0)
    scale, mean = np.exp(rng.standard_normal(width)).astype(np.float32), 3 * rng.standard_normal(width).astype("f")
    writer = StoreWriter(folder, {"model": "random", "width": width})
    size = max(1, 2**28 // (4 * width))
    for i, begin in enumerate(range(0, rows, size)):
        count = min(size, rows - begin)
        if i >= writer.shards:
            writer.write(i, rng.standard_normal((count, width), np.float32) * scale + mean)
    writer.finish()


def forget(folder: Path) -> None:
    """Take the store's files out of the page cache."""
    for path in folder.glob("*.npy"):
        with path.open("rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def peak_bytes() -> int:
    """The largest resident set of this process so far. (`ru_maxrss` includes that of the process that started it.)"""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in status if line.startswith("VmHWM")))


def layer_of(width: int) -> rs.MLP:
    rng = np.random.default_rng(1)
    w_in, w_out = (rng.standard_normal((width, width), np.float32) / np.float32(np.sqrt(width)) for _ in range(2))
    return rs.MLP(w_in, np.zeros(width, np.float32), w_out, activation="gelu")


def step_seconds(objective: JacobianSparsity, config: Config) -> float:
    """The time of a step of a fit of an objective, without compilation."""
    start = {name: jnp.eye(d) for name, d in objective.spaces.items()}
    # One small look at the end is what judging costs: the fits are compared by their steps.
    judge = thinned(objective, config.batch_size)
    method = rs.Anneal(steps=config.steps, batch_size=config.batch_size)
    solution = rs.minimize(objective, start, method=method, key=jax.random.key(0), validation=judge).completed()
    assert solution.stats["steps"] == config.steps, solution.result
    return (solution.stats["seconds"] - solution.stats["compile_seconds"]) / config.steps


def measure(source: Source, folder: Path, config: Config, console: Console) -> dict[str, float]:
    layer = layer_of(config.width)
    begun = time.perf_counter()
    moments = rs.stream_moments(source)
    pass_seconds = time.perf_counter() - begun
    console.print(f"covariance of {len(source):,} examples: {pass_seconds:.0f} s, peak {peak_bytes() / 1e9:.2f} GB")

    streamed = JacobianSparsity(layer, source, rs.Log(0.1), moments=moments)
    in_memory = JacobianSparsity(layer, source.part(RESIDENT_EXAMPLES), rs.Log(0.1), moments=moments)
    assert streamed.data.source is source and in_memory.data.source is None
    seconds = {"streamed": [], "in memory": []}
    for _ in range(config.rounds):
        forget(folder)
        seconds["streamed"].append(step_seconds(streamed, config))
        seconds["in memory"].append(step_seconds(in_memory, config))
    streamed_seconds, memory_seconds = (min(times) for times in seconds.values())
    return {
        "gigabytes": len(source) * source.shape[1] * 4 / 1e9,
        "width": config.width,
        "batch_size": config.batch_size,
        "covariance_seconds": pass_seconds,
        "streamed_ms_per_step": 1000 * streamed_seconds,
        "in_memory_ms_per_step": 1000 * memory_seconds,
        "speed_ratio": memory_seconds / streamed_seconds,
        "peak_gigabytes": peak_bytes() / 1e9,
    }


def main(config: Config) -> None:
    console, results = Console(), Results(config)
    if config.quick:
        config = dataclasses.replace(config, gigabytes=1.0, steps=1000)
    rows = int(config.gigabytes * 1e9 / (4 * config.width))
    parent = Path(tempfile.mkdtemp()) if config.folder is None else config.folder
    folder = parent / "store"
    try:
        begun = time.perf_counter()
        write_store(folder, rows, config.width)
        console.print(f"wrote {rows:,} examples to {folder} in {time.perf_counter() - begun:.0f} s")
        figures = measure(rs.open_source(folder), folder, config, console)
    finally:
        if not config.keep:
            files.remove(folder)
            if config.folder is None:
                parent.rmdir()
    console.print(
        f"{figures['gigabytes']:.1f} GB: {figures['streamed_ms_per_step']:.1f} ms a step from the store, "
        f"{figures['in_memory_ms_per_step']:.1f} ms from memory: {figures['speed_ratio']:.0%} of its speed; "
        f"peak resident memory {figures['peak_gigabytes']:.2f} GB"
    )
    results.write(figures)


if __name__ == "__main__":
    start(main, Config)
