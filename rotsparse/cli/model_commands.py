"""The subcommands for whole models. Bad input raises `ValueError`, which `cli.main` prints."""

import itertools
import os
import shlex
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from rich.console import Console
from rich.table import Table

from rotsparse import models
from rotsparse._core import checks
from rotsparse._core.alignment import mean_max_cosine
from rotsparse._core.files import make_folder, new_folder, write_atomically
from rotsparse._core.interrupt import Interrupted
from rotsparse._core.printable import markdown, visible
from rotsparse._core.reading import reading
from rotsparse.cli import explain_command
from rotsparse.cli.arguments import (
    again,
    check_positive,
    fit_arguments,
    layer_numbers,
    plain,
    recorded,
    scales,
    spelled,
)
from rotsparse.data.moments import evenly_spaced
from rotsparse.engine.solution import Result
from rotsparse.evaluation.names import basis_name
from rotsparse.explain.page import PAGE, write_index
from rotsparse.layers.files import save_array, save_layer
from rotsparse.layers.rotations import Rotations
from rotsparse.models.inputs import check_tokens
from rotsparse.models.sequences import PADDING
from rotsparse.report.subject import subject
from rotsparse.runs import estimate, folders, inputs, layer_run
from rotsparse_command import options

TITLE = "Entries of each layer that hold 99% of the mean squared Jacobian of held-out examples"
COLUMNS = ("layer", "learned", "neurons", "best baseline", "found again", "result")
_WRITTEN = {
    "huggingface": "in huggingface format",
    "llama2c": "in llama2c format",
    "gguf": "as a Hugging Face folder",
}
CONTROL = "Whether a layer is sparser than the same layer with random weights:"

# Folds are checked on this many sequences of this many tokens.
CHECKED_SEQUENCES, CHECKED_LENGTH = 4, 128


def inspect(command: "options.Inspect", console: Console) -> int:
    """`rotsparse inspect`."""
    summary = models.summarize(models.load_model(command.model))
    stream = summary["stream"]
    for name in ("architecture", "format", "parameters", "vocabulary", "positions", "head", "norm"):
        value = summary[name]
        console.print(f"{name:14}{value:,}" if isinstance(value, int) else f"{name:14}{value}", highlight=False)
    table = Table("layer", "MLP", "inputs", "hidden", "outputs")
    for layer in summary["layers"]:
        table.add_row(*(str(layer[column]) for column in ("layer", "mlp", "d_in", "d_hidden", "d_out")))
    console.print(table)
    said = {
        "each MLP": "its inputs and outputs can be rotated (fit-model, fold-model --rotations RUN); its hidden layer "
        "cannot, because an elementwise φ pins its neurons",
        "the stream": f"can be rotated (fold-model); written {_WRITTEN[summary['format']]}: {stream['export']}"
        if stream["foldable"]
        else stream["reason"],
    }
    for what, sentence in said.items():
        console.print(f"{what + ':':14}{sentence}", highlight=False, soft_wrap=True)
    return 0


def capture(command: "options.Capture", console: Console) -> int:
    """`rotsparse capture`."""
    model = models.load_model(command.source.model)
    layers = layer_numbers(command.layers, model.config.n_layers)
    checks.seed(command.seed)
    for name in ("sequences", "batch"):
        check_positive(name, getattr(command, name))
    try:
        stores = models.capture(
            model,
            _source(command.source, model),
            [(layer, site) for layer in layers for site in command.sites],
            command.out,
            length=command.length,
            keep=command.keep,
            sequences=command.sequences,
            special=command.special,
            batch=command.batch,
            seed=command.seed,
            dtype=np.dtype(command.dtype).type,
            progress=True,
        )
    except KeyboardInterrupt:
        raise Interrupted("interrupted: to go on, give the same command again") from None
    for store in stores:
        said = f"{visible(store.folder)}: {store.shape[0]:,} tokens, {store.shape[1]} numbers each"
        console.print(said, highlight=False)
        if heavy := store.manifest.get("heavy_rows"):
            with reading(store.folder):
                said = str(models.HeavyRows(**heavy))
            console.print(f"  {said}", highlight=False, soft_wrap=True)
    return 0


