"""The graph: its numbers are the library's, its modules those that were planted, its files read by others."""

import io
import itertools
import json
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import pytest

import rotsparse as rs
from layer_kinds import D_IN, LAYERS, correlated_inputs, random_weights
from rotsparse.evaluation.ablation import EdgeAblation, accuracy
from rotsparse.evaluation.numbering import influences
from rotsparse.explain.chain_graph import Needed, Share, chain_graph
from rotsparse.explain.effects import effects
from rotsparse.explain.graph import Graph, Place, Prompt, Stage, holding
from rotsparse.explain.graph_drawing import about
from rotsparse.explain.graph_modules import NULLS, Table, _rewired, modules
from rotsparse.explain.page import PAGE

HOSTILE = '</svg><script>alert(1)</script>"&\x1b\u202e'
UNITS = {"scale_inputs": True}


@pytest.fixture(params=list(LAYERS))
def case(request):
    rng = np.random.default_rng(0)
    layer, x = LAYERS[request.param](rng), correlated_inputs(rng, 80)
    return layer, x, rs.Rotations.haar(jax.random.key(0), layer.d_in, layer.d_out)


def test_every_number_is_that_of_the_effects(case):
    layer, x, r = case
    graph, found = chain_graph([layer], x, [r], cut=Share(0.8)), effects(layer, x, r, **UNITS)
    shares = np.sort(found.energy, axis=None)[::-1]
    assert len(graph.edges) == int(np.searchsorted(np.cumsum(shares), 0.8)) + 1
    for edge in graph.edges:
        assert edge.source.startswith("in-") and edge.target.startswith("out-")
        i, o = int(edge.source[3:]), int(edge.target[4:])
        assert (edge.share, edge.effect, edge.size) == (found.energy[o, i], found.mean[o, i], found.size[o, i])
    assert min(edge.share for edge in graph.edges) >= np.delete(shares, np.s_[: len(graph.edges)]).max(initial=0)
    share = influences(layer, x, {"in": r.r_in, "out": r.r_out}, UNITS)
    ends = {edge.source for edge in graph.edges} | {edge.target for edge in graph.edges}
    assert {node.name for node in graph.nodes} == ends
    for node in graph.nodes:
        assert node.influence == share["in" if node.place == 0 else "out"][node.number] and node.activation is None


def test_the_graph_of_an_example_is_its_jacobian(case):
    layer, x, r = case
    graph = chain_graph([layer], x, [r], cut=Share(1.0), example=7)
    j = np.asarray(r.r_out, np.float64) @ np.asarray(jax.jacfwd(layer)(x[7])) @ np.asarray(r.r_in, np.float64).T
    z_in, z_out = (np.asarray(z, np.float64) for z in (r.apply_in(x), r.apply_out(np.asarray(layer(x)))))
    square = np.square(j * z_in.std(axis=0))
    for edge in graph.edges:
        i, o = int(edge.source[3:]), int(edge.target[4:])
        assert edge.effect == pytest.approx(j[o, i] * z_in[:, i].std() / z_out[:, o].std(), rel=2e-3, abs=1e-5)
        assert edge.share == pytest.approx(square[o, i] / square.sum(), rel=2e-3, abs=1e-6)
    for node in graph.nodes:
        z = (z_in, z_out)[node.place][:, node.number]
        assert node.activation == pytest.approx((z[7] - z.mean()) / z.std(), abs=1e-4)
    with pytest.raises(ValueError, match="there are 80 examples"):
        chain_graph([layer], x, [r], example=80)


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_the_fewest_entries_that_hold_a_share(share):
    energy = np.array([[0.4, 0.0, 0.1], [0.3, 0.2, 0.0]])
    kept = holding(energy, share)
    assert energy[kept].sum() == pytest.approx({0.5: 0.7, 0.9: 0.9, 1.0: 1.0}[share])
    assert kept.sum() == {0.5: 2, 0.9: 3, 1.0: 4}[share]


