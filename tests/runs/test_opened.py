"""Finished runs, opened again."""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import rotsparse as rs
from rotsparse.layers.files import save_layer
from rotsparse.models import load_model, run, save_model
from rotsparse.runs.opened import LayerRun
from tiny_models import tiny_llama2c

QUICK = ("--solver", "annealing", "--steps", 5, "--control", "none")


@contextlib.contextmanager
def commands(folder):
    """A function that gives a command in a folder, and asserts that it succeeds."""
    from rotsparse_command import command_line

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)

        def command(*words):
            patch.setattr("sys.argv", ["rotsparse", *map(str, words)])
            with pytest.raises(SystemExit) as end:
                command_line()
            assert end.value.code == 0

        yield command


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of a layer, and one of a model's two layers, with what they were made from."""
    folder = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(0)
    with commands(folder) as command:
        w_in, w_out = (rng.standard_normal(s).astype(np.float32) for s in ((10, 6), (5, 10)))
        save_layer(folder / "layer.safetensors", rs.MLP(w_in, None, w_out))
        np.save("x.npy", rng.laplace(size=(200, 6)).astype(np.float32))
        layer = ("--layer", "layer.safetensors", "--activations", "x.npy")
        command("fit", *layer, *QUICK, "--restarts", 2, "--out", "fit")
        command("fit", *layer, *QUICK, "--restarts", 1, "--out", "once")
        save_model(tiny_llama2c(), folder / "model.bin")
        np.save("tokens.npy", rng.integers(0, 31, 400))
        command("capture", "--model", "model.bin", "--tokens", "tokens.npy", "--out", "store", "--length", 16)
        command("fit-model", "--model", "model.bin", "--store", "store", *QUICK, "--out", "model")
    return folder


def test_a_run_of_a_layer(made):
    opened = rs.load_run(made / "fit")
    assert opened.layer_number is None and opened.site is None
    assert opened.verdict[0] == opened.metrics["finding"]
    saved, about = rs.Rotations.load(made / "fit/rotations.safetensors")
    np.testing.assert_array_equal(opened.rotations.r_in, saved.r_in)
    assert about["numbered"] == "by influence" and about["seed"] == 0 and about["measure"] == "Log(eps=0.1)"
    assert about["data"].keys() == {"layer", "activations"}
    again = opened.agreement["in"]
    assert about["agreement"]["in"] == pytest.approx(again.cosines[np.argsort(again.order)].tolist(), abs=1e-4)
    directions = opened.directions("in")
    assert [d.number for d in directions] == list(range(6))
    influence = [d.influence for d in directions]
    assert influence == sorted(influence, reverse=True) and sum(influence) == pytest.approx(1)
    np.testing.assert_allclose(again.influence, influence, atol=1e-6)
    assert [d.cosine for d in directions] == pytest.approx(about["agreement"]["in"], abs=1e-4)
    assert all(d.skewness > -0.5 for d in directions), "signs follow the skewness on the held-out examples"
    assert directions[0].words() == ([], [])
    with pytest.raises(ValueError, match="names no model"):
        _ = opened.model
    with pytest.raises(ValueError, match="names no store"):
        _ = opened.store


def test_a_single_start_says_nothing_of_others(made):
    assert rs.load_run(made / "once").directions("in")[0].found_again is None


def test_a_layer_of_a_model_has_its_text_and_words(made):
    opened = rs.load_run(made / "model/layer-1")
    assert (opened.layer_number, opened.site) == (1, "input")
    about = rs.Rotations.load(made / "model/layer-1/rotations.safetensors")[1]
    assert about["layer"] == 1 and about["site"] == "input" and about["data"]["model"] == opened.model.fingerprint()
    tokens = np.load(made / "tokens.npy")
    assert opened.text[0] == "".join(f"⟨{token}⟩" for token in tokens[:16]) and len(opened.text) == 25
    for direction in (opened.directions("in")[2], opened.directions("out")[0]):
        for context in (*direction.top(3), *direction.bottom(3)):
            place = context.sequence * 16 + context.position
            assert context.words[context.at] == f"⟨{tokens[place]}⟩"
            line = tokens[None, context.sequence * 16 :][:, :16]
            points = ((1, "input"), (1, "output"))
            seen = run(opened.model.params, opened.model.config, line, capture=points)[1]
            value = seen[points[direction.side == "out"]][0, context.position] @ direction.vector
            # Standard deviations from the mean, over all tokens of the store.
            z = opened.store.read(range(400))
            z = z @ direction.vector if direction.side == "in" else np.asarray(opened.layer(z)) @ direction.vector
            assert context.value == pytest.approx(float((value - z.mean()) / z.std()), abs=1e-3)
    promoted, _ = opened.directions("out")[0].words(31)
    params = opened.model.params
    logits = (params["embed"] * params["final_norm"]["scale"]) @ opened.directions("out")[0].vector
    np.testing.assert_array_equal([w.token for w in promoted], np.argsort(-logits, kind="stable"))
    np.testing.assert_allclose(
        [w.score for w in promoted], -np.sort(-(logits - logits.mean()) / logits.std()), atol=1e-4
    )
    assert opened.directions("in")[0].words() != ([], [])


