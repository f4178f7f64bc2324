"""The graph of runs of a model's layers: its edges are derivatives of the model, its cut what the text needs."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_opened import QUICK, commands

import rotsparse as rs
from rotsparse import models
from rotsparse.data.sources import in_memory
from rotsparse.evaluation.ablation import EdgeAblation
from rotsparse.explain.chain_graph import chain_graph
from rotsparse.explain.effects import effects
from rotsparse.layers.files import save_layer
from rotsparse.models import run, save_model
from rotsparse.runs.effects import held_out
from tiny_models import tiny_llama2c


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of a layer, and one of a model's two layers."""
    folder = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(0)
    with commands(folder) as command:
        w_in, w_out = (rng.standard_normal(s).astype(np.float32) for s in ((10, 6), (6, 10)))
        save_layer(folder / "layer.safetensors", rs.MLP(w_in, None, w_out))
        np.save("x.npy", rng.laplace(size=(200, 6)).astype(np.float32))
        command("fit", "--layer", "layer.safetensors", "--activations", "x.npy", *QUICK, "--out", "fit")
        model = tiny_llama2c()
        save_model(model, folder / "model.bin")
        # The model's own text, which it predicts better with its layers than without.
        np.save("tokens.npy", models.generate(model, rng.integers(0, 31, (100, 1)), 16, key=jax.random.key(0)))
        command("capture", "--model", "model.bin", "--tokens", "tokens.npy", "--out", "store", "--length", 16)
        command("fit-model", "--model", "model.bin", "--store", "store", *QUICK, "--out", "model")
    return folder


@pytest.fixture(scope="module")
def layers(made):
    return [rs.load_run(made / f"model/layer-{i}") for i in (0, 1)]


def test_the_graph_of_one_run_is_that_of_its_directions(made):
    opened = rs.load_run(made / "fit")
    graph = rs.graph(opened, cut=rs.Share(1.0))
    for direction in opened.directions("out"):
        for partner in direction.partners(6):
            (edge,) = [
                e for e in graph.edges if e.source == f"in-{partner.number}" and e.target == f"out-{direction.number}"
            ]
            assert edge.effect == partner.effect and edge.size == partner.size
            assert edge.share == pytest.approx(partner.share * direction.influence)
    influence = {node.name: node.influence for node in graph.nodes}
    for side in ("in", "out"):
        for direction in opened.directions(side):
            assert influence[f"{side}-{direction.number}"] == pytest.approx(direction.influence, rel=1e-6)
    example = rs.graph(opened, example=3)
    z = opened.x_test @ np.asarray(opened.rotations.r_in).T
    for node in (of for of in example.nodes if of.place == 0):
        mine = z[:, node.number]
        assert node.activation == pytest.approx((mine[3] - mine.mean()) / mine.std(), abs=1e-3)


def test_runs_of_no_model_follow_each_other_directly(made):
    opened = rs.load_run(made / "fit")
    graph, expected = rs.graph([opened, opened]), chain_graph(
        [opened.layer] * 2, opened.x_test, [opened.rotations] * 2, units=[opened.units] * 2
    )  # fmt: skip
    assert graph.edges == expected.edges and len(graph.places) == 4


def between_by_differences(layers, tokens, positions, step=1e-2):
    """`d input of layer 1 / d output of layer 0` at one position of every sequence, in rotated coordinates."""
    model, r_from, r_to = layers[0].model, layers[0].rotations.r_out, layers[1].rotations.r_in
    rows = np.arange(len(tokens))

    def value(direction, by):
        here = np.zeros((*tokens.shape, 16), np.float32)
        here[rows, positions] = by * direction
        change = {(0, "output"): lambda x: x + here}
        seen = run(model.params, model.config, tokens, capture=((1, "input"),), intervene=change)[1][1, "input"]
        return np.asarray(seen, np.float64)[rows, positions]

    slopes = [(value(r, step) - value(r, -step)) / (2 * step) for r in np.asarray(r_from)]
    return np.einsum("fsd,td->stf", np.stack(slopes), np.asarray(r_to, np.float64))


