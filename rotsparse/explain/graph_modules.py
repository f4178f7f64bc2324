"""Modules of a graph: groups of nodes with more weight between them than with the rest, and whether that is more than
chance.

The groups are those that Louvain's method finds (Blondel et al., "Fast unfolding of communities in large networks",
2008, in networkx) for the modularity `Q = Σ_c (w_c / w - (s_c / 2w)²)` (Newman 2004): w the weight of all edges, w_c
that within group c, s_c that at its nodes. Weights are shares of the mean squared Jacobian, so all stages weigh the
same. The method maximises Q, and finds a positive one in any graph; so each null is searched in the same way:

- `rewired`: pairs of edges of a stage exchange their targets. Every node keeps its number of edges, every source its
  weight.
- `reweighted`: the edges stay, and their weights are permuted within a stage.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

NULLS = ("rewired", "reweighted")

# Exchanges that are tried for every edge.
_EXCHANGES = 10


class Table(NamedTuple):
    """The edges of a stage: the names of sources and targets, and the weights."""

    sources: list[str]
    targets: list[str]
    weights: Float[np.ndarray, "edges"]

    @staticmethod
    def of(edges: Iterable, order: Mapping[str, int]) -> "Table":
        """The table of some `graph.Edge`."""
        edges = list(edges)
        return Table([e.source for e in edges], [e.target for e in edges], np.array([e.share for e in edges]))


class Modules(NamedTuple):
    """`module`: the number of every node's group, 0 the one with most weight inside. `modularity`: Q. `nulls`: Q of the
    draws of each null."""

    module: dict[str, int]
    modularity: float
    nulls: dict[str, Float[np.ndarray, "draws"]]

    @property
    def groups(self) -> list[list[str]]:
        """The nodes of every module, in the order of the graph."""
        found: list[list[str]] = [[] for _ in range(1 + max(self.module.values(), default=-1))]
        for name, number in self.module.items():
            found[number].append(name)
        return found

    def __str__(self) -> str:
        count = len(self.groups)
        parts = [f"{count} module{'' if count == 1 else 's'}, modularity {self.modularity:.3f}"]
        for name, draws in self.nulls.items():
            above = int(np.sum(draws >= self.modularity))
            where = "above all" if not above else f"at or below {above} of"
            parts.append(f"{name}: {draws.mean():.3f} ± {draws.std(ddof=1):.3f} ({where} {len(draws)} draws)")
        return "; ".join(parts)


def modules(nodes: Sequence[str], stages: Sequence[Table], *, seed: int = 0, draws: int = 20) -> Modules:
    """The modules of a graph, and the modularity of `draws` draws of each null. The same seed gives the same modules.
    Raises `ValueError` for fewer than two draws."""
    if draws < 2:
        raise ValueError(f"draws of a null should be two or more, got {draws}")
    rng = np.random.default_rng(seed)
    groups, modularity = _found(nodes, stages, seed)
    nulls = {}
    for name in NULLS:
        drawn = [[_rewired(s, rng) if name == "rewired" else _reweighted(s, rng) for s in stages] for _ in range(draws)]
        nulls[name] = np.array([_found(nodes, null, seed)[1] for null in drawn])
    of = {name: number for number, group in enumerate(groups) for name in group}
    return Modules({name: of[name] for name in nodes}, modularity, nulls)


def _found(nodes: Sequence[str], stages: Sequence[Table], seed: int) -> tuple[list[set[str]], float]:
    """Groups, the one with most weight inside first, and their modularity."""
    import networkx as nx  # here, because it takes a third of a second

    graph = nx.Graph()
    graph.add_nodes_from(nodes)
    for stage in stages:
        graph.add_weighted_edges_from(zip(stage.sources, stage.targets, stage.weights.tolist(), strict=True))
    if not graph.size(weight="weight") > 0:
        return [{name} for name in nodes], 0.0
    groups = list(nx.community.louvain_communities(graph, weight="weight", seed=seed))
    inside = [graph.subgraph(group).size(weight="weight") for group in groups]
    place = {name: i for i, name in enumerate(nodes)}
    order = sorted(range(len(groups)), key=lambda g: (-inside[g], min(place[name] for name in groups[g])))
    return [groups[g] for g in order], float(nx.community.modularity(graph, groups, weight="weight"))


def _rewired(stage: Table, rng: np.random.Generator) -> Table:
    """Exchange the targets of random pairs of edges, wherever no edge is doubled."""
    targets, there = list(stage.targets), set(zip(stage.sources, stage.targets, strict=True))
    pairs: Int[np.ndarray, "tries 2"] = rng.integers(0, max(len(targets), 1), (_EXCHANGES * len(targets), 2))
    for a, b in pairs.tolist():
        old = (stage.sources[a], targets[a]), (stage.sources[b], targets[b])
        new = (stage.sources[a], targets[b]), (stage.sources[b], targets[a])
        if new[0] in there or new[1] in there:
            continue
        there -= set(old)
        there |= set(new)
        targets[a], targets[b] = targets[b], targets[a]
    return stage._replace(targets=targets)


def _reweighted(stage: Table, rng: np.random.Generator) -> Table:
    return stage._replace(weights=rng.permutation(stage.weights))
