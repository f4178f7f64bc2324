"""The options of every command. Nothing here imports JAX."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

Activation = Literal["identity", "relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "quick_gelu", "squared_relu"]


MeasureName = Literal["log", "power", "l1", "geman-mcclure", "welsch", "tanh", "l4", "hoyer", "top-k"]


Control = Literal["quick", "none"]
Scale = Literal["std", "robust", "none"]


Site = Literal["attention", "heads", "residual", "input", "hidden", "output"]
Read = Literal["attention", "heads", "input", "hidden"]


def _default(what: str) -> Any:
    """What `--help` says about an option whose default is `None`."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {what})")


@dataclasses.dataclass(frozen=True)
class LayerOptions:
    """The layer and its inputs."""

    layer: Path
    """Layer file (safetensors or .npz) with named arrays, matrices [out, in]: w, b (single layer), or w_in, b_in,
    w_out, b_out (MLP block), or w_gate, w_up, w_down (gated block); norm_scale, norm_bias if a norm is in front."""
    activations: Path
    """The layer's inputs [examples, d_in]: .npy, .npz, safetensors, or a folder that `rotsparse capture` wrote, such as
    activations/4.input. If a .npy or a folder holds more than 256 MB, it stays on disk: the fit draws from all
    examples, and everything else uses at most 8192, evenly spaced."""
    activation: Activation = "relu"
    """The nonlinearity."""
    norm: Annotated[Literal["rms", "layer"] | None, _default("none")] = None
    """Normalisation in front of the layer."""
    skip: bool = False
    """Whether the layer's input is added to its output."""


@dataclasses.dataclass(frozen=True)
class EvaluationOptions(LayerOptions):
    """The layer, its inputs, and what is measured."""

    test_activations: Annotated[Path | None, _default("a fifth of the activations")] = None
    """Held-out inputs, on which every reported number is computed (on at most 8192, if they hold more than 256 MB). By
    default a fifth of the activations is held out: a random fifth, or the last fifth of activations that stay on
    disk."""
    input_scale: Scale = "std"
    """std: entries of the Jacobian are multiplied by the standard deviation of their (rotated) input, from which rows
    far from all others (attention sinks) are left out; robust: by one that the outermost 2% of the rows cannot move
    far; none: raw."""
    output_scale: Scale = "none"
    """std: entries of the Jacobian are divided by the standard deviation of their (rotated) output, taken likewise
    (robust too); none: raw. With both, entries have no unit."""
    seed: int = 0
    """Seed of everything random."""


@dataclasses.dataclass(frozen=True)
class Demo:
    """Train a small network, find the rotations around one of its layers, compare them with baselines and null models,
    and write a report. The network adds two numbers modulo 59, and the directions found are the waves it adds with.

    Takes about a minute. Example: rotsparse demo --out runs/demo
    """

    out: Path = Path("runs/demo")
    """The run folder to write."""
    network: Literal["addition", "digits"] = "addition"
    """addition: the MLP block of a network that adds; digits: the second ReLU layer of one that reads digits, on which
    random weights do as well (nothing was learned there that this could find)."""
    overwrite: bool = False
    """Replace an earlier run."""
    seed: int = 0
    """Seed of everything random."""
    steps: Annotated[int | None, _default("4000; of digits 8000")] = None
    """Optimisation steps."""
    examples: Annotated[int | None, _default("all")] = None
    """Use only this many examples (for a quick look)."""
    control: Control = "quick"
    """quick: also fit null models, by a few hundred steps, so that the report can say what is beyond chance; none: do
    not."""


