"""The job of `rotsparse sparsify`: from a model and a text to sparse inputs of its linear maps, and what they cost.

Layer by layer: the site's activations on the text, every basis, and what dropping coordinates costs in each. What is
found of a layer is saved at once, so an interrupted run goes on with the next one. At the end the cross-entropy of a
held-out text is measured for every basis, by the same code, and saved a few sequences at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from jaxtyping import Float, Int, PRNGKeyArray

from rotsparse._core.files import make_folder, write_atomically
from rotsparse._core.modules import replace_fields
from rotsparse.layers.files import load_arrays
from rotsparse.models.model import Model
from rotsparse.models.transformer import Point
from rotsparse.runs.folders import CHECKPOINTS
from rotsparse.runs.phases import Phases, Shown
from rotsparse.sparse import plans
from rotsparse.sparse.bases import FISHER, LEARNED, Basis, baseline, components, damped, learned, readers, weighed
from rotsparse.sparse.budget import allotted, importance, thresholds
from rotsparse.sparse.calibration import activations, fisher_information
from rotsparse.sparse.file import FILE, write_sparse_inputs
from rotsparse.sparse.perplexity import Costs, Trial, costs, together
from rotsparse.sparse.plans import Measured
from rotsparse.sparse.shifts import trained_shifts

# Thresholds are taken from about so many tokens, and budgets from so many.
THRESHOLDED, BUDGETED = 8192, 512


@dataclass(frozen=True)
class Settings:
    """What a run does. `keep`: the share of the weights that the bases are fitted for, and that the result reads.
    `shares`: those at which all are compared. `rotate`: the sites that get a rotation. `absorb`: whether dropped
    coordinates take their mean, which becomes a bias, instead of zero. `train_shifts`: for how many steps what they
    take is trained, in the result."""

    sites: tuple[str, ...]
    rotate: tuple[str, ...]
    layers: tuple[int, ...]
    keep: float
    shares: tuple[float, ...]
    methods: tuple[str, ...]
    absorb: bool
    train_shifts: int
    steps: int
    seed: int


def calibrate(
    folder: Path,
    model: Model,
    tokens: Int[np.ndarray, "sequences length"],
    fisher_tokens: Int[np.ndarray, "few length"],
    settings: Settings,
    phases: Phases,
) -> None:
    """Find the bases of every layer, into `checkpoints/step-LAYER`. Layers that are there already are kept."""
    todo = [layer for layer in settings.layers if not _file(folder, layer).exists()]
    if not todo:
        return
    key = jax.random.key(settings.seed)
    _fisher(folder, model, fisher_tokens, settings, key, phases)
    with phases.phase("bases") as at:
        for layer, values in activations(model, tokens, settings.sites, folder, layers=todo):
            found: dict[str, np.ndarray] = {}
            fisher = load_arrays(_fisher_file(folder, layer))
            for site, x in values.items():
                at(f"layer {layer}, {site}")
                of_site = jax.random.fold_in(jax.random.fold_in(key, 1 + layer), settings.sites.index(site))
                measured = of_one_site(model, Point(layer, site), x, fisher[site], settings, of_site)
                for method, of in measured.items():
                    found |= {f"{site}.{method}.{name}": array for name, array in _arrays(of).items()}
            write_atomically(_file(folder, layer), safetensors.numpy.save(found))


def _fisher(folder: Path, model: Model, tokens, settings: Settings, key: PRNGKeyArray, phases: Phases) -> None:
    """The Fisher information at all sites, into a file for each layer."""
    if all(_fisher_file(folder, layer).exists() for layer in settings.layers):
        return
    points = [Point(layer, site) for layer in settings.layers for site in settings.sites]
    with phases.phase("Fisher information") as at:
        found = fisher_information(model, tokens, points, key=jax.random.fold_in(key, 0), progress=partial(_told, at))
    make_folder(folder / CHECKPOINTS)
    for layer in settings.layers:
        make_folder(_fisher_file(folder, layer).parent)
        arrays = {site: np.ascontiguousarray(found[Point(layer, site)]) for site in settings.sites}
        write_atomically(_fisher_file(folder, layer), safetensors.numpy.save(arrays))


def of_one_site(
    model: Model,
    point: Point,
    x: Float[np.ndarray, "n d"],
    fisher: Float[np.ndarray, "d d"],
    settings: Settings,
    key: PRNGKeyArray,
) -> dict[str, Measured]:
    """Every basis of a site, and what dropping coordinates costs in it."""
    d, rotate = x.shape[1], point.site in settings.rotate
    moment = np.zeros((d, d))
    if rotate:
        for part in np.split(x, range(2**14, len(x), 2**14)):
            moment += part.T @ part
        moment /= len(x)
    heads = (model.config.n_heads, model.config.n_kv_heads) if point.site == "heads" else None
    known = partial(baseline, moment=moment, reading=readers(model, *point), heads=heads, rotate=rotate)
    few = np.asarray(x[:: max(1, len(x) // THRESHOLDED)])
    found = {}
    for method in settings.methods:
        if method not in (FISHER, LEARNED):
            basis = known(method)
        elif not rotate:
            basis = weighed(Basis(None, None), fisher)
        elif heads is not None:  # heads that share values share a mean metric: what a coordinate costs differs
            basis = weighed(components(moment, damped(fisher), heads=heads), fisher)
        elif method == FISHER:
            basis = components(moment, damped(fisher))
        else:
            basis = learned(np.asarray(x), fisher, keep=settings.keep, key=key, steps=settings.steps)
        found[method] = measured(few, basis, absorb=settings.absorb, keep=settings.keep)
    return found


def measured(x: Float[np.ndarray, "n d"], basis: Basis, *, absorb: bool, keep: float) -> Measured:
    """The thresholds in a basis, and the mean of what is dropped at the share `keep`."""
    rotation, weight, _ = basis
    z = x if rotation is None else x @ rotation.T
    shift = None
    if absorb:
        magnitude = importance(z, weight)
        dropped = magnitude <= np.quantile(magnitude, 1 - keep)
        shift = (np.where(dropped, z, 0).sum(axis=0) / np.maximum(dropped.sum(axis=0), 1)).astype(np.float32)
        z = z - shift
    return Measured(basis, shift, thresholds(z, weight), x.shape[1])


def compare(
    folder: Path,
    model: Model,
    tokens: Int[np.ndarray, "sequences length"],
    test: Int[np.ndarray, "sequences length"],
    settings: Settings,
    phases: Phases,
) -> dict[str, Any]:
    """What each basis costs on the held-out text `test`, by each choice and at each share, in nats a token, with
    standard errors over sequences; and the share that each site keeps. Budgets are measured on some of `tokens`."""
    rows, trials = [], []
    points = [Point(layer, site) for layer in settings.layers for site in settings.sites]
    weights, few = {point: readers(model, *point).size for point in points}, tokens[:: max(1, tokens.size // BUDGETED)]
    for method in settings.methods:
        sites = sites_of(folder, settings.layers, method)
        with phases.phase(f"{method}: what each site costs") as at:
            of_sites = partial(_curves, model, few, sites, progress=partial(_told, at))
            saved = _once(_compared_file(folder, method), of_sites)
        curves = {point: saved[str(point)] for point in points}
        for choice in plans.CHOICES:
            for keep in settings.shares:
                kept = allotted(curves, weights, keep) if choice == plans.BUDGETS else dict.fromkeys(sites, keep)
                trials.append(plans.sparse_inputs(sites, kept, choice))
                shares = {str(point): share for point, share in kept.items()}
                rows.append({"method": method, "choice": choice, "keep": keep, "kept": shares})
    with phases.phase("what each basis costs") as at:
        whole = _measure(folder, "sequences", model, test, rows, trials, at)
    return {"whole": float(whole.mean()), "tokens": int(test.size), "rows": rows}


def _measure(folder: Path, name: str, model: Model, test, rows, trials: Sequence[Trial], at: Shown) -> np.ndarray:
    """Fill the rows with what their trials cost on the held-out text. Returns the whole model's cross-entropy."""
    parts = []
    for start in range(0, len(test), together()):
        sequences = test[start : start + together()]
        done = partial(_told, at, before=start / len(test), part=len(sequences) / len(test))
        of_sequences = partial(_costs, model, sequences, trials, progress=done)
        parts.append(_once(_compared_file(folder, f"{name}-{start}-{start + len(sequences)}"), of_sequences))
    whole, rises, divergences = (np.concatenate([part[name] for part in parts], axis=-1) for name in Costs._fields)
    for row, rise, divergence in zip(rows, rises, divergences, strict=True):
        for name, of in (("rise", rise), ("divergence", divergence)):
            row[name] = float(of.mean())
            row[f"{name}_error"] = float(of.std(ddof=1) / len(of) ** 0.5) if len(of) > 1 else None
    return whole


