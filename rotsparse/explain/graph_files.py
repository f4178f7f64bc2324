"""A graph in the formats of other programs: networkx, node-link JSON, GraphML, and the attribution graphs of
circuit-tracer."""

import io
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rotsparse._core.files import SIGNATURE
from rotsparse._core.printable import visible

if TYPE_CHECKING:
    import networkx


def directed(title: str, places: Sequence[str], nodes: Sequence, edges: Sequence) -> "networkx.DiGraph":
    """Nodes and edges of a `graph.Graph` as a networkx graph."""
    import networkx as nx  # here, because it takes a third of a second

    made = nx.DiGraph(name=visible(title), made_by=SIGNATURE)
    for node in nodes:
        facts = {"place": node.place, "title": visible(places[node.place]), "number": node.number}
        facts |= {"label": visible(node.label), "influence": node.influence}
        if node.activation is not None:
            facts["activation"] = node.activation
        made.add_node(node.name, **facts)
    for edge in edges:
        made.add_edge(edge.source, edge.target, weight=edge.share, effect=edge.effect, size=edge.size)
    return made


def node_link(graph: "networkx.DiGraph") -> dict[str, Any]:
    """The graph as JSON; `networkx.node_link_graph(data, edges="links")` reads it."""
    import networkx as nx

    return nx.node_link_data(graph, edges="links")


def graphml(graph: "networkx.DiGraph") -> bytes:
    """The graph as GraphML."""
    import networkx as nx

    buffer = io.BytesIO()
    nx.write_graphml(graph, buffer)
    return buffer.getvalue()


def as_json(content: Mapping[str, Any]) -> bytes:
    """The bytes of a JSON file."""
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def attribution(nodes: Sequence, edges: Sequence, prompt, places: int, *, title: str, slug: str) -> dict[str, Any]:
    """The graph of one token of a prompt as circuit-tracer's frontend and Neuronpedia's graph viewer read it.

    Place k is "layer" k, a direction a feature of it, at the token's position; the tokens of the prompt are embedding
    nodes without edges. Where the last place are words, they are the logit nodes, with their probability. The weight
    of an edge is the effect times the activation of its source: how far the source's distance from its mean moves the
    target, in standard deviations (of a word, in logits). `influence` is cumulative, as the viewer's slider takes it:
    the share that a node and all stronger ones hold.
    """
    spelled = [visible(word) for word in prompt.words]
    shares = np.array([node.influence for node in nodes])
    order = np.argsort(-shares, kind="stable")
    influence = np.empty(len(nodes))
    influence[order] = np.cumsum(shares[order]) / max(shares.sum(), 1e-300)
    names, found = {}, []
    for token, word, at in zip(prompt.tokens, spelled, range(len(spelled)), strict=True):
        found.append(_node(f"E_{token}_{at}", at, "E", at, "embedding", f"E_{token}-{at}", word, None, None))
    for node, cumulative in zip(nodes, influence.tolist(), strict=True):
        names[node.name] = f"{node.place}_{node.number}_{prompt.position}"
        word = node.place == places - 1 and node.label != str(node.number)
        label = f'Output "{visible(node.label)}" (p={node.activation or 0:.3f})' if word else node.name
        kind = "logit" if word else "cross layer transcoder"
        js = f"{'L' if word else node.place}_{node.number}-{prompt.position if word else 0}"
        # The viewer shows one card for every feature: its number has to be one of its own.
        feature = node.number if word else _paired(node.place, node.number)
        facts = label, cumulative, node.activation
        made = _node(names[node.name], feature, str(node.place), prompt.position, kind, js, *facts)
        found.append(made | ({"token_prob": node.activation or 0.0} if word else {}))
    activation = {node.name: node.activation or 0.0 for node in nodes}
    links = [
        {"source": names[e.source], "target": names[e.target], "weight": e.effect * activation[e.source]} for e in edges
    ]
    metadata = {"slug": slug, "scan": visible(title), "transcoder_list": [], "prompt_tokens": spelled}
    metadata |= {"prompt": "".join(spelled), "schema_version": 1, "info": {"generator": {"name": "rotsparse"}}}
    state = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    return {"metadata": metadata, "qParams": state, "nodes": found, "links": links}


def _node(node_id, feature, layer, ctx_idx, feature_type, js, clerp, influence, activation) -> dict[str, Any]:
    return {
        "node_id": node_id,
        "feature": feature,
        "layer": layer,
        "ctx_idx": ctx_idx,
        "feature_type": feature_type,
        "jsNodeId": js,
        "clerp": clerp,
        "influence": influence,
        "activation": activation,
    }


def _paired(x: int, y: int) -> int:
    """Cantor's pairing of two numbers into one."""
    return (x + y) * (x + y + 1) // 2 + y
