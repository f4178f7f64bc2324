"""The `rotsparse` command."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

# JAX and the library are imported inside the commands, so that `--help` and a mistyped option answer at once.

Activation = Literal["identity", "relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "quick_gelu", "squared_relu"]
MeasureName = Literal["log", "power", "l1", "geman-mcclure", "welsch", "tanh", "l4", "hoyer"]


@dataclasses.dataclass(frozen=True)
class LayerOptions:
    """Which layer, and what enters it."""

    layer: Path
    """Layer file (safetensors or .npz) with named arrays, matrices [out, in]: w, b (single layer), or w_in, b_in,
    w_out, b_out (MLP block), or w_gate, w_up, w_down (gated block); norm_scale, norm_bias if a norm is in front."""
    activations: Path
    """The layer's inputs [examples, d_in] to fit on: .npy, .npz or safetensors."""
    test_activations: Path | None = None
    """Held-out inputs that every reported number is computed on. Without them, a fifth of the activations is held
    out."""
    activation: Activation = "relu"
    """The nonlinearity."""
    norm: Literal["rms", "layer"] | None = None
    """Normalisation in front of the layer."""
    skip: bool = False
    """Whether the layer's input is added to its output."""
    input_scale: Literal["std", "none"] = "std"
    """std: entries of the Jacobian are multiplied by the standard deviation of their (rotated) input; none: raw."""
    seed: int = 0
    """Everything random follows from it."""


@dataclasses.dataclass(frozen=True)
class Demo:
    """Train a small network on handwritten digits, find the rotations around its second layer, and write a report.

    Takes about a minute. Example: rotsparse demo --out runs/demo
    """

    out: Path = Path("runs/demo")
    """The run folder to write."""
    overwrite: bool = False
    """Replace an earlier run."""
    seed: int = 0
    """Everything random follows from it."""
    steps: int = 8000
    """Optimisation steps."""
    examples: int | None = None
    """Use only so many images (a quick look)."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """Find rotations of a layer's inputs and outputs in which its Jacobians are sparse; compare with every baseline.

    Example: rotsparse fit --layer mlp.safetensors --activations x.npy --activation gelu --out runs/mlp
    """

    layer: tyro.conf.OmitArgPrefixes[LayerOptions]
    out: Path
    """The run folder to write."""
    overwrite: bool = False
    """Replace an earlier run."""
    measure: MeasureName = "log"
    """The sparsity measure that is minimised."""
    eps: float | None = None
    """The measure's scale, in units of the rms entry: what counts as zero."""
    solver: Literal["auto", "annealing", "adam"] = "auto"
    """auto and annealing: many cheap steps of a prescribed angle that shrinks to zero. adam: Adam with a cosine
    decay."""
    steps: int | None = None
    """Optimisation steps: 4000 for annealing (more find better optima), 400 for adam, unless given."""
    restarts: int = 2
    """Independent starts (the first from the neurons, the others random), fitted at once; how well they agree is
    reported."""
    batch_size: int | None = None
    """Examples a step: 16 for annealing, all for adam, unless given."""
    learning_rate: float = 0.2
    """Adam's rate at the start."""
    max_step: float = 0.4
    """Largest angle that one step may turn, in radians."""
    active_subspace: float | None = None
    """Rotate only the directions that hold this share of the variance, e.g. 0.999."""
    tie: bool = False
    """One rotation for both sides (a residual stream)."""
    hold: tuple[Literal["in", "out"], ...] = ()
    """Sides that stay in the neuron basis."""
    patience: int | None = None
    """With adam: stop after this many steps without improvement."""
    start: Path | None = None
    """Rotations (a run's rotations.safetensors) to start from."""


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compare rotations that you have with every baseline, on held-out activations. Nothing is fitted.

    Example: rotsparse compare --layer mlp.npz --activations x.npy --rotations runs/mlp/rotations.safetensors
    """

    layer: tyro.conf.OmitArgPrefixes[LayerOptions]
    rotations: tuple[Path, ...] = ()
    """Rotations files; each is named after its run folder."""
    out: Path | None = None
    """A JSON file to write the table to."""


@dataclasses.dataclass(frozen=True)
class Fold:
    """Put rotations into a layer's weights (in float64), check that the function is unchanged, and write the layer.

    Example: rotsparse fold --layer mlp.npz --activations x.npy --rotations runs/mlp/rotations.safetensors --out
    folded.safetensors
    """

    layer: tyro.conf.OmitArgPrefixes[LayerOptions]
    rotations: Path
    """A run's rotations.safetensors."""
    out: Path
    """The layer file to write (safetensors)."""
    overwrite: bool = False
    """Replace an earlier file."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Draw the figures and the page of a finished run again.

    Example: rotsparse report runs/mlp
    """

    run: Annotated[Path, tyro.conf.Positional]
    """A run folder."""


def main() -> None:
    """Entry point: 0 success, 1 the fit went wrong, 2 bad input (with a message), 130 interrupted."""
    command = tyro.cli(
        Annotated[Demo, tyro.conf.subcommand("demo")]
        | Annotated[Fit, tyro.conf.subcommand("fit")]
        | Annotated[Compare, tyro.conf.subcommand("compare")]
        | Annotated[Fold, tyro.conf.subcommand("fold")]
        | Annotated[Report, tyro.conf.subcommand("report")],
        prog="rotsparse",
        description="Rotations of a network's activation spaces in which local changes have local effects.",
    )
    _cache_compilations()
    from rotsparse import commands

    try:
        sys.exit(commands.run(command))
    except ValueError as error:
        print(f"rotsparse: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("rotsparse: interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)


def _cache_compilations() -> None:
    """Keep compiled programs between runs: compile time is most of a short run."""
    import jax

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rotsparse" / "jax"
    options: dict[str, Any] = {
        "jax_compilation_cache_dir": str(cache),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        for name, value in options.items():
            jax.config.update(name, value)