@dataclasses.dataclass(frozen=True)
class FitOptions:
    """How to fit."""

    measure: MeasureName = "log"
    """The sparsity measure that is minimised."""
    eps: Annotated[float | None, _default("0.1, of hoyer 0.01")] = None
    """Scale of the measure, in units of the rms entry: entries well below it count as zero. l4 and top-k have none."""
    keep: Annotated[float | None, _default("0.5")] = None
    """With top-k: the share of entries that may be large."""
    solver: Literal["auto", "annealing", "adam"] = "auto"
    """annealing: many cheap steps of a given angle that shrinks to zero. auto: annealing, then searches over pairs of
    directions for as long as they pay. adam: Adam with cosine decay."""
    steps: Annotated[int | None, _default("4000, for adam 400")] = None
    """Optimisation steps: more find better optima."""
    restarts: int = 2
    """Independent starts, fitted at once: the first at the neurons, the others random. The report says how well they
    agree."""
    batch_size: Annotated[int | None, _default("16, for adam all")] = None
    """Examples per step."""
    learning_rate: float = 0.2
    """Initial learning rate of Adam."""
    max_step: float = 0.4
    """Largest angle of one step, in radians."""
    active_subspace: Annotated[float | None, _default("rotate all")] = None
    """Rotate only the directions that hold this share of the variance, e.g. 0.999."""
    tie: bool = False
    """Use one rotation for both sides (a residual stream)."""
    hold: Annotated[tuple[Literal["in", "out"], ...], _default("none")] = ()
    """Sides that stay in the neuron basis."""
    patience: Annotated[int | None, _default("take all steps")] = None
    """With adam: stop after this many steps without improvement."""
    precision: Literal["highest", "tensorfloat32", "bfloat16"] = "highest"
    """Precision of large matrix products, if the device supports it. Rotations are always orthogonalised in full
    precision."""
    devices: Annotated[int | None, _default("all")] = None
    """Number of devices of this host to spread restarts and examples over."""


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Where a run is written, and how often it is saved."""

    out: Path
    """The run folder to write. Until the run is complete, its name ends in .unfinished."""
    overwrite: bool = False
    """Replace an earlier run."""
    resume: bool = False
    """Continue an interrupted run of the same command, if there is one."""
    checkpoint_minutes: float = 5.0
    """Minutes between saved states of the fit. An interruption (SIGINT or SIGTERM: exit code 75) also saves it."""
    tensorboard: bool = False
    """Also write the log for TensorBoard (needs the extra `tensorboard`)."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """Find rotations of a layer's inputs and outputs in which its Jacobians are sparse; compare with every baseline.

    Example: rotsparse fit --layer mlp.safetensors --activations x.npy --activation gelu --out runs/mlp
    """

    layer: tyro.conf.OmitArgPrefixes[EvaluationOptions]
    fit: tyro.conf.OmitArgPrefixes[FitOptions]
    run: tyro.conf.OmitArgPrefixes[RunOptions]
    start: Annotated[Path | None, _default("the neurons")] = None
    """Rotations to start from: a run folder or a rotations.safetensors."""
    control: Control = "quick"
    """quick: also fit null models, by a few hundred steps, so that the report can say what is beyond chance; none: do
    not. (`rotsparse benchmark` fits them as long as the layer itself.)"""
    dry_run: bool = False
    """Print what the fit would take, phase by phase, and write nothing."""


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compare existing rotations with every baseline on held-out activations, without a fit.

    Example: rotsparse compare --layer mlp.npz --activations x.npy --rotations runs/mlp runs/mlp-longer
    """

    layer: tyro.conf.OmitArgPrefixes[EvaluationOptions]
    rotations: Annotated[tuple[Path, ...], _default("the baselines alone")] = ()
    """Run folders or rotations files; each is named after its folder."""
    out: Annotated[Path | None, _default("written nowhere")] = None
    """A JSON file to write the table to."""
    overwrite: bool = False
    """Replace an earlier file."""


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Test whether a learned basis is better than chance: fit the layer, and compare with every baseline, with the same
    fit of null models (three draws of each), and with other restarts, in one table with intervals and the time of each
    fit.

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
    """Fold rotations into a layer's weights (in float64), check that the function is unchanged, and write the layer.

    Example: rotsparse fold --layer mlp.npz --activations x.npy --rotations runs/mlp/rotations.safetensors --out
    folded.safetensors
    """

    layer: tyro.conf.OmitArgPrefixes[LayerOptions]
    rotations: Path
    """A run folder or a rotations.safetensors."""
    out: Path
    """The layer file to write (.safetensors)."""
    overwrite: bool = False
    """Replace an earlier file."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Redraw the figures and the report of a complete run.

    Example: rotsparse report runs/mlp
    """

    run: Annotated[Path, tyro.conf.Positional]
    """A run folder. For a fit-model run, every layer is redrawn."""


@dataclasses.dataclass(frozen=True)
class Explain:
    """Show what the directions of a run respond to, what they move and through which neurons: directions.html in the
    run folder, and in that of every layer of a fit-model run.

    Example: rotsparse explain runs/mlp
    """

    run: Annotated[Path, tyro.conf.Positional]
    """A run folder. For a fit-model run, every layer is explained."""
    tokenizer: Annotated[Path | None, _default("the words that the capture kept")] = None
    """For a run of a model: the tokenizer that gives the words of tokens (tokenizer.json, or llama2c's .bin)."""