def _curves(model: Model, tokens, sites: Mapping[Point, Measured], **progress) -> dict[str, np.ndarray]:
    return {str(point): curve for point, curve in plans.measured_curves(model, tokens, sites, **progress).items()}


def _costs(model: Model, tokens, trials: Sequence[Trial], **progress) -> dict[str, np.ndarray]:
    return costs(model, tokens, trials, **progress)._asdict()


def _once(path: Path, make: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays in a file of the run; if it is not there yet, those that `make` gives, which are saved in it."""
    if not path.exists():
        make_folder(path.parent)
        write_atomically(path, safetensors.numpy.save({name: np.ascontiguousarray(a) for name, a in make().items()}))
    return load_arrays(path)


def _told(at: Shown, share: float, *, before: float = 0.0, part: float = 1.0) -> None:
    """Show the share that is done: of a part, and what was done before it."""
    at(f"{before + part * share:.0%}")


def written(
    folder: Path,
    model: Model,
    tokens: Int[np.ndarray, "sequences length"],
    test: Int[np.ndarray, "sequences length"],
    settings: Settings,
    results: Mapping[str, Any],
    phases: Phases,
) -> dict[str, Any]:
    """Write the sparse inputs of the run's result: the learned bases (of the methods compared, the best, if they are
    not among them) with thresholds, with budgets where these cost less, and with trained shifts, if they are asked for.
    Returns what it is, and all rows."""
    at = [row for row in results["rows"] if row["keep"] == settings.keep and row["choice"] != plans.LARGEST]
    of_method = [row for row in at if row["method"] == LEARNED] or at
    best = min(of_method, key=lambda row: row["divergence"])
    sites, rows = sites_of(folder, settings.layers, best["method"]), list(results["rows"])
    chosen = plans.sparse_inputs(sites, {point: best["kept"][str(point)] for point in sites}, best["choice"])
    if settings.train_shifts:
        chosen = _trained(folder, model, tokens, chosen, settings, phases)
        best = {name: best[name] for name in ("method", "keep", "kept")} | {"choice": plans.TRAINED}
        with phases.phase("what the trained shifts cost") as shown:
            _measure(folder, plans.TRAINED, model, test, [best], [chosen], shown)
        rows.append(best)
    write_sparse_inputs(folder / FILE, chosen, model)
    return {"rows": rows} | {name: best[name] for name in ("method", "choice", "keep", "kept")}


def _trained(folder: Path, model: Model, tokens, inputs: Trial, settings: Settings, phases: Phases) -> Trial:
    def shifts() -> dict[str, np.ndarray]:
        with phases.phase("shifts") as at:
            found = trained_shifts(
                model, tokens, inputs, steps=settings.train_shifts, key=jax.random.key(settings.seed),
                progress=partial(_told, at),
            )  # fmt: skip
        return {str(Point(*point)): np.asarray(of.shift) for point, of in found.items()}

    saved = _once(_compared_file(folder, "shifts"), shifts)
    return {point: replace_fields(of, shift=saved[str(Point(*point))]) for point, of in inputs.items()}


def sites_of(folder: Path, layers: Sequence[int], method: str) -> dict[Point, Measured]:
    """The measured basis of every site."""
    return {Point(layer, site): of for layer in layers for site, of in _read(folder, layer, method)}


def _file(folder: Path, layer: int) -> Path:
    return folder / CHECKPOINTS / f"step-{layer}" / "sites.safetensors"


def _compared_file(folder: Path, name: str) -> Path:
    return folder / CHECKPOINTS / "compared" / f"{name}.safetensors"


def _fisher_file(folder: Path, layer: int) -> Path:
    return folder / CHECKPOINTS / f"step-{layer}" / "fisher.safetensors"


def _arrays(of: Measured) -> dict[str, np.ndarray]:
    optional = {**of.basis._asdict(), "shift": of.shift}
    arrays = {"thresholds": of.thresholds, "width": np.array([of.width])}
    return {**{name: np.ascontiguousarray(a) for name, a in optional.items() if a is not None}, **arrays}


def _read(folder: Path, layer: int, method: str) -> list[tuple[str, Measured]]:
    """The sites of a layer in one of the bases."""
    sites: dict[str, dict[str, np.ndarray]] = {}
    for name, array in load_arrays(_file(folder, layer)).items():
        site, of, part = name.split(".")
        if of == method:
            sites.setdefault(site, {})[part] = array
    return [(site, _measured(arrays)) for site, arrays in sites.items()]


def _measured(arrays: Mapping[str, np.ndarray]) -> Measured:
    basis = Basis(*(arrays.get(name) for name in Basis._fields))
    return Measured(basis, arrays.get("shift"), arrays["thresholds"], int(arrays["width"][0]))
