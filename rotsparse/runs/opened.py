"""A finished run of one layer, opened again: `load_run("runs/stories/layer-4")`."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from rotsparse._core.reading import reading
from rotsparse.data.scales import by_name
from rotsparse.data.sources import Source, in_memory
from rotsparse.data.store import NO_TOKEN, ActivationStore, open_store
from rotsparse.engine.solution import Solution
from rotsparse.evaluation.agreement import Agreement, agreements
from rotsparse.evaluation.numbering import numbered
from rotsparse.evaluation.units import units_of
from rotsparse.explain.directions import IN, OUT, Directions, Explanation
from rotsparse.explain.examples import texts, word
from rotsparse.explain.words import MANY, WordScores, affordable, aligned, promoted, steered
from rotsparse.layers.base import Layer
from rotsparse.layers.rotations import Rotations
from rotsparse.models.load import Tokenizer, load_model
from rotsparse.models.model import Model
from rotsparse.models.words import vocabulary
from rotsparse.runs import folders, inputs, loading


def load_run(path: str | os.PathLike) -> "LayerRun":
    """Open the run of one layer: the folder that `rotsparse fit` or `demo` wrote, or `layer-N` in that of `fit-model`.

    Raises `ValueError` if there is none, or if one of its files is damaged or has changed.
    """
    folder = Path(path)
    config = folders.read_object(folder / folders.CONFIG)
    if not (folder / folders.SOLUTION).exists():
        layers = sorted(found.name for found in folder.glob("layer-*"))
        advice = f"open one of its layers, such as {folder / layers[0]}" if layers else "there is no fit in it"
        raise ValueError(f"{folder} is no run of one layer: {advice}")
    with reading(folder):
        return LayerRun(folder, config)


@contextlib.contextmanager
def _noted(missing: list[str] | None) -> Iterator[None]:
    """Add the message of a `ValueError` or `OSError` to a list, and go on; raise it where there is no list."""
    try:
        yield
    except (ValueError, OSError) as error:
        if missing is None:
            raise
        missing.append(str(error))


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """What `loading.inputs` asks for, as a config names it."""

    layer: Path
    activations: Path
    test_activations: Path | None
    activation: str
    norm: str | None
    skip: bool
    seed: int


class LayerRun:
    """The run of one layer. Files are read when they are asked for.

    Directions are numbered by influence, as rows of `rotations` (see `evaluation.numbering`). Those of runs of earlier
    versions, whose files have them in the order of the fit, are renumbered here.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], *, model: Model | None = None):
        self.folder, self.config, self._loaded = folder, config, model

    def __repr__(self):
        return f"the run {self.folder}"

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """What the run measured: the content of `metrics.json`."""
        return folders.read_object(self.folder / folders.METRICS)

    @property
    def verdict(self) -> tuple[str, ...]:
        """What was found, in a sentence, and remarks."""
        return (str(self.metrics.get("finding", "")), *map(str, self.metrics.get("remarks", ())))

    @property
    def layer_number(self) -> int | None:
        """The number of the layer in its model; `None` for a layer of no model."""
        return self.config.get("layer_number")

    @property
    def site(self) -> str | None:
        """Where in the model the layer begins; `None` for a layer of no model."""
        return self.config.get("site") if self.layer_number is not None else None

    def point(self, side: str) -> tuple[int, str] | None:
        """The point of the model where a side's coordinates are. `None` for a layer of no model, and for the outputs of
        a layer with its skip connection: they are the stream behind it, which is no point of the network."""
        if self.layer_number is None or self.site is None or (side == OUT and self.config.get("skip")):
            return None
        return self.layer_number, self.site if side == IN else "output"

    @property
    def rotations(self) -> Rotations:
        """The rotations that were found."""
        return self.solution.rotations

    @property
    def layer(self) -> Layer:
        """The layer that was fitted."""
        return self.inputs[0]

    @cached_property
    def inputs(self) -> tuple[Layer, np.ndarray | Source, np.ndarray]:
        """The layer, the activations that it was fitted on, and the held-out ones. Raises `ValueError` if one of their
        files is gone or has changed."""
        config, source = self.config, self.folder / folders.CONFIG
        found = {n: inputs.located(self.folder, config, n) for n in ("layer", "activations", "test_activations")}
        layer, activations = found["layer"], found["activations"]
        if layer is None or activations is None:
            raise ValueError(f"{source} names no layer or no activations: nothing to draw")
        # A model's layer file already contains its skip matrix.
        skip = config["command"] == "fit" and config["skip"]
        kind = config.get("activation", "relu"), config.get("norm")
        return loading.inputs(_Inputs(layer, activations, found["test_activations"], *kind, skip, config["seed"]))

    @property
    def x_test(self) -> np.ndarray:
        """The held-out inputs on which directions are numbered and bases compared."""
        return np.asarray(loading.compared(self.layer, self.inputs[2]))

    @cached_property
    def units(self) -> dict[str, Any]:
        """The units of the fit, as `evaluation.units.scaled_rows` takes them."""
        sample = in_memory(self.inputs[1])[0]
        scales = self.config["input_scale"], self.config.get("output_scale", "none")  # earlier versions: inputs alone
        of_inputs, of_outputs = map(by_name, scales)
        return units_of(self.layer, sample, scale_inputs=of_inputs, scale_outputs=of_outputs)

    @cached_property
    def solution(self) -> Solution:
        """The fit."""
        solution = Solution.load(self.folder / folders.SOLUTION)
        about = Rotations.load(self.folder / folders.ROTATIONS)[1]
        if isinstance(about, Mapping) and about.get("numbered") == folders.NUMBERED:
            return solution
        return numbered(self.layer, self.x_test, solution, **self.units)

    @cached_property
    def agreement(self) -> dict[str, Agreement]:
        """How far the starts of the fit agree, for each side; `{}` after a single one."""
        return agreements(self.layer, self.x_test, self.solution, **self.units)

    @cached_property
    def model(self) -> Model:
        """The model of which this is a layer. Raises `ValueError` if the run is of none, or if it has changed."""
        path, known = self.config.get("model"), self.config.get(folders.INPUTS)
        fitted = known.get("model") if isinstance(known, Mapping) else None
        if not isinstance(path, str) or not isinstance(fitted, str):
            raise ValueError(f"{self.folder / folders.CONFIG} names no model: the run is of a layer alone")
        model = load_model(path) if self._loaded is None else self._loaded
        if model.fingerprint() != fitted:
            raise ValueError(f"{self.folder} was fitted to another model than {path} is now")
        return model

    @cached_property
    def store(self) -> ActivationStore:
        """The activations of the model that the run was fitted on. Raises `ValueError` if the run is of no model, or if
        they are gone or have changed."""
        folder, name = self.config.get("store"), f"store {self.layer_number}"
        if self.layer_number is None or not isinstance(folder, str):
            raise ValueError(f"{self.folder} names no store of activations")
        named = {name: os.path.join(folder, f"{self.layer_number}.{self.site}")}
        path = inputs.located(self.folder, {**self.config, **named}, name)
        assert path is not None
        return open_store(path)

    def whole_sequences(self) -> Int[np.ndarray, "sequences positions"]:
        """The tokens of the sequences of the store that are not cut short."""
        tokens = self.store.tokens()
        return tokens[(tokens != NO_TOKEN).all(axis=1)]

    @property
    def text(self) -> list[str]:
        """The sequences of the text that the run was fitted on, as their tokens join. Raises `ValueError` where the
        store does not hold it."""
        tokens, words = self.store.tokens(), self.store.vocabulary()
        return ["".join(word(words, int(token)) for token in of if token != NO_TOKEN) for of in tokens]

    @cached_property
    def explanation(self) -> Explanation:
        """The directions and what they mean. Of a model's layer it needs the model and the store; without them, see
        `explained`."""
        return self.explained()

    def directions(self, side: str) -> Directions:
        """The directions of the inputs ("in") or outputs ("out"), the most influential first."""
        return self.explanation.directions(side)

    def explained(
        self, *, tokenizer: Tokenizer | None = None, missing: list[str] | None = None, **options: Any
    ) -> Explanation:
        """The directions, with the words of `tokenizer` if the store has no vocabulary. With `missing`, what cannot be
        told because a file is gone, has changed or lacks something is left out, and the reasons are added to the list.
        `options` are further ones of `Explanation`.

        Raises `ValueError` for a run of a model whose model or store is not there, unless there is `missing`.
        """
        words: list[str] | None = None
        if self.layer_number is not None:
            if tokenizer is not None:
                words = vocabulary(tokenizer, self.model)
            with _noted(missing):
                if words is None:
                    words = self.store.vocabulary()
                options["examples"] = texts(self.store, words)
            scores: dict[str, WordScores | None] = {}
            with _noted(missing):
                scores |= self._words(words)
            with _noted(missing if scores else []):  # without the model, that has been said
                scores |= self._words_through(words)
            options["words"] = {side: of for side, of in scores.items() if of is not None}
        return Explanation(
            self.layer, self.x_test, self.rotations, units=self.units, cosines=self._cosines(), **options
        )

    def _words(self, words: list[str] | None) -> dict[str, WordScores | None]:
        number, site = self.layer_number, self.site
        assert number is not None and site is not None
        return {
            OUT: promoted(self.model, number, self.rotations.r_out, words),
            IN: aligned(self.model, number, site, self.rotations.r_in, words),
        }

    def _words_through(self, words: list[str] | None) -> dict[str, WordScores | None]:
        number, config = self.layer_number, self.model.config
        assert number is not None
        whole = self.whole_sequences() if config.head and config.causal else ()
        if not len(whole):
            return {}
        scores = {}
        for side, r in ((IN, self.rotations.r_in), (OUT, self.rotations.r_out)):
            point = self.point(side)
            if side == IN and affordable(self.model, number) < MANY:
                continue  # a wide model: its outputs alone take half a minute
            if point is not None:
                scores[f"{side} through"] = steered(self.model, point, r, np.asarray(whole), words)
        return scores

    def _cosines(self) -> dict[str, list[float | None]]:
        """Of every direction the lowest |cos| with its match in another restart."""
        solution = self.solution
        if len(solution.candidates) == 1:
            return {}
        found = {}
        for space, cosines in solution.agreement().items():
            lowest = zip(cosines.min(axis=0), solution.free[space], strict=True)
            found[space] = [float(c) if free else None for c, free in lowest]
        return {IN: found["in"], OUT: found.get("out", found["in"])}