@dataclasses.dataclass(frozen=True)
class Graph:
    """Write the graph of a run: which input directions move which output directions, of a fit-model run through all of
    its layers. graph.svg is a picture, graph.graphml and graph.json (networkx) are for other programs. Prints how the
    edges were chosen, and the modules of the graph beside those of random graphs.

    Example: rotsparse graph runs/mlp
    """

    run: Annotated[Path, tyro.conf.Positional]
    """A run folder. For a fit-model run, the graph goes through all of its layers."""
    out: Annotated[Path | None, _default("the run folder")] = None
    """The folder to write into."""
    share: float = 0.9
    """Keep the strongest edges that hold this share of the mean squared Jacobian between two places."""
    tolerance: Annotated[float | None, _default("cut by --share")] = None
    """Of layers of a language model: keep the fewest edges with which the cross-entropy of held-out text rises by at
    most so many nats, each layer by itself."""
    layers: str = "all"
    """Of a fit-model run: numbers and ranges, such as 0-4 or 0,2,5."""
    example: Annotated[int | None, _default("the mean over examples")] = None
    """The graph of the Jacobian at one held-out example, with its activations."""
    prompt: Annotated[str | None, _default("the mean over text")] = None
    """Of a language model: the graph of the Jacobian at the last token of this text, with its activations and the words
    that the model predicts. attribution.json is the graph in the format of circuit-tracer and Neuronpedia."""
    tokenizer: Annotated[Path | None, _default("the one in the model's folder or GGUF file")] = None
    """With --prompt: the tokenizer (tokenizer.json, or llama2.c's .bin)."""
    draws: int = 20
    """Random graphs of each kind to compare the modules with."""
    seed: int = 0
    """Seed of the modules and of the random graphs."""


@dataclasses.dataclass(frozen=True)
class Export:
    """Write what a run found for another library: the directions of one side of a layer, or the model of a sparsify run
    with its sparse inputs.

    Examples: rotsparse export runs/stories/layer-4 --side out --out saes/layer-4
    rotsparse export runs/sparse --out SmolLM2-sparse
    """

    run: Annotated[Path, tyro.conf.Positional]
    """The run of one layer, or a sparsify run."""
    out: Path
    """The folder to write (for vectors: the file)."""
    side: Literal["in", "out"] = "out"
    """Which of the two rotations."""
    to: Annotated[Literal["sae", "vectors", "huggingface"] | None, _default("sae, or huggingface")] = None
    """sae: an orthogonal autoencoder without error, with two features for each direction, that SAELens loads. vectors:
    the directions by name in one JSON file, a vector set of SAEDashboard.
    huggingface: a Hugging Face folder and rotsparse.safetensors beside its weights, that `rotsparse.torch` loads."""


@dataclasses.dataclass(frozen=True)
class Steer:
    """Go on with a text, as the model is and with one direction of a layer pushed at every token. The likeliest token
    is taken each time.

    Example: rotsparse steer runs/stories/layer-4 --tokenizer tok512.bin --direction out-3 --by 6 --prompt "Lily saw"
    """

    run: Annotated[Path, tyro.conf.Positional]
    """The run of a model's layer: layer-N in the folder of a fit-model run."""
    direction: str
    """A side and a number, such as in-3 or out-17, as on the page of `rotsparse explain`."""
    prompt: str
    """The beginning of the text."""
    by: float = 4.0
    """How far to push, in standard deviations of the direction's coordinate; may be negative."""
    length: int = 60
    """How many tokens to write."""
    tokenizer: Annotated[Path | None, _default("the one in the model's folder or GGUF file")] = None
    """The tokenizer: a tokenizer.json, or llama2c's .bin."""


@dataclasses.dataclass(frozen=True)
class Runs:
    """List the runs in a folder: state, steps done, and lowest objective.

    Example: rotsparse runs runs
    """

    folder: Annotated[Path, tyro.conf.Positional] = Path("runs")
    """The folder to list."""


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Show the layers of a model and their shapes, and what can be rotated and folded, or why not.

    Example: rotsparse inspect stories260K.bin
    """

    model: Annotated[Path, tyro.conf.Positional]
    """A Hugging Face folder (config.json and safetensors), a GGUF file, or a llama2.c checkpoint (.bin)."""


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """A model and its input."""

    model: Path
    """A Hugging Face folder (config.json and safetensors), a GGUF file, or a llama2.c checkpoint (.bin)."""
    text: Annotated[Path | None, _default("--tokens")] = None
    """A UTF-8 text file."""
    tokens: Annotated[Path | None, _default("--text")] = None
    """Instead of a text: token numbers in a .npy file, [n] or [sequences, tokens]; for an image model, pixels [n,
    channels, height, width]."""
    tokenizer: Annotated[Path | None, _default("the one in the model's folder or GGUF file")] = None
    """The tokenizer: a tokenizer.json, or llama2.c's .bin."""
    pad: Annotated[int | None, _default("the tokenizer's or config.json's, if no text begins or ends with it")] = None
    """With --tokens [sequences, tokens]: the token that fills up sequences. No position attends to it, and its rows are
    not kept."""