def fit(command: "options.FitModel", console: Console) -> int:
    """`rotsparse fit-model`: run the single-layer job for each layer in turn."""
    model = models.load_model(command.model)
    arguments = fit_arguments(command.fit, scales(command))
    check_positive("examples", command.examples)
    checks.seed(command.seed)
    if command.skip and command.site != "residual":
        raise ValueError("--skip adds the stream in front of the norm: it needs --site residual")
    # Check all inputs before the first fit.
    norm = command.site == "residual"
    work = [
        (i, models.mlp_layer(model, i, norm=norm, skip=command.skip), *_examples(command, i, model))
        for i in layer_numbers(command.layers, model.config.n_layers)
    ]
    if command.dry_run:
        rate = estimate.product_rate()
        for i, layer, train, test in work:
            console.rule(f"layer {i}")
            found, used = estimate.estimated(layer, train, test, arguments, control=command.control == "quick")
            console.print(estimate.table(found, rate, used))
        return 0
    layer_config = {
        "activation": model.config.activation,
        "norm": model.config.norm if norm else None,
        "skip": command.skip,
        "layer": "layer.safetensors",
        "activations": "activations.npy",
        "test_activations": "test_activations.npy",
    }
    results, entries = {}, []
    config, run = {"command": "fit-model", **plain(command)}, command.run
    stores = {f"store {i}": command.store / f"{i}.{command.site}" for i, *_ in work}
    config[folders.INPUTS] = {"model": model.fingerprint(), **inputs.hashes(**stores)}
    with folders.new_run(run.out, config=config, overwrite=run.overwrite, resume=run.resume) as folder:
        for i, layer, train, test in work:
            console.rule(f"layer {i}")
            of_layer = folder / f"layer-{i}"
            if (of_layer / layer_run.METRICS).exists():  # the fit of this layer is complete
                results[i] = folders.read_json(of_layer / layer_run.METRICS)
                entries.append(explain_command.layer(of_layer, console, model=model))
                continue
            make_folder(of_layer)
            # The inputs that `rotsparse report` needs, and `rotsparse fit` to repeat this layer alone.
            save_layer(of_layer / layer_config["layer"], layer)
            save_array(of_layer / layer_config["activations"], train)
            save_array(of_layer / layer_config["test_activations"], test)
            written = inputs.hashes(
                **{name: of_layer / layer_config[name] for name in ("layer", "activations", "test_activations")}
            )
            known = {"layer_number": i, "again": again("fit-model", command)}
            own = config | layer_config | known | {folders.INPUTS: config[folders.INPUTS] | written}
            fit = recorded(arguments, run, of_layer)
            layer_run.run(
                of_layer,
                layer,
                train,
                test,
                fit=fit,
                seed=command.seed,
                config=own,
                console=console,
                control=command.control == "quick",
                directions=True,
            )
            results[i] = folders.read_json(of_layer / layer_run.METRICS)
            entries.append(explain_command.layer(of_layer, console, model=model))
        write_index(folder, f"{subject(config)}: directions", entries)
        folders.write_json(
            folder / folders.CONFIG, config | {"versions": folders.versions(), "model": str(command.model)}
        )
        folders.write_json(folder / layer_run.METRICS, {"layers": results})
        with reading(folder):
            rows = _summary(results)
        control = _control(command, run.out / f"layer-{work[0][0]}", layer_config)
        text = f"{TITLE}:\n\n{_markdown([COLUMNS, *rows])}\n\n{CONTROL}\n\n    {control}\n"
        write_atomically(folder / layer_run.TABLE, text.encode())
    table = Table(*COLUMNS, title=TITLE)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"a report for each layer: {visible(run.out)}/layer-*/report.html")
    console.print(f"its directions: {visible(run.out / PAGE)}")
    console.print(f"{CONTROL}\n  {control}", highlight=False, markup=False, soft_wrap=True)
    return 1 if Result.NON_FINITE.name in {metrics["result"] for metrics in results.values()} else 0