@pytest.mark.parametrize(("side", "point"), [("in", (1, "input")), ("out", (1, "output"))])
def test_words_through_the_layers_behind_are_those_of_a_small_push(made, side, point):
    opened = rs.load_run(made / "model/layer-1")
    direction, model = opened.directions(side)[3], opened.model
    tokens = opened.store.tokens()[:, :16]

    def logits(by):
        push = {point: lambda x: x + by * direction.vector}
        return np.asarray(run(model.params, model.config, tokens, intervene=push)[0], np.float64).mean(axis=(0, 1))

    slope = (logits(0.02) - logits(-0.02)) / 0.04
    promoted, suppressed = direction.words(31, through=True)
    scores = (slope - slope.mean()) / slope.std()
    np.testing.assert_allclose([w.score for w in promoted], scores[[w.token for w in promoted]], atol=0.02)
    assert promoted == suppressed[::-1] and promoted[0].token == int(np.argmax(slope))


def test_the_folder_of_several_layers_is_no_run_of_one(made):
    with pytest.raises(ValueError, match=r"is no run of one layer: open one of its layers, such as .*layer-0"):
        rs.load_run(made / "model")
    with pytest.raises(ValueError, match="Is this a run folder"):
        rs.load_run(made / "store")


def test_what_is_gone_is_said(made, tmp_path):
    shutil.copytree(made / "model/layer-1", tmp_path / "layer-1")
    config = json.loads((tmp_path / "layer-1/config.json").read_text())
    del config["digest"]
    config["model"] = config["store"] = str(tmp_path / "gone")
    (tmp_path / "layer-1/config.json").write_text(json.dumps(config))
    opened = rs.load_run(tmp_path / "layer-1")
    with pytest.raises(ValueError, match=r"gone/1\.input.*does not exist"):
        opened.directions("in")
    missing: list[str] = []
    of = opened.explained(missing=missing)
    assert len(missing) == 2 and "does not exist" in missing[0] and "is no model" in missing[1]
    assert of.directions("in")[0].top(1)[0].words[0].startswith("example ")


def test_a_run_of_an_earlier_version_is_numbered_when_it_is_opened(made, tmp_path):
    shutil.copytree(made / "fit", tmp_path / "fit")
    solution = rs.Solution.load(made / "fit/solution.npz")
    rng = np.random.default_rng(0)
    numbers = {s: (rng.permutation(len(r)), rng.choice([-1.0, 1.0], len(r))) for s, r in solution.bases.items()}
    shuffled = solution.renumbered(numbers)
    shuffled.save(tmp_path / "fit/solution.npz")
    shuffled.rotations.save(tmp_path / "fit/rotations.safetensors", {"seed": 0})
    expected, found = (rs.load_run(folder / "fit").rotations for folder in (made, tmp_path))
    np.testing.assert_array_equal(found.r_in, expected.r_in)
    np.testing.assert_array_equal(found.r_out, expected.r_out)


def test_another_model_is_noticed(made, tmp_path):
    save_model(tiny_llama2c(seed=1), tmp_path / "other.bin")
    folder = made / "model/layer-0"
    config = json.loads((folder / "config.json").read_text())
    opened = LayerRun(folder, config, model=load_model(Path(tmp_path / "other.bin")))
    with pytest.raises(ValueError, match="was fitted to another model"):
        _ = opened.model


def test_what_directions_are_worth(made):
    opened = rs.load_run(made / "model/layer-1")
    found = rs.effects(opened, tokens=64, exact=3)
    assert len(found) == 32 and sum(of.cost is not None for of in found) == 6
    assert all(len(of.controls) == 1 for of in found if of.cost is not None)
    measured = [of for of in found if of.side == "out" and of.cost is not None]
    largest = sorted((of for of in found if of.side == "out" and of.number), key=lambda of: -abs(of.estimate))[:2]
    assert {of.number for of in measured} == {0, *(of.number for of in largest)}
    with pytest.raises(ValueError, match="names no store"):
        rs.effects(rs.load_run(made / "fit"))
