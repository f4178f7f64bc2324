"""The options of every command."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

Activation = Literal["identity", "relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "quick_gelu", "squared_relu"]


MeasureName = Literal["log", "power", "l1", "geman-mcclure", "welsch", "tanh", "l4", "hoyer", "top-k"]


def _default(what: str) -> Any:
    """What `--help` says where the default is `None`."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {what})")


@dataclasses.dataclass(frozen=True)
class LayerOptions:
    """Which layer, and what enters it."""

    layer: Path
    """Layer file (safetensors or .npz) with named arrays, matrices [out, in]: w, b (single layer), or w_in, b_in,
    w_out, b_out (MLP block), or w_gate, w_up, w_down (gated block); norm_scale, norm_bias if a norm is in front."""
    activations: Path
    """The layer's inputs [examples, d_in]: .npy, .npz, safetensors, or a folder that `rotsparse capture` wrote, such as
    activations/4.input. More than 256 MB in a .npy or a folder stay on disk: a fit draws from all of them, and all else
    sees at most 8192, evenly spread."""
    activation: Activation = "relu"
    """The nonlinearity."""
    norm: Annotated[Literal["rms", "layer"] | None, _default("none")] = None
    """Normalisation in front of the layer."""
    skip: bool = False
    """Whether the layer's input is added to its output."""


@dataclasses.dataclass(frozen=True)
class EvaluationOptions(LayerOptions):
    """Which layer, what enters it, and what is measured."""

    test_activations: Annotated[Path | None, _default("a fifth of the activations")] = None
    """Held-out inputs that every reported number is computed on (of more than 256 MB, on at most 8192). Without them, a
    fifth of the activations is held out: a random one, of activations that stay on disk the last one."""
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
    examples: Annotated[int | None, _default("all")] = None
    """Use only so many images (a quick look)."""