@dataclasses.dataclass(frozen=True)
class Capture:
    """Run a model over a text and save the inputs (or outputs) of its MLPs. To resume an interrupted capture, give the
    same command again.

    Example: rotsparse capture --model stories260K.bin --tokenizer tok512.bin --text stories.txt --out activations
    """

    source: tyro.conf.OmitArgPrefixes[TextOptions]
    out: Path
    """The folder to write, with one store for each layer and site, such as 0.input."""
    layers: str = "all"
    """Numbers and ranges, such as 0-4 or 0,2,5."""
    sites: tuple[Site, ...] = ("input",)
    """attention: what enters q, k and v; heads: what the attention's last matrix reads; residual: the stream before the
    MLP's norm; input: after the norm; hidden: the hidden layer; output: what the MLP adds to the stream."""
    length: int = 128
    """Tokens per sequence."""
    keep: float = 1.0
    """The share of each sequence's tokens to keep, drawn at random."""
    special: bool = False
    """Keep the rows of special tokens inside texts, such as separators, too."""
    sequences: Annotated[int | None, _default("all")] = None
    """At most this many sequences."""
    batch: int = 8
    """Sequences in one forward pass."""
    dtype: Literal["float32", "float16"] = "float32"
    """Number format of the stored activations."""
    seed: int = 0
    """Seed of everything random."""


@dataclasses.dataclass(frozen=True)
class FitModel:
    """Find rotations of the MLPs of a model from captured activations. The run has one folder per layer, with the files
    that `rotsparse fit` writes.

    Example: rotsparse fit-model --model stories260K.bin --store activations --layers 0-4 --out runs/stories
    """

    model: Path
    """A Hugging Face folder (config.json and safetensors), a GGUF file, or a llama2.c checkpoint (.bin)."""
    store: Path
    """A folder that `rotsparse capture` wrote from this model."""
    fit: tyro.conf.OmitArgPrefixes[FitOptions]
    run: tyro.conf.OmitArgPrefixes[RunOptions]
    layers: str = "all"
    """Numbers and ranges, such as 0-4 or 0,2,5."""
    site: Literal["input", "residual"] = "input"
    """Where each layer begins. input: the MLP alone; residual: the MLP with its norm."""
    skip: bool = False
    """With --site residual: each layer ends in the stream after the MLP, not at the MLP's output."""
    examples: int = 5000
    """Largest number of tokens to use, evenly spaced. The last fifth of the capture is held out."""
    control: Control = "quick"
    """quick: also fit null models, by a few hundred steps, so that the report can say what is beyond chance; none: do
    not. (`rotsparse benchmark` fits them as long as the layer itself.)"""
    dry_run: bool = False
    """Print what the fit would take, phase by phase, and write nothing."""
    input_scale: Scale = "std"
    """std: entries of the Jacobian are multiplied by the standard deviation of their (rotated) input, from which rows
    far from all others (attention sinks) are left out; robust: by one that the outermost 2% of the rows cannot move
    far; none: raw."""
    output_scale: Scale = "none"
    """std: entries of the Jacobian are divided by the standard deviation of their (rotated) output, taken likewise
    (robust too); none: raw. With both, entries have no unit."""
    seed: int = 0
    """Seed of everything random."""


@dataclasses.dataclass(frozen=True)
class FoldModel:
    """Fold rotations into a model's weights (in float64), check on real tokens that the function is unchanged, and
    write the result. `rotsparse inspect` says what can be folded.

    A rotations file is folded into the whole residual stream, and a model of the same format is written. A fit-model
    run is folded into each of its MLPs separately; no model format can hold that, so layer files are written.

    Example: rotsparse fold-model --model stories260K.bin --tokenizer tok512.bin --text stories.txt --rotations
    runs/stories/layer-4/rotations.safetensors --out folded.bin
    """

    source: tyro.conf.OmitArgPrefixes[TextOptions]
    rotations: Path
    """A rotations.safetensors (to fold the stream), or a fit-model run (to fold each MLP)."""
    out: Path
    """The model to write: a new folder, or a new .bin file. With a fit-model run: a new folder of layer files."""
    side: Literal["in", "out"] = "out"
    """Which of the file's two rotations to fold into the stream."""


