"""Convert options of the command line to arguments of the library, and to the JSON that a run records."""

import dataclasses
import math
import os
import shlex
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from rotsparse.data import scales as data_scales
from rotsparse.data.devices import device_mesh
from rotsparse.engine.method import Method
from rotsparse.engine.run import Run
from rotsparse.fit.default_method import EXAMPLES, STEPS, default_method
from rotsparse.objectives import measures
from rotsparse.solvers.anneal import Anneal
from rotsparse.solvers.riemannian import Riemannian
from rotsparse_command import options

# Measures without a scale ε.
SCALELESS = ("l4", "top-k")


def scales(options: "options.EvaluationOptions | options.FitModel") -> dict[str, Any]:
    """How the sides of the Jacobian are scaled."""
    return {
        "scale_inputs": data_scales.by_name(options.input_scale),
        "scale_outputs": data_scales.by_name(options.output_scale),
    }


def fit_arguments(options: "options.FitOptions", scales: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `find_rotations`. Raises `ValueError` for numbers that are not positive."""
    for name in ("steps", "restarts", "batch_size", "patience", "learning_rate", "max_step"):
        check_positive(name, getattr(options, name))
    if options.max_step > 0.5:
        raise ValueError(f"--max-step is an angle in radians: expected at most 0.5, got {options.max_step}")
    return {
        "measure": _measure(options),
        **scales,
        "method": _method(options),
        "restarts": options.restarts,
        "active_subspace": options.active_subspace,
        "tie": options.tie,
        "hold": options.hold,
        "precision": options.precision,
        "run": Run(progress=True, mesh=mesh(options.devices, options.restarts)),
    }


def _method(options: "options.FitOptions") -> Method | None:
    """The method that the options ask for; `None`: the layer's default."""
    if options.solver == "adam":
        return Riemannian(
            optax.adam(options.learning_rate),
            steps=options.steps or 400,
            batch_size=options.batch_size,
            patience=options.patience,
            max_step=options.max_step,
        )
    if options.patience is not None:
        raise ValueError(
            "--patience belongs to --solver adam: annealing improves most near its end, take fewer --steps"
        )
    if options.solver == "annealing":
        steps, batch_size = options.steps or STEPS, options.batch_size or EXAMPLES
        return Anneal(steps=steps, angle=options.max_step, batch_size=batch_size)
    if options.steps is None and options.batch_size is None:
        return None
    return default_method(steps=options.steps, batch_size=options.batch_size)


def _measure(options: "options.FitOptions") -> measures.Measure:
    """The measure with its options. Raises `ValueError` for an option that this measure lacks."""
    check_positive("eps", options.eps)
    if options.eps is not None and options.measure in SCALELESS:
        raise ValueError(f"--measure {options.measure} has no scale: leave out --eps")
    if options.keep is None:
        return measures.by_name(options.measure, options.eps)
    if options.measure != "top-k":
        raise ValueError(f"--keep belongs to --measure top-k, and the measure is {options.measure}: leave it out")
    return measures.TopK(options.keep)


def mesh(count: int | None, restarts: int) -> Mesh | None:
    """A mesh of `count` devices of this host (default: all); `None` for one device. Restarts are spread over as many
    groups of devices as possible, because they need no communication; examples are spread within each group. Raises
    `ValueError` if the host has fewer devices."""
    devices = jax.local_devices()
    check_positive("devices", count)
    if count is not None and count > len(devices):
        raise ValueError(f"--devices {count}: JAX sees {len(devices)} on this host")
    devices = devices[:count]
    return None if len(devices) == 1 else device_mesh(restarts=math.gcd(restarts, len(devices)), devices=devices)


def recorded(fit: dict[str, Any], options: "options.RunOptions", folder: Path) -> dict[str, Any]:
    """The arguments of `find_rotations`, with checkpoints and a log in `folder`. Raises `ValueError` for an interval
    that is not positive."""
    check_positive("checkpoint_minutes", options.checkpoint_minutes)
    run = dataclasses.replace(
        fit["run"], folder=folder, every_minutes=options.checkpoint_minutes, tensorboard=options.tensorboard
    )
    return fit | {"run": run}


def check_positive(name: str, value: float | None) -> None:
    """Raise `ValueError` if an option is given and not greater than zero."""
    if value is not None and not value > 0:
        raise ValueError(f"--{name.replace('_', '-')} should be greater than zero, got {value}")


def layer_numbers(text: str, count: int) -> list[int]:
    """Parse layer numbers such as "0-4", "0,2,5" or "all". Raises `ValueError` for others than 0 to `count - 1`."""
    if text == "all":
        return list(range(count))
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"--layers should be numbers and ranges such as 0-4 or 0,2,5, or all, got {text!r}")
        numbers |= set(range(int(first), int(last or first) + 1))
    if not numbers or max(numbers) >= count:
        raise ValueError(f"--layers {text}: the model has layers 0 to {count - 1}")
    return sorted(numbers)


def again(command: str, options: Any) -> str:
    """The command line that gives the same run again, without what only says how to run it."""
    return " ".join(filter(None, ["rotsparse", command, spelled(options, leave_out=_HOW)]))


# Options that say how to run a command, and not what it computes.
_HOW = ("overwrite", "resume", "tensorboard", "checkpoint_minutes", "devices")


def spelled(options: Any, *, leave_out: tuple[str, ...] = ()) -> str:
    """The options of a group that differ from their defaults, as typed on the command line; those of groups in it
    too."""
    words = []
    for field in dataclasses.fields(options):
        value, name = getattr(options, field.name), f"--{field.name.replace('_', '-')}"
        if dataclasses.is_dataclass(value):
            words += filter(None, [spelled(value, leave_out=leave_out)])
        elif value != field.default and field.name not in leave_out:
            values = () if value is True else value if isinstance(value, tuple) else (value,)
            words += [name, *(shlex.quote(str(v)) for v in values)]
    return " ".join(words)


def plain(command) -> dict[str, Any]:
    """A command's options as JSON, with groups flattened. Paths are made absolute, so that they can be used from
    another folder."""
    options: dict[str, Any] = {}
    for name, value in dataclasses.asdict(command).items():
        options |= value if isinstance(value, dict) else {name: value}
    return {name: _plain(value) for name, value in options.items()}


def _plain(value: Any) -> Any:
    match value:
        case Path():
            return os.path.abspath(value)
        case tuple():
            return [_plain(v) for v in value]
        case _:
            return value