def spreads(run, side):
    x = run.x_test
    z = (
        x @ np.asarray(run.rotations.r_in).T
        if side == "in"
        else np.asarray(run.layer(x)) @ np.asarray(run.rotations.r_out).T
    )
    return z.astype(np.float64).std(axis=0)


def test_layers_of_a_model_are_joined_by_the_network_between_them(layers):
    graph = rs.graph(layers)
    assert [place.key for place in graph.places] == ["layer-0/in", "layer-0/out", "layer-1/in", "layer-1/out"]
    for k, opened in enumerate(layers):
        found = effects(opened.layer, opened.x_test, opened.rotations, **opened.units)
        np.testing.assert_array_equal(graph.stages[2 * k].effect, found.mean)
    tokens = held_out(layers[0], 64 * 16)
    positions = np.linspace(0, 15, len(tokens)).round().astype(int)
    z = between_by_differences(layers, tokens, positions)
    sd_from, sd_to = spreads(layers[0], "out"), spreads(layers[1], "in")
    stage = graph.stages[1]
    np.testing.assert_allclose(stage.effect, z.mean(axis=0) * sd_from / sd_to[:, None], rtol=0.02, atol=2e-3)
    energy = np.square(z).mean(axis=0) * sd_from**2
    np.testing.assert_allclose(stage.energy, energy / energy.sum(), rtol=0.05, atol=1e-5)


def test_between_layers_with_scaled_outputs_energy_has_no_unit(made, monkeypatch):
    plain = rs.graph([rs.load_run(made / f"model/layer-{i}") for i in (0, 1)]).stages[1]
    layers = [rs.load_run(made / f"model/layer-{i}") for i in (0, 1)]
    for opened in layers:
        monkeypatch.setitem(opened.config, "output_scale", "std")
    stage = rs.graph(layers).stages[1]
    np.testing.assert_array_equal(stage.effect, plain.effect)
    energy = plain.energy / spreads(layers[1], "in")[:, None] ** 2
    np.testing.assert_allclose(stage.energy, energy / energy.sum(), rtol=1e-4)


def test_the_graph_of_a_prompt_is_that_of_the_model_at_one_token(layers):
    tokens = np.array([3, 14, 15, 9, 26, 5])
    graph = rs.graph(layers, prompt=tokens, position=3, cut=rs.Share(1.0))
    assert graph.prompt is not None and graph.prompt.position == 3 and graph.prompt.tokens == tuple(tokens)
    model = layers[0].model
    points = ((0, "input"), (0, "output"), (1, "input"), (1, "output"))
    logits, seen = run(model.params, model.config, tokens[None], capture=points)
    for place, point in zip(graph.places, points, strict=False):
        opened, side = layers[point[0]], "in" if point[1] == "input" else "out"
        r = np.asarray(opened.rotations.r_in if side == "in" else opened.rotations.r_out)
        x = opened.x_test if side == "in" else np.asarray(opened.layer(opened.x_test))
        at = (np.asarray(seen[point])[0, 3] - x.mean(axis=0)) @ r.T / spreads(opened, side)
        np.testing.assert_allclose(np.asarray(place.activation), at, atol=1e-3)
    z = between_by_differences(layers, tokens[None], np.array([3]))[0]
    ratio = spreads(layers[0], "out") / spreads(layers[1], "in")[:, None]
    np.testing.assert_allclose(graph.stages[1].effect, z * ratio, rtol=0.02, atol=2e-3)
    j = np.asarray(jax.jacfwd(layers[1].layer)(jnp.asarray(seen[1, "input"])[0, 3]))
    r = layers[1].rotations
    turned = np.asarray(r.r_out) @ j @ np.asarray(r.r_in).T
    np.testing.assert_allclose(
        graph.stages[2].effect,
        turned * spreads(layers[1], "in") / spreads(layers[1], "out")[:, None],
        rtol=2e-3,
        atol=1e-4,
    )
    words = graph.places[-1]
    p = np.asarray(jax.nn.softmax(logits[0, 3]))
    likely = np.argsort(-p, kind="stable")[:5]
    np.testing.assert_allclose(words.influence, p[likely], rtol=1e-5)
    assert words.labels == tuple(f"⟨{token}⟩" for token in likely)

    def moved(by):
        push = {(1, "output"): lambda x: x.at[0, 3].add(by * np.asarray(r.r_out)[2])}
        of = np.asarray(run(model.params, model.config, tokens[None], intervene=push)[0], np.float64)[0, 3]
        return (of - of.mean())[likely]

    slope = (moved(0.02) - moved(-0.02)) / 0.04 * spreads(layers[1], "out")[2]
    np.testing.assert_allclose(graph.stages[3].effect[:, 2], slope, rtol=0.02, atol=2e-3)
    assert all(node["clerp"] for node in graph.attribution()["nodes"])