@dataclasses.dataclass(frozen=True)
class Sparsify:
    """Find bases in which most inputs of a model's linear maps can be skipped, with thresholds and a budget for each
    site, and measure on held-out text what that costs: beside no rotation (TEAL), weight-aware scores (WINA), a
    Hadamard rotation and principal components (LaRoSA).

    Example: rotsparse sparsify SmolLM2-135M text.txt --keep 0.5 --out runs/sparse
    """

    model: tyro.conf.Positional[Path]
    """A Hugging Face folder (config.json and safetensors), a GGUF file, or a llama2.c checkpoint (.bin)."""
    text: tyro.conf.Positional[Path]
    """A UTF-8 text to find the bases on, or token numbers in a .npy file, [n] or [sequences, tokens]: take 100 tokens
    and more for each dimension of the stream."""
    out: Path
    """The run folder to write. Until the run is complete, its name ends in .unfinished."""
    overwrite: bool = False
    """Replace an earlier run."""
    resume: bool = False
    """Continue an interrupted run of the same command with its next layer, if there is one."""
    test_text: Annotated[Path | None, _default("the last fifth of the text")] = None
    """A held-out text (or .npy), on which every reported number is measured."""
    tokenizer: Annotated[Path | None, _default("the one in the model's folder or GGUF file")] = None
    """The tokenizer: a tokenizer.json, or llama2.c's .bin."""
    keep: float = 0.5
    """The share of the weights that is read: bases, thresholds and budgets are for this share."""
    shares: tuple[float, ...] = (0.75, 0.6, 0.5, 0.4)
    """The shares at which all bases are compared."""
    layers: str = "all"
    """Numbers and ranges, such as 0-4 or 0,2,5."""
    sites: tuple[Read, ...] = ("attention", "heads", "input", "hidden")
    """attention: what enters q, k and v; heads: what the attention's last matrix reads; input: what enters the MLP;
    hidden: what enters the MLP's last matrix."""
    rotate: tuple[Read, ...] = ("attention", "heads", "input")
    """The sites that get a rotation. One of the hidden layer would cost more than it saves when the model runs."""
    methods: tuple[Literal["none", "wina", "hadamard", "pca", "weighted", "fisher", "learned"], ...] = (
        "none",
        "wina",
        "hadamard",
        "pca",
        "weighted",
        "fisher",
        "learned",
    )
    """The bases to compare."""
    absorb: bool = False
    """Coordinates that are dropped take their mean (which becomes a bias) instead of zero."""
    train_shifts: int = 0
    """Steps for which the values that dropped coordinates take are trained in the result, on the divergence of the
    predictions. A step is one sequence of the text, forth and back through the model."""
    length: int = 512
    """Tokens per sequence."""
    tokens: Annotated[int | None, _default("all of the text")] = None
    """At most so many tokens of the text to find the bases on."""
    fisher_tokens: int = 16384
    """Tokens from which the network's curvature is estimated."""
    test_tokens: int = 16384
    """Tokens of the held-out text to measure on."""
    steps: int = 800
    """Steps of each fit."""
    seed: int = 0
    """Seed of everything random."""


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Fit, tyro.conf.subcommand("fit")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Benchmark, tyro.conf.subcommand("benchmark")]
    | Annotated[Fold, tyro.conf.subcommand("fold")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Explain, tyro.conf.subcommand("explain")]
    | Annotated[Graph, tyro.conf.subcommand("graph")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Steer, tyro.conf.subcommand("steer")]
    | Annotated[Runs, tyro.conf.subcommand("runs")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Capture, tyro.conf.subcommand("capture")]
    | Annotated[FitModel, tyro.conf.subcommand("fit-model")]
    | Annotated[FoldModel, tyro.conf.subcommand("fold-model")]
    | Annotated[Sparsify, tyro.conf.subcommand("sparsify")]
)


def parsed() -> Any:
    """The command that `sys.argv` asks for. Exits where it asks for help, or for something that there is not."""
    return tyro.cli(
        Command,  # type: ignore[arg-type]
        prog="rotsparse",
        description="Rotations of a network's activation spaces in which local changes have local effects.",
    )
