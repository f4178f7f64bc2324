"""The graph of a network in rotated coordinates. Nodes are directions at consecutive places (the inputs and outputs of
layers), edges the entries of the mean squared scaled Jacobian between two places that were kept.

A direction has the number that it has everywhere, and a node's name is its place and number: `in-3`, or
`layer-4/out-17` where there are several layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from rotsparse._core.files import adopt, write_atomically
from rotsparse.explain import graph_files
from rotsparse.explain.directions import IN, OUT, Explanation
from rotsparse.explain.graph_drawing import Drawing, drawing, svg
from rotsparse.explain.graph_modules import Modules, Table, modules
from rotsparse.explain.page import GRAPH, PAGE

# A graph with more edges between two places is drawn with the strongest of them.
DRAWN = 300


class Place(NamedTuple):
    """Where directions are. `key`: as in the names of nodes; `title`: for people. `influence`: the share of each
    direction in its layer's mean squared Jacobian. `activation`: of a single example, the coordinate of each direction
    in standard deviations from the mean. `labels`: what nodes are called instead of their numbers."""

    key: str
    title: str
    influence: Float[np.ndarray, "d"]
    activation: Float[np.ndarray, "d"] | None = None
    labels: tuple[str, ...] | None = None


class Stage(NamedTuple):
    """What the directions of a place do to those of the next. `effect`, `size`, `energy`: as in `effects.Effects`, over
    all examples or for the one of the graph. `kept`: the edges of the graph; `cut`: how they were chosen."""

    effect: Float[np.ndarray, "d_to d_from"]
    size: Float[np.ndarray, "d_to d_from"]
    energy: Float[np.ndarray, "d_to d_from"]
    kept: Bool[np.ndarray, "d_to d_from"]
    cut: str


class Node(NamedTuple):
    """A direction that has an edge. `place`: the number of its place."""

    name: str
    place: int
    number: int
    label: str
    influence: float
    activation: float | None


class Edge(NamedTuple):
    """`share`: of the mean squared scaled Jacobian between the places. `effect`: how many standard deviations the
    target moves, on average, for one of the source; `size`: the root mean square of that."""

    source: str
    target: str
    share: float
    effect: float
    size: float


@dataclass(frozen=True)
class Prompt:
    """The text of which a graph shows one token."""

    words: tuple[str, ...]
    tokens: tuple[int, ...]
    position: int


@dataclass(frozen=True)
class Graph:
    """Stage k leads from place k to place k + 1. `prompt`: of the graph of a single token."""

    title: str
    places: tuple[Place, ...]
    stages: tuple[Stage, ...]
    prompt: Prompt | None = None

    def __repr__(self):
        return f"the graph of {self.title}: {len(self.nodes)} directions, {len(self.edges)} edges"

    @cached_property
    def edges(self) -> list[Edge]:
        """Stage by stage, the strongest first."""
        found = []
        for k, stage in enumerate(self.stages):
            to, of = np.nonzero(stage.kept)
            order = np.argsort(-stage.energy[to, of], kind="stable")
            found += [
                Edge(
                    self.name(k, int(j)),
                    self.name(k + 1, int(i)),
                    *(float(a[i, j]) for a in (stage.energy, stage.effect, stage.size)),
                )
                for i, j in zip(to[order], of[order], strict=True)
            ]
        return found

    @cached_property
    def nodes(self) -> list[Node]:
        """Place by place, by number: the directions that have an edge."""
        found = []
        for k, place in enumerate(self.places):
            used = np.zeros(len(place.influence), bool)
            if k > 0:
                used |= self.stages[k - 1].kept.any(axis=1)
            if k < len(self.stages):
                used |= self.stages[k].kept.any(axis=0)
            for i in np.flatnonzero(used).tolist():
                label = str(i) if place.labels is None else place.labels[i]
                activation = None if place.activation is None else float(place.activation[i])
                found.append(Node(self.name(k, i), k, i, label, float(place.influence[i]), activation))
        return found

    def name(self, place: int, number: int) -> str:
        """The name of a node."""
        return f"{self.places[place].key}-{number}"

    @property
    def summary(self) -> str:
        """The cut of every stage, a line each."""
        pairs = zip(self.places, self.places[1:], self.stages, strict=False)
        return "\n".join(f"{a.title} → {b.title}: {stage.cut}" for a, b, stage in pairs)

    def strongest(self, count: int = DRAWN) -> "Graph":
        """The graph with at most so many edges between two places."""
        stages = []
        for stage in self.stages:
            if (n := int(stage.kept.sum())) > count:
                kept = largest(np.where(stage.kept, stage.energy, -1), count)
                share = stage.energy[kept].sum()
                said = f"{stage.cut}; of these {n:,} edges the strongest {count} are shown ({share:.0%} of the energy)"
                stage = stage._replace(kept=kept, cut=said)
            stages.append(stage)
        return replace(self, stages=tuple(stages))

    def networkx(self) -> Any:
        """A `networkx.DiGraph`. Nodes have place, title, number, label, influence (and activation), edges weight (the
        share), effect and size."""
        return graph_files.directed(self.title, [place.title for place in self.places], self.nodes, self.edges)

    def modules(self, *, seed: int = 0, draws: int = 20) -> Modules:
        """Groups of directions that have more to do with each other than with the rest, against two nulls
        (`graph_modules`)."""
        order = {node.name: node.place for node in self.nodes}
        tables = [Table.of([e for e in self.edges if order[e.source] == k], order) for k in range(len(self.stages))]
        return modules([node.name for node in self.nodes], tables, seed=seed, draws=draws)

    def drawing(self, of: Modules | None = None) -> Drawing:
        """Where nodes and edges are drawn: places from left to right, the nodes of a module together."""
        titles = [place.title for place in self.places]
        return drawing(titles, self.nodes, self.edges, {} if of is None else of.module)

    def svg(self, of: Modules | None = None, *, links: Sequence[str] | None = None, inline: bool = False) -> str:
        """The graph as a picture, with transparent background, for light and dark pages: a file, or, `inline`, an
        element of a page. `links`: for each place the address that a node's number is added to."""
        return svg(self.drawing(of), self.title, links=links, inline=inline)

    @property
    def links(self) -> list[str]:
        """For each place the address of its directions on the pages of `rotsparse explain`, in the folder of a run: a
        direction's number is added to it."""
        keys = (place.key.rpartition("/") for place in self.places)
        return [f"{layer}{slash}{PAGE}#{side}-" for layer, slash, side in keys]

    def node_link(self) -> dict[str, Any]:
        """The graph as `networkx.node_link_data` gives it, for JSON."""
        return graph_files.node_link(self.networkx())

    def graphml(self) -> bytes:
        """The graph as GraphML, which Gephi, yEd and Cytoscape read."""
        return graph_files.graphml(self.networkx())

    def attribution(self, slug: str = "rotsparse") -> dict[str, Any]:
        """The graph of a prompt in the JSON format of circuit-tracer and of Neuronpedia's graph viewer
        (`graph_files.attribution`). Raises `ValueError` for a graph that is not of a prompt."""
        if self.prompt is None:
            raise ValueError("an attribution graph is of one prompt: give one to rs.graph")
        return graph_files.attribution(
            self.nodes, self.edges, self.prompt, len(self.places), title=self.title, slug=slug
        )

    def write(self, folder: Path, of: Modules | None = None) -> list[Path]:
        """Write `graph.svg` (the strongest edges), `graph.graphml`, `graph.json`, and of a prompt `attribution.json`.
        In the picture directions lead to the pages of `rotsparse explain` in the folder, where these are. Each file is
        written atomically."""
        drawn, links = self.strongest(), self.links
        explained = all((Path(folder) / link.partition("#")[0]).exists() for link in links)
        files = {GRAPH: drawn.svg(of, links=links if explained else None).encode(), "graph.graphml": self.graphml()}
        files["graph.json"] = graph_files.as_json(self.node_link())
        if self.prompt is not None:
            files["attribution.json"] = graph_files.as_json(self.attribution())
        adopt(folder)
        for name, content in files.items():
            write_atomically(Path(folder) / name, content)
        return [Path(folder) / name for name in files]