def test_a_cut_by_ablation_keeps_the_cross_entropy(layers):
    opened = layers[1]
    found = rs.graph(opened, cut=rs.Needed(0.01))
    kept = found.stages[0].kept
    assert 0 < kept.sum() < kept.size and "keep the score within 0.01" in found.summary
    text = held_out(opened, 1024)
    model = opened.model
    ablation = EdgeAblation(opened.layer, in_memory(opened.inputs[1])[0], opened.rotations)
    x = run(model.params, model.config, text, capture=((1, "input"),))[1][1, "input"]
    y = ablation.outputs(np.asarray(x).reshape(-1, 16), kept).reshape(*text.shape, -1)
    losses = []
    for change in ({}, {(1, "output"): lambda _: y}):
        logits = run(model.params, model.config, text, intervene=change)[0]
        losses.append(float(models.cross_entropy(logits, text).mean()))
    assert losses[1] - losses[0] <= 0.01 + 1e-5
    both = rs.graph(layers, cut=rs.Needed(0.01, share=0.5))
    assert "hold 50% of the energy" in both.stages[1].cut and "keep the score" in both.stages[0].cut


def test_what_cannot_be_made_is_said(layers, made):
    alone = rs.load_run(made / "fit")
    for arguments, said in [
        (([],), "needs a run"),
        ((layers[::-1],), "the first layer first: got layers"),
        (([layers[0], alone],), "widths|outputs|inputs"),
    ]:
        with pytest.raises(ValueError, match=said):
            rs.graph(*arguments)
    with pytest.raises(ValueError, match="of a model: of other layers name an example"):
        rs.graph(alone, prompt=[1, 2])
    with pytest.raises(ValueError, match="give the tokens of a prompt"):
        rs.graph(layers, example=1)
    with pytest.raises(ValueError, match=r"tokens from 1 to 99, the model's are 0 to 30"):
        rs.graph(layers, prompt=[1, 99])
    with pytest.raises(ValueError, match="2 tokens, 0 to 1: got position 2"):
        rs.graph(layers, prompt=[1, 2], position=2)
    with pytest.raises(ValueError, match="leave out the score"):
        rs.graph(layers, cut=rs.Needed(0.1, lambda y: 0.0))


def test_the_command_writes_the_graph(made, rotsparse, monkeypatch):
    code, said = rotsparse("graph", made / "model", "--share", 0.5, "--draws", 2)
    assert code == 0 and "layer 0 outputs → layer 1 inputs: " in said and "modularity" in said
    data = json.loads((made / "model/graph.json").read_text())
    graph = rs.graph([rs.load_run(made / f"model/layer-{i}") for i in (0, 1)], cut=rs.Share(0.5))
    assert len(data["links"]) == len(graph.edges)
    assert (made / "model/graph.svg").exists() and (made / "model/graph.graphml").exists()
    code, said = rotsparse("graph", made / "model", "--layers", "1", "--out", "out", "--example", 3, "--draws", 2)
    assert code == 0 and "inputs → outputs" in said
    assert all("activation" in node for node in json.loads(Path("out/graph.json").read_text())["nodes"])
    code, said = rotsparse("graph", made / "fit", "--draws", 2)
    assert code == 0 and (made / "fit/graph.svg").exists()
    code, said = rotsparse("graph", made / "fit", "--prompt", "x", "--out", "no")
    assert code == 2 and "rotsparse: error:" in said
    code, said = rotsparse("graph", made / "store")
    assert code == 2 and "Is this a run folder?" in said