@pytest.mark.parametrize("share", [0.0, 1.01, float("nan")])
def test_no_share(share):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        holding(np.eye(2), share)


def chain(rng, widths=(6, 5, 7)):
    """Two layers that follow each other, inputs of the first, and rotations of their own."""
    layers = [
        rs.MLP(random_weights(rng, 9, a), random_weights(rng, 9), random_weights(rng, b, 9), activation="tanh")
        for a, b in itertools.pairwise(widths)
    ]
    keys = jax.random.split(jax.random.key(0), len(layers))
    return (
        layers,
        correlated_inputs(rng, 60),
        [rs.Rotations.haar(k, of.d_in, of.d_out) for k, of in zip(keys, layers, strict=True)],
    )


def test_layers_that_follow_each_other_are_joined_by_the_change_of_basis(rng):
    layers, x, r = chain(rng)
    graph = chain_graph(layers, x, r, cut=Share(0.95))
    assert [place.key for place in graph.places] == ["layer-0/in", "layer-0/out", "layer-1/in", "layer-1/out"]
    y = np.asarray(layers[0](x), np.float64)
    z = y @ np.asarray(r[0].r_out, np.float64).T
    turned = np.asarray(r[1].r_in, np.float64) @ np.asarray(r[0].r_out, np.float64).T
    energy = np.square(turned * z.std(axis=0))
    between = graph.stages[1]
    np.testing.assert_allclose(between.energy, energy / energy.sum(), rtol=1e-3)
    ratio = z.std(axis=0) / (y @ np.asarray(r[1].r_in, np.float64).T).std(axis=0)[:, None]
    np.testing.assert_allclose(between.effect, turned * ratio, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(
        graph.stages[2].effect, effects(layers[1], y.astype(np.float32), r[1], **UNITS).mean, atol=1e-5
    )
    assert graph.summary.splitlines()[1].startswith("layer 0 outputs → layer 1 inputs: ")


def test_a_rotation_that_is_shared_is_one_place(rng):
    layers, x, r = chain(rng)
    r[1] = rs.Rotations(r[0].r_out, r[1].r_out)
    graph = chain_graph(layers, x, r)
    assert [place.title for place in graph.places] == ["layer 0 inputs", "layer 1 inputs", "layer 1 outputs"]
    assert len(graph.stages) == 2 and graph.places[1].influence.sum() == pytest.approx(1)


def test_what_does_not_fit_is_refused(rng):
    layers, x, r = chain(rng)
    with pytest.raises(ValueError, match="rotations for each layer"):
        chain_graph(layers, x, r[:1])
    with pytest.raises(ValueError, match="has 6 inputs, and what comes before it has 7"):
        chain_graph(layers[::-1], np.zeros((9, 5), np.float32) + x[:9, :5], r[::-1])
    with pytest.raises(ValueError, match="score of the network's outputs is not known"):
        chain_graph(layers, x, r, cut=Needed(0.1))
    with pytest.raises(ValueError, match="nothing to ablate"):
        chain_graph(layers, x, r, cut=Needed(0.1), example=0)


def test_the_edges_that_the_score_needs_are_those_of_the_ablation(rng):
    layers, x, r = chain(rng)
    labels = np.asarray(layers[1](layers[0](x))).argmax(axis=1)
    score = accuracy(lambda y: y, labels)
    graph = chain_graph(layers, x, r, cut=Needed(0.1, score), ranked_on=x[:50])
    ablation = EdgeAblation(layers[0], x[:50], r[0])
    count = ablation.fewest(x, lambda y: score(jnp.asarray(layers[1](y))), 0.1)
    np.testing.assert_array_equal(graph.stages[0].kept, ablation.mask(count))
    y = np.asarray(layers[0](jnp.asarray(x)))
    assert len({stage.cut for stage in graph.stages}) > 1 and "keep the score within 0.1" in graph.stages[1].cut
    behind = EdgeAblation(layers[1], y[:50], r[1])
    assert score(behind.outputs(y, graph.stages[2].kept)) >= 0.9 - 1e-6


# --- modules ----------------------------------------------------------------------------------------------------


def planted(rng, groups=4, size=5, *, noise=0.02):
    """Blocks of strong edges among weak ones, in a random order; the block of every node."""
    block = {side: rng.permutation(np.repeat(np.arange(groups), size)) for side in ("in", "out")}
    same = block["out"][:, None] == block["in"]
    energy = np.where(same, 1.0, noise) * rng.uniform(0.5, 1, same.shape)
    energy /= energy.sum()
    places = tuple(Place(side, f"{side}puts", energy.sum(axis=a)) for a, side in enumerate(("in", "out")))
    return Graph("planted", places, (Stage(energy, energy, energy, energy > 0, "all"),)), block


def test_modules_are_the_planted_blocks_and_no_null_reaches_them(rng):
    graph, block = planted(rng)
    found = graph.modules(draws=10)
    assert len(found.groups) == 4
    for side, blocks in block.items():
        of = [found.module[f"{side}-{i}"] for i in range(len(blocks))]
        assert len(set(zip(of, blocks, strict=True))) == 4
    assert all(
        (found.nulls[name] < found.modularity).all() and len(found.nulls[name]) == 10 for name in ("reweighted",)
    )
    q = nx.community.modularity(graph.networkx().to_undirected(), map(set, found.groups))
    assert found.modularity == pytest.approx(q)
    assert "4 modules" in str(found) and "reweighted: " in str(found) and "above all 10 draws" in str(found)
    again = graph.modules(draws=10)
    assert again.module == found.module and all((again.nulls[n] == found.nulls[n]).all() for n in NULLS)


def test_a_random_graph_is_not_beyond_chance(rng):
    """Modularity is positive for any graph: so is the null's."""
    graph, _ = planted(rng, noise=1.0)
    kept = rng.random((20, 20)) < 0.3
    stage = graph.stages[0]
    found = Graph("random", graph.places, (stage._replace(kept=kept),)).modules()
    assert found.modularity > 0.2
    for draws in found.nulls.values():
        assert abs(found.modularity - draws.mean()) < 4 * draws.std()


def test_rewiring_keeps_what_it_says(rng):
    sources, targets = np.nonzero(rng.random((12, 9)) < 0.4)
    stage = Table([f"s{i}" for i in sources], [f"t{i}" for i in targets], rng.random(len(sources)))
    drawn = _rewired(stage, rng)
    assert drawn.targets != stage.targets
    assert len(set(zip(drawn.sources, drawn.targets, strict=True))) == len(sources), "no edge is doubled"
    assert Counter(drawn.targets) == Counter(stage.targets) and drawn.sources == stage.sources
    np.testing.assert_array_equal(drawn.weights, stage.weights)


def test_degenerate_graphs_have_modules(rng):
    graph, _ = planted(rng)
    empty = Graph("empty", graph.places, (graph.stages[0]._replace(kept=np.zeros((20, 20), bool)),))
    assert empty.nodes == empty.edges == [] and empty.modules(draws=2).groups == []
    assert ElementTree.fromstring(empty.svg()) is not None and empty.node_link()["nodes"] == []
    found = modules(["a", "b"], [Table([], [], np.zeros(0))], draws=2)
    assert found.modularity == 0 and len(found.groups) == 2
    with pytest.raises(ValueError, match="two or more"):
        modules(["a"], [], draws=1)


# --- files ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hostile(rng):
    """A graph with hostile titles and words."""
    layer, x = LAYERS["mlp"](rng), correlated_inputs(rng, 50)
    graph = chain_graph([layer], x, [rs.Rotations.haar(jax.random.key(0), D_IN, 4)], example=3, title=HOSTILE)
    places = graph.places[0]._replace(title=HOSTILE), graph.places[1]._replace(labels=(HOSTILE,) * 4)
    return Graph(HOSTILE, places, graph.stages, Prompt((HOSTILE, " b"), (4, 7), 1))


def test_directions_lead_to_their_pages_where_these_are(rng, tmp_path):
    layer, x = LAYERS["mlp"](rng), correlated_inputs(rng, 50)
    graph = chain_graph([layer], x, [rs.Rotations.haar(jax.random.key(0), D_IN, 4)])
    graph.write(tmp_path)
    assert "href" not in (tmp_path / "graph.svg").read_text()
    (tmp_path / PAGE).touch()
    graph.write(tmp_path)
    assert f'href="{PAGE}#in-' in (tmp_path / "graph.svg").read_text()
    of_layers = replace(graph, places=tuple(p._replace(key=f"layer-4/{p.key}") for p in graph.places))
    (tmp_path / "layer-4").mkdir()
    (tmp_path / "layer-4" / PAGE).touch()
    of_layers.write(tmp_path)
    assert f'href="layer-4/{PAGE}#out-' in (tmp_path / "graph.svg").read_text()


def test_no_text_is_markup(hostile, tmp_path):
    written = hostile.write(tmp_path, hostile.modules(draws=2))
    assert [path.name for path in written] == ["graph.svg", "graph.graphml", "graph.json", "attribution.json"]
    text = (tmp_path / "graph.svg").read_text()
    assert "<script" not in text and text.count("</svg>") == 1 and "\x1b" not in text and "\u202e" not in text
    root = ElementTree.fromstring(text)
    assert {element.tag.rpartition("}")[2] for element in root.iter()} <= {
        "svg",
        "title",
        "style",
        "path",
        "text",
        "circle",
    }
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    linked = hostile.svg(links=['"><script>', "#out-"])
    assert "<script" not in linked and ElementTree.fromstring(linked) is not None
    assert nx.read_graphml(io.BytesIO(hostile.graphml())).number_of_nodes() == len(hostile.nodes)


def test_the_picture_has_every_node_and_edge_and_says_their_numbers(hostile):
    root = ElementTree.fromstring(hostile.svg(hostile.modules(draws=2)))
    said = Counter(e.text for e in root.iter() if e.tag.endswith("title"))
    assert all(said[about(edge)] == 1 for edge in hostile.edges)
    assert sum(e.tag.endswith("circle") for e in root.iter()) == len(hostile.nodes)
    drawn = hostile.drawing()
    place = {dot.name: (dot.x, dot.y) for dot in drawn.dots}
    assert len(set(place.values())) == len(place), "no node lies on another"
    for curve in drawn.curves:
        numbers = [float(n) for n in re.findall(r"[\d.]+", curve.path)]
        np.testing.assert_allclose(numbers[:2], place[curve.source], atol=0.1)
        np.testing.assert_allclose(numbers[-2:], place[curve.target], atol=0.1)
    widths = {(c.source, c.target): c.width for c in drawn.curves}
    shares = {(e.source, e.target): e.share for e in hostile.edges}
    assert sorted(widths, key=widths.get) == sorted(shares, key=shares.get)  # type: ignore[arg-type]
    assert [t for _, x in drawn.titles for t in [x]] == sorted(x for _, x in drawn.titles), "from left to right"


def test_a_planted_graph_is_drawn_with_few_crossings(rng):
    graph, _ = planted(rng, noise=0.0)
    drawn = graph.drawing(graph.modules(draws=2))
    y = {dot.name: dot.y for dot in drawn.dots}
    ends = [(y[c.source], y[c.target]) for c in drawn.curves]
    crossings = sum((a[0] - b[0]) * (a[1] - b[1]) < 0 for i, a in enumerate(ends) for b in ends[:i])
    within = 4 * 10 * 10  # of each block of 5 by 5 complete edges
    assert crossings == within


def test_networkx_reads_the_files_and_finds_the_numbers(case):
    layer, x, r = case
    graph = chain_graph([layer], x, [r])
    data = json.loads(json.dumps(graph.node_link()))
    for read in (nx.node_link_graph(data, edges="links"), nx.read_graphml(io.BytesIO(graph.graphml()))):
        assert set(read.nodes) == {node.name for node in graph.nodes} and read.is_directed()
        for node in graph.nodes:
            assert (
                read.nodes[node.name]["influence"] == node.influence and read.nodes[node.name]["number"] == node.number
            )
        for edge in graph.edges:
            assert read.edges[edge.source, edge.target] == {
                "weight": edge.share, "effect": edge.effect, "size": edge.size,
            }  # fmt: skip


def test_a_wide_graph_is_drawn_with_its_strongest_edges(rng):
    graph, _ = planted(rng, groups=1, size=20)
    drawn = graph.strongest(30)
    assert drawn.edges == graph.edges[:30] and "the strongest 30 are shown" in drawn.summary
    assert graph.strongest(400).summary == graph.summary


# What the schema of Neuronpedia's graphs requires (apps/webapp/app/api/graph/graph-schema.json, version 1.0.0), and the
# types of circuit-tracer's own reader (circuit_tracer/frontend/graph_models.py), which are narrower.
TEXT, WHOLE, NUMBER = (str,), (int,), (int, float)
METADATA = {"slug": TEXT, "scan": TEXT, "prompt_tokens": (list,), "prompt": TEXT, "transcoder_list": (list,)}
STATE = {"pinnedIds": (list,), "supernodes": (list,), "linkType": TEXT, "clickedId": TEXT, "sg_pos": TEXT}
NODE = {"node_id": TEXT, "feature": WHOLE, "layer": TEXT, "ctx_idx": WHOLE, "feature_type": TEXT, "jsNodeId": TEXT}
NODE |= {"clerp": TEXT, "influence": (*NUMBER, type(None)), "activation": (*NUMBER, type(None))}
LINK = {"source": TEXT, "target": TEXT, "weight": NUMBER}
KINDS = {"cross layer transcoder", "mlp reconstruction error", "embedding", "logit"}


def fits(content, fields):
    return all(name in content and isinstance(content[name], kinds) for name, kinds in fields.items())


def test_an_attribution_graph_is_what_circuit_tracer_and_neuronpedia_read(hostile):
    data = json.loads(json.dumps(hostile.attribution(), allow_nan=False))
    assert data.keys() == {"metadata", "qParams", "nodes", "links"}
    assert fits(data["metadata"], METADATA) and fits(data["qParams"], STATE)
    assert all(fits(node, NODE) and node["feature_type"] in KINDS for node in data["nodes"])
    assert all(fits(link, LINK) for link in data["links"])
    nodes = {node["node_id"]: node for node in data["nodes"]}
    assert len(nodes) == len(data["nodes"]) == len(hostile.nodes) + 2
    assert len({node["jsNodeId"] for node in data["nodes"]}) == len(nodes)
    features = [n["feature"] for n in data["nodes"] if n["feature_type"] == "cross layer transcoder"]
    assert len(set(features)) == len(features)
    assert all(link["source"] in nodes and link["target"] in nodes for link in data["links"])
    assert all(0 <= n["ctx_idx"] < len(data["metadata"]["prompt_tokens"]) for n in data["nodes"])
    weights = {(link["source"], link["target"]): link["weight"] for link in data["links"]}
    active = {node.name: node.activation for node in hostile.nodes}
    for edge in hostile.edges:
        ends = f"0_{edge.source[3:]}_1", f"1_{edge.target[4:]}_1"
        assert weights[ends] == pytest.approx(edge.effect * active[edge.source])
    words = [n for n in data["nodes"] if n["feature_type"] == "logit"]
    assert len(words) == len({e.target for e in hostile.edges}) and all(n["clerp"].startswith("Output ") for n in words)
    influence = sorted(n["influence"] for n in data["nodes"] if n["influence"] is not None)
    assert influence[-1] == pytest.approx(1) and influence[0] > 0
    with pytest.raises(ValueError, match="of one prompt"):
        Graph("no prompt", hostile.places, hostile.stages).attribution()