def layer_graph(of: Explanation, *, share: float, title: str) -> Graph:
    """The graph of the directions of one layer: the fewest edges that hold a share of the energy."""
    found = of.effects
    sides = (IN, "inputs", found.energy.sum(axis=0)), (OUT, "outputs", found.energy.sum(axis=1))
    stage = shared_stage(found.mean, found.size, found.energy, share)
    return Graph(title, tuple(Place(*side) for side in sides), (stage,))


def shared_stage(effect: np.ndarray, size: np.ndarray, energy: np.ndarray, share: float) -> Stage:
    """A stage with the fewest edges that hold a share of the energy."""
    kept = holding(energy, share)
    return Stage(
        effect, size, energy, kept, f"{kept.sum():,} of {kept.size:,} edges hold {100 * share:.4g}% of the energy"
    )


def largest(energy: Float[np.ndarray, "d_to d_from"], count: int) -> Bool[np.ndarray, "d_to d_from"]:
    """Where the `count` largest entries are; the first of equal ones."""
    kept = np.zeros(energy.size, bool)
    kept[np.argsort(-energy, axis=None, kind="stable")[:count]] = True
    return kept.reshape(energy.shape)


def holding(energy: Float[np.ndarray, "d_to d_from"], share: float) -> Bool[np.ndarray, "d_to d_from"]:
    """Where the fewest entries are that hold a share of the sum. Raises `ValueError` for no share from 0 to 1."""
    if not 0 < share <= 1:
        raise ValueError(f"the share of the energy that edges hold should be above 0 and at most 1, got {share}")
    ordered = np.sort(energy, axis=None)[::-1]
    reached = np.cumsum(ordered)
    # The sum of all is reached by those that are not zero, however it is rounded.
    count = min(int(np.searchsorted(reached, share * reached[-1])) + 1, int(np.count_nonzero(ordered)))
    return largest(energy, count)