@dataclasses.dataclass(frozen=True)
class FitOptions:
    """How to fit."""

    measure: MeasureName = "log"
    """The sparsity measure that is minimised."""
    eps: Annotated[float | None, _default("0.1, of hoyer 0.01")] = None
    """The measure's scale, in units of the rms entry: what counts as zero. l4 and top-k have none."""
    keep: Annotated[float | None, _default("0.5")] = None
    """With top-k: the share of the entries that may be large."""
    solver: Literal["auto", "annealing", "adam"] = "auto"
    """annealing: many cheap steps of a prescribed angle that shrinks to zero. auto: annealing, then searches over pairs
    of directions where they pay. adam: Adam with a cosine decay."""
    steps: Annotated[int | None, _default("4000, for adam 400")] = None
    """Optimisation steps: more find better optima."""
    restarts: int = 2
    """Independent starts (the first from the neurons, the others random), fitted at once; how well they agree is
    reported."""
    batch_size: Annotated[int | None, _default("16, for adam all")] = None
    """Examples a step."""
    learning_rate: float = 0.2
    """Adam's rate at the start."""
    max_step: float = 0.4
    """For annealing and adam: the largest angle that one step may turn, in radians."""
    active_subspace: Annotated[float | None, _default("rotate all")] = None
    """Rotate only the directions that hold this share of the variance, e.g. 0.999."""
    tie: bool = False
    """One rotation for both sides (a residual stream)."""
    hold: Annotated[tuple[Literal["in", "out"], ...], _default("none")] = ()
    """Sides that stay in the neuron basis."""
    patience: Annotated[int | None, _default("take all steps")] = None
    """With adam: stop after this many steps without improvement."""
    precision: Literal["highest", "tensorfloat32", "bfloat16"] = "highest"
    """Of the large matrix products, where the device has units for it. Rotations are always orthogonalised in full."""
    devices: Annotated[int | None, _default("all")] = None
    """How many devices (of this host) to spread restarts and examples over."""


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Where a run is written, and how it survives an interruption."""

    out: Path
    """The run folder to write. Until the run is complete, it works in a folder of that name with .unfinished behind
    it."""
    overwrite: bool = False
    """Replace an earlier run."""
    resume: bool = False
    """Go on with an earlier run of the same command that was interrupted, if there is one."""
    checkpoint_minutes: float = 5.0
    """How often the state of the fit is saved, beside when it is interrupted (SIGINT or SIGTERM: exit code 75)."""
    tensorboard: bool = False
    """Write the log for TensorBoard, too (needs the extra `tensorboard`)."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """Find rotations of a layer's inputs and outputs in which its Jacobians are sparse; compare with every baseline.

    Example: rotsparse fit --layer mlp.safetensors --activations x.npy --activation gelu --out runs/mlp
    """

    layer: tyro.conf.OmitArgPrefixes[EvaluationOptions]
    fit: tyro.conf.OmitArgPrefixes[FitOptions]
    run: tyro.conf.OmitArgPrefixes[RunOptions]
    start: Annotated[Path | None, _default("the neurons")] = None
    """Rotations to start from: a run folder, or its rotations.safetensors."""


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compare rotations that you have with every baseline, on held-out activations. Nothing is fitted.

    Example: rotsparse compare --layer mlp.npz --activations x.npy --rotations runs/mlp runs/mlp-longer
    """

    layer: tyro.conf.OmitArgPrefixes[EvaluationOptions]
    rotations: Annotated[tuple[Path, ...], _default("the baselines alone")] = ()
    """Run folders, or rotations files; each is named after its folder."""
    out: Annotated[Path | None, _default("written nowhere")] = None
    """A JSON file to write the table to."""
    overwrite: bool = False
    """Replace an earlier file."""


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Is the learned basis of a layer worth anything? Fit it, and compare with every baseline, with the same fit of
    random weights, and with other restarts: one table with intervals and what each basis took to fit.

    Example: rotsparse benchmark --layer mlp.safetensors --activations x.npy --activation gelu --out runs/mlp-benchmark
    """

    layer: tyro.conf.OmitArgPrefixes[EvaluationOptions]
    fit: tyro.conf.OmitArgPrefixes[FitOptions]
    out: Annotated[Path | None, _default("written nowhere")] = None
    """The run folder to write (table.md, metrics.json, rotations.safetensors)."""
    overwrite: bool = False
    """Replace an earlier run."""


@dataclasses.dataclass(frozen=True)
class Fold:
    """Put rotations into a layer's weights (in float64), check that the function is unchanged, and write the layer.

    Example: rotsparse fold --layer mlp.npz --activations x.npy --rotations runs/mlp/rotations.safetensors --out
    folded.safetensors
    """

    layer: tyro.conf.OmitArgPrefixes[LayerOptions]
    rotations: Path
    """A run folder, or its rotations.safetensors."""
    out: Path
    """The layer file to write (.safetensors)."""
    overwrite: bool = False
    """Replace an earlier file."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Draw the figures and the page of a finished run again.

    Example: rotsparse report runs/mlp
    """

    run: Annotated[Path, tyro.conf.Positional]
    """A run folder; of fit-model, with all its layers."""


@dataclasses.dataclass(frozen=True)
class Runs:
    """List the runs in a folder: their state, how far they are, and the best value of the objective.

    Example: rotsparse runs runs
    """

    folder: Annotated[Path, tyro.conf.Positional] = Path("runs")
    """The folder that holds them."""


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Show what a model consists of: its layers, their shapes, what can be rotated and folded, and what cannot and why.

    Example: rotsparse inspect stories260K.bin
    """

    model: Annotated[Path, tyro.conf.Positional]
    """A Hugging Face folder (config.json and safetensors), or a llama2.c checkpoint (.bin)."""


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """A model and what it reads."""

    model: Path
    """A Hugging Face folder (config.json and safetensors), or a llama2.c checkpoint (.bin)."""
    text: Annotated[Path | None, _default("--tokens")] = None
    """A UTF-8 text file."""
    tokens: Annotated[Path | None, _default("--text")] = None
    """Instead of a text: token numbers in a .npy file, [n] or [sequences, tokens]."""
    tokenizer: Annotated[Path | None, _default("the tokenizer.json in the model's folder")] = None
    """The tokenizer: a tokenizer.json, or llama2.c's .bin."""