def fold(command: "options.FoldModel", console: Console) -> int:
    """`rotsparse fold-model`."""
    if os.path.lexists(command.out):
        raise ValueError(f"{command.out} exists: choose another name or remove it first")
    model = models.load_model(command.source.model)
    tokens = _tokens(_source(command.source, model), model)
    if command.rotations.is_dir():
        return _fold_mlps(command, model, tokens, console)
    rotations, _ = Rotations.load(command.rotations)
    rotation = np.asarray(rotations.r_in if command.side == "in" else rotations.r_out)
    if model.format == "llama2c" and command.out.suffix != ".bin":
        raise ValueError(f"{command.out}: a llama2.c checkpoint's name ends in .bin")
    if model.config.norm == "layer" and len(rotation) == model.config.d_model:
        found, rotation = rotation, models.keep_mean(rotation)
        console.print(
            "A LayerNorm removes the mean, so the format holds only rotations that keep its direction: the nearest one "
            f"is used, whose directions have a mean |cos| of {mean_max_cosine(found, rotation):.3f} with those given.",
            soft_wrap=True,
        )
    folded = models.fold_stream(model, rotation, tokens)
    command.out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer_from = None if model.format == "llama2c" else command.source.model
    models.save_model(folded.model, command.out, tokenizer_from=tokenizer_from)
    difference = np.abs(models.outputs(models.load_model(command.out), tokens) - models.outputs(model, tokens)).max()
    console.print(
        f"wrote {visible(command.out)}: the stream is in rotated coordinates\n"
        f"on {tokens.size} tokens, outputs of up to {folded.scale:.3g} differ by up to {folded.error:.1e} "
        f"(by rounding the weights {folded.rounded_error:.1e}, in float64 throughout {folded.exact_error:.1e})\n"
        f"read back from the file: outputs differ by up to {difference:.1e}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _fold_mlps(command: "options.FoldModel", model: models.Model, tokens, console: Console) -> int:
    """Write each MLP, in the coordinates that a run found for it, as a layer file."""
    files = {i: command.rotations / f"layer-{i}" / layer_run.ROTATIONS for i in range(model.config.n_layers)}
    files = {i: path for i, path in files.items() if path.exists()}
    if not files:
        raise ValueError(f"{command.rotations} holds no layer-*/rotations.safetensors: is it a fit-model run?")
    config = folders.read_object(command.rotations / folders.CONFIG)
    known = config.get(folders.INPUTS)
    fitted = known.get("model") if isinstance(known, Mapping) else None
    if fitted is not None and fitted != model.fingerprint():
        raise ValueError(
            f"{command.rotations} was fitted to another model than {command.source.model} is now (the fingerprint of "
            "its weights is not the one in the run's config): give that model"
        )
    if config.get("site") != "input":
        raise ValueError(
            f"{command.rotations} rotates the stream in front of the norms, not the MLPs behind them: fold one of its "
            "rotations files into the whole stream, or fit with --site input"
        )
    folded, steps = model, []
    for i, path in files.items():
        steps.append(models.fold_mlp(folded, i, Rotations.load(path)[0], tokens))
        folded = steps[-1].model
    before, after = (models.outputs(m, tokens) for m in (model, folded))
    with new_folder(command.out) as folder:
        for i, path in files.items():
            part = folder / f"layer-{i}"
            part.mkdir()
            save_layer(part / "layer.safetensors", models.mlp_layer(folded, i))
            shutil.copy(path, part)
    console.print(
        f"wrote {visible(command.out)}: layer files of {len(files)} MLPs, each in coordinates of its own, and their "
        "rotations\n"
        f"on {tokens.size} tokens, outputs of up to {np.abs(before).max():.3g} differ by up to "
        f"{np.abs(after - before).max():.1e} "
        f"(in float64 throughout, one MLP at a time, {max(step.exact_error for step in steps):.1e})",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _summary(results: Mapping[int, Mapping[str, Any]]) -> list[list[str]]:
    """One row per layer: the number of entries that hold 99% in the learned basis, the neuron basis and the best other
    basis; the share of directions that other restarts found again; and the result of the fit."""
    rows = []
    for i, result in results.items():
        edges = {basis: of["edges_99"]["value"] for basis, of in result["metrics"].items()}
        best = min((basis for basis in edges if basis != "learned"), key=edges.__getitem__)
        again = [f"{space} {of['reproduced']:.0%}" for space, of in (result["agreement"] or {}).items()]
        sizes = f"{edges['learned']:,.0f}", f"{edges['neurons']:,.0f}", f"{edges[best]:,.0f} ({basis_name(best)})"
        rows.append([str(i), *sizes, ", ".join(again) or "one start", result["result"]])
    return rows


def _markdown(rows: Iterable[Iterable[str]]) -> str:
    head, *body = (f"| {' | '.join(map(markdown, row))} |" for row in rows)
    return "\n".join([head, "|---" * len(COLUMNS) + "|", *body])


def _control(command: "options.FitModel", folder: Path, files: Mapping[str, Any]) -> str:
    """The command that tests whether a layer of a run is sparser than the same layer with random weights."""
    layer = options.EvaluationOptions(
        **{name: folder / files[name] for name in ("layer", "activations", "test_activations")},
        activation=files["activation"],
        norm=files["norm"],
        input_scale=command.input_scale,
        output_scale=command.output_scale,
        seed=command.seed,
    )
    out = shlex.quote(f"{folder.parent}-{folder.name}-benchmark")
    return " ".join(filter(None, ["rotsparse benchmark", spelled(layer), spelled(command.fit), "--out", out]))


def _source(
    options: "options.TextOptions", model: models.Model
) -> models.TextFile | models.TokenFile | models.ImageFile:
    """The text, the tokens or the images. Raises `ValueError` unless exactly one of them is given, and for a text
    without a tokenizer."""
    if options.pad is not None and options.tokens is None:
        raise ValueError("--pad belongs to --tokens: a text is not padded")
    if options.tokens is not None and options.text is None:
        if model.config.patches is not None:
            return models.ImageFile(options.tokens)
        named = options.tokenizer or (options.model if _has_tokenizer(options.model) else None)
        if named is None:
            return models.TokenFile(options.tokens, pad=options.pad)
        tokenizer, pad = models.load_tokenizer(named, model), options.pad
        if pad is None and tokenizer.pad not in {*tokenizer.prefix, *tokenizer.suffix}:
            pad = tokenizer.pad
        return models.TokenFile(options.tokens, pad=pad, special=tokenizer.special)
    if options.text is None or options.tokens is not None:
        raise ValueError("give a text with --text, or token numbers with --tokens (one of them)")
    if options.tokenizer is None and not (options.model.is_dir() or options.model.suffix == ".gguf"):
        raise ValueError(f"{options.model} comes without a tokenizer: name its file with --tokenizer")
    return models.TextFile(options.text, models.load_tokenizer(options.tokenizer or options.model, model))


def _has_tokenizer(model: Path) -> bool:
    """Whether the model comes with a tokenizer: in its folder, or inside a GGUF file."""
    return (model / "tokenizer.json").exists() if model.is_dir() else model.suffix == ".gguf"


def _tokens(
    source: models.TextFile | models.TokenFile | models.ImageFile, model: models.Model
) -> Int[np.ndarray, "batch tokens"] | Float[np.ndarray, "batch channels height width"]:
    """A few sequences of equal length, or a few images, on which to check a fold."""
    if isinstance(source, models.ImageFile):
        return np.array(source.images[:CHECKED_SEQUENCES])
    around = len(source.prefix) + len(source.suffix)
    body = min(CHECKED_LENGTH, model.config.max_positions) - around
    pieces = [piece for piece, _ in itertools.islice(source.sequences(body), CHECKED_SEQUENCES)]
    whole = [piece for piece in pieces if len(piece) == body] or pieces[:1]
    if not whole:
        raise ValueError(f"{source.path} holds no tokens")
    tokens = np.stack([np.concatenate([source.prefix, piece, source.suffix]).astype(np.int64) for piece in whole])
    if isinstance(source, models.TokenFile) and source.pad is not None:
        tokens[tokens == PADDING] = source.pad
    check_tokens(tokens, model.config, source.path)
    return tokens


def _examples(
    command: "options.FitModel", layer: int, model: models.Model
) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "m d"]]:
    """Captured activations to fit on, evenly spaced in the first four fifths of the store, and held-out activations,
    evenly spaced in the last fifth. Neighbouring tokens are alike, so the two come from different text."""
    store = models.open_store(command.store / f"{layer}.{command.site}", model.fingerprint())
    store.verify()
    total = min(command.examples, len(store))
    if total < 10:
        raise ValueError(f"{store.folder}: {total} examples are too few to hold a fifth of them out, give at least 10")
    held_out, border = total // 5, len(store) - len(store) // 5
    parts = (np.arange(border), total - held_out), (np.arange(border, len(store)), held_out)
    train, test = (store.read(np.asarray(evenly_spaced(rows, count))) for rows, count in parts)
    return train, test
