"""From options of the command line to arguments of the library and to the JSON that a run records."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from rotsparse import cli, measures, runs
from rotsparse.checkpoint import Checkpoints
from rotsparse.driver import STEPS
from rotsparse.run_log import RunLog
from rotsparse.sharding import device_mesh
from rotsparse.solvers import Annealing, Riemannian


def fit_arguments(options: "cli.FitOptions", input_scale: str) -> dict[str, Any]:
    """The arguments of `find_rotations`. Raises `ValueError` for numbers that are not positive."""
    for name in ("steps", "restarts", "batch_size", "patience", "learning_rate", "max_step", "eps"):
        check_positive(name, getattr(options, name))
    largest = 1 if options.solver == "adam" else 0.5
    if options.max_step > largest:
        raise ValueError(f"--max-step is an angle in radians: expected at most {largest}, got {options.max_step}")
    solvers = {
        "auto": lambda: None,
        "annealing": lambda: Annealing(angle=options.max_step),
        "adam": lambda: Riemannian(optax.adam(options.learning_rate), max_step=options.max_step),
    }
    return {
        "measure": measures.by_name(options.measure, options.eps),
        "scale_inputs": input_scale == "std",
        "solver": solvers[options.solver](),
        "steps": options.steps or (400 if options.solver == "adam" else STEPS),
        "restarts": options.restarts,
        "batch_size": options.batch_size,
        "active_subspace": options.active_subspace,
        "tie": options.tie,
        "hold": options.hold,
        "patience": options.patience,
        "precision": options.precision,
        "progress": True,
        "mesh": mesh(options.devices, options.restarts),
    }


def mesh(count: int | None, restarts: int) -> Mesh | None:
    """So many devices of this host (default: all of them) in as many groups as the restarts can be spread over: those
    need no communication. The examples are spread within a group. `None` for one device. Raises `ValueError` where
    there are fewer."""
    devices = jax.local_devices()
    check_positive("devices", count)
    if count is not None and count > len(devices):
        raise ValueError(f"--devices {count}: JAX sees {len(devices)} on this host")
    devices = devices[:count]
    return None if len(devices) == 1 else device_mesh(restarts=math.gcd(restarts, len(devices)), devices=devices)


def records(options: "cli.RunOptions", folder: Path) -> dict[str, Any]:
    """The arguments of `find_rotations` with which a run can be resumed and followed. Raises `ValueError`."""
    check_positive("checkpoint_minutes", options.checkpoint_minutes)
    return {
        "checkpoint": Checkpoints(folder / runs.CHECKPOINTS, every_minutes=options.checkpoint_minutes),
        "log": RunLog(folder, tensorboard=options.tensorboard),
    }


def check_positive(name: str, value: float | None) -> None:
    """Raise `ValueError` for an option that is given and not greater than zero."""
    if value is not None and not value > 0:
        raise ValueError(f"--{name.replace('_', '-')} should be greater than zero, got {value}")


def plain(command) -> dict[str, Any]:
    """A command's options as JSON, those of its groups among the others."""
    options: dict[str, Any] = {}
    for name, value in dataclasses.asdict(command).items():
        options |= value if isinstance(value, dict) else {name: value}
    return {
        k: str(v) if isinstance(v, Path) else [str(p) for p in v] if isinstance(v, tuple) else v
        for k, v in options.items()
    }