@dataclasses.dataclass(frozen=True)
class Capture:
    """Run a model over a text and keep what enters (or leaves) its MLPs. An interrupted capture goes on where it
    stopped when the same command is given again.

    Example: rotsparse capture --model stories260K.bin --tokenizer tok512.bin --text stories.txt --out activations
    """

    source: tyro.conf.OmitArgPrefixes[TextOptions]
    out: Path
    """The folder to write: a store for each layer and site, such as 0.input."""
    layers: str = "all"
    """Numbers and ranges, such as 0-4 or 0,2,5."""
    sites: tuple[Literal["residual", "input", "hidden", "output"], ...] = ("input",)
    """residual: the stream in front of the norm; input: behind it; hidden: the hidden layer; output: what the MLP
    adds."""
    length: int = 128
    """Tokens of a sequence."""
    keep: float = 1.0
    """The share of each sequence's tokens to keep, drawn at random."""
    sequences: Annotated[int | None, _default("all")] = None
    """At most this many sequences."""
    batch: int = 8
    """Sequences that the model reads at once."""
    dtype: Literal["float32", "float16"] = "float32"
    """How activations are stored."""
    seed: int = 0
    """Everything random follows from it."""


@dataclasses.dataclass(frozen=True)
class FitModel:
    """Find rotations of the MLPs of a model, from captured activations. The run has a folder for every layer, with what
    `rotsparse fit` writes for a single one.

    Example: rotsparse fit-model --model stories260K.bin --store activations --layers 0-4 --out runs/stories
    """

    model: Path
    """A Hugging Face folder (config.json and safetensors), or a llama2.c checkpoint (.bin)."""
    store: Path
    """A folder that `rotsparse capture` wrote from this model."""
    fit: tyro.conf.OmitArgPrefixes[FitOptions]
    run: tyro.conf.OmitArgPrefixes[RunOptions]
    layers: str = "all"
    """Numbers and ranges, such as 0-4 or 0,2,5."""
    site: Literal["input", "residual"] = "input"
    """Where the layers begin. input: the MLP alone; residual: with its norm in front."""
    skip: bool = False
    """With --site residual: the layers end in the stream behind the MLP, not at its output."""
    examples: int = 5000
    """Tokens to use at most, evenly spaced. The last fifth of the capture is held out."""
    input_scale: Literal["std", "none"] = "std"
    """std: entries of the Jacobian are multiplied by the standard deviation of their (rotated) input; none: raw."""
    seed: int = 0
    """Everything random follows from it."""


@dataclasses.dataclass(frozen=True)
class FoldModel:
    """Put rotations into a model's weights (in float64), check on real tokens that the function is unchanged, and write
    the result. `rotsparse inspect` says what can be folded.

    With a rotations file, the whole residual stream takes on its coordinates and a model of the same format is written.
    With a fit-model run, each of its MLPs takes on its own: no model format can hold that, and layer files are written.

    Example: rotsparse fold-model --model stories260K.bin --tokenizer tok512.bin --text stories.txt --rotations
    runs/stories/layer-4/rotations.safetensors --out folded.bin
    """

    source: tyro.conf.OmitArgPrefixes[TextOptions]
    rotations: Path
    """A rotations.safetensors (to fold the stream), or a fit-model run (to fold each MLP)."""
    out: Path
    """The model to write: a new folder, or a new .bin file. For each MLP: a new folder."""
    side: Literal["in", "out"] = "out"
    """Which of the file's two rotations the stream takes on."""
