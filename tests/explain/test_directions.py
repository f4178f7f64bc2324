"""What is told of directions, against the definitions: autodiff Jacobians, sums over neurons, sorted lists."""

import jax
import numpy as np
import pytest

import rotsparse as rs
from layer_kinds import D_IN, LAYERS, correlated_inputs
from rotsparse import models
from rotsparse.explain.directions import EDGES, Explanation
from rotsparse.explain.effects import LARGE, Mediation, effects
from rotsparse.explain.examples import BEFORE, BEHIND, Examples, Texts, texts, word
from rotsparse.explain.words import WordScores
from tiny_models import inputs, tiny

UNITS = {"scale_inputs": True}
CLOSED = [name for name in LAYERS if name != "function"]


@pytest.fixture(params=list(LAYERS))
def case(request):
    """A layer of every kind, inputs, rotations, and `R_out J R_inᵀ` by autodiff."""
    rng = np.random.default_rng(0)
    layer, x = LAYERS[request.param](rng), correlated_inputs(rng, 60)
    r = rs.Rotations.haar(jax.random.key(0), layer.d_in, layer.d_out)
    j = np.stack([np.asarray(jax.jacfwd(layer)(row)) for row in x]).astype(np.float64)
    return request.param, layer, x, r, np.asarray(r.r_out, np.float64) @ j @ np.asarray(r.r_in, np.float64).T


def deviations(layer, x, r):
    z_in, z_out = np.asarray(r.apply_in(x)), np.asarray(r.apply_out(np.asarray(layer(x))))
    return z_in.astype(np.float64).std(axis=0), z_out.astype(np.float64).std(axis=0)


@pytest.mark.parametrize("scaled", [True, False])
def test_effects_are_the_moments_of_the_jacobian(case, scaled):
    _, layer, x, r, j = case
    sd_in, sd_out = deviations(layer, x, r)
    found = effects(layer, x, r, scale_inputs=scaled)
    ratio = sd_in / sd_out[:, None]
    np.testing.assert_allclose(found.mean, j.mean(axis=0) * ratio, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.size, np.sqrt((j**2).mean(axis=0)) * ratio, rtol=1e-3, atol=1e-5)
    z = j * sd_in if scaled else j
    energy = (z**2).mean(axis=0)
    np.testing.assert_allclose(found.energy, energy / energy.sum(), rtol=2e-3, atol=1e-6)
    often = (np.abs(z) > LARGE * np.sqrt((z**2).mean())).mean(axis=0)
    assert np.abs(found.often - often).max() < 0.05 and np.abs(found.often - often).mean() < 0.005


def test_the_parts_of_all_neurons_add_up_to_the_effect(case):
    name, layer, x, r, _ = case
    if name not in CLOSED:
        with pytest.raises(ValueError, match="no hidden neurons"):
            Mediation(layer, x, r)
        return
    found, mean = Mediation(layer, x, r), effects(layer, x, r, **UNITS).mean
    for o in range(layer.d_out):
        for i in range(layer.d_in):
            assert found.of(o, i).sum() + found.skip(o, i) == pytest.approx(mean[o, i], rel=1e-3, abs=1e-5)
    assert found.hidden == len(layer.rights[0])


def test_the_part_of_a_neuron_is_what_its_removal_takes_from_the_jacobian():
    rng = np.random.default_rng(1)
    layer, x = LAYERS["gated"](rng), correlated_inputs(rng, 40)
    r = rs.Rotations.haar(jax.random.key(1), layer.d_in, layer.d_out)
    of = Explanation(layer, x, r, units=UNITS)
    w_down = np.array(layer.w_down)
    w_down[:, 3] = 0
    sd_in, sd_out = deviations(layer, x, r)

    def mean(of):
        j = np.stack([np.asarray(jax.jacfwd(of)(row)) for row in x])
        return (np.asarray(r.r_out) @ j @ np.asarray(r.r_in).T).mean(axis=0)[2, 1] * sd_in[1] / sd_out[2]

    taken = mean(layer) - mean(layer.with_weights(w_down=w_down))
    part = {n.number: n.effect for n in of.directions("out")[2].neurons(1, count=9)}
    assert part[3] == pytest.approx(taken, rel=1e-3)
    assert part == {n.number: n.effect for n in of.directions("in")[1].neurons(2, count=9)}


@pytest.fixture
def explanation():
    rng = np.random.default_rng(0)
    layer, x = LAYERS["mlp"](rng), correlated_inputs(rng, 200)
    r = rs.Rotations.haar(jax.random.key(0), D_IN, 4)
    scores = {"out": WordScores(rng.standard_normal((4, 30)), [f"w{i}" for i in range(30)])}
    cosines = {"in": [0.999, 0.5, None, 0.991, 0.99, 0.2]}
    return Explanation(layer, x, r, units=UNITS, cosines=cosines, words=scores)


def test_a_direction_says_what_it_is(explanation):
    of, r = explanation, explanation.rotations
    z = np.asarray(r.apply_in(of.x_test), np.float64)
    energy = effects(of.layer, of.x_test, r, **UNITS).energy
    for direction in of.directions("in"):
        mine = z[:, direction.number]
        centred = mine - mine.mean()
        np.testing.assert_array_equal(direction.vector, r.r_in[direction.number])
        assert direction.variance == pytest.approx(mine.var(), rel=1e-4)
        assert direction.skewness == pytest.approx((centred**3).mean() / mine.std() ** 3, rel=1e-3, abs=1e-4)
        assert direction.kurtosis == pytest.approx((centred**4).mean() / mine.var() ** 2 - 3, rel=1e-3, abs=1e-3)
        assert direction.influence == pytest.approx(energy[:, direction.number].sum())
        np.testing.assert_allclose(direction.coordinates(), centred / mine.std(), atol=1e-4)
        assert sum(direction.histogram()) == len(mine) and len(direction.histogram()) == len(EDGES) - 1
    assert [d.found_again for d in of.directions("in")] == [True, False, None, True, False, False]
    assert of.directions("out")[0].found_again is None
    assert sum(d.influence for d in of.directions("out")) == pytest.approx(1)
    assert of.directions("in")[-1].number == D_IN - 1 and len(of.directions("in")[1:3]) == 2
    with pytest.raises(IndexError, match="there are 6 input directions, 0 to 5: got 6"):
        of.directions("in")[6]
    with pytest.raises(ValueError, match="directions 'in' and 'out', got 'up'"):
        of.directions("up")


def test_partners_hold_the_energy_and_point_at_each_other(explanation):
    energy = explanation.effects.energy
    for direction in explanation.directions("in"):
        partners = direction.partners(4)
        column = energy[:, direction.number]
        assert [p.number for p in partners] == np.argsort(-column, kind="stable").tolist()
        assert sum(p.share for p in partners) == pytest.approx(1)
        back = explanation.directions("out")[partners[0].number].partners(D_IN)
        same = next(p for p in back if p.number == direction.number)
        assert same[2:4] == partners[0][2:4] and same.often == partners[0].often


def test_examples_at_both_ends_and_between(explanation):
    direction = explanation.directions("in")[2]
    z = direction.coordinates()
    assert [c.value for c in direction.top(5)] == pytest.approx(np.sort(z)[::-1][:5].tolist())
    assert [c.value for c in direction.bottom(5)] == pytest.approx(np.sort(z)[:5].tolist())
    assert direction.top(1)[0].words == (f"example {int(np.argmax(z))}",)
    between = direction.between((0.9, 0.5))
    assert [c.value for c in between] == pytest.approx([np.sort(z)[round(q * 199)] for q in (0.9, 0.5)])
    promoted, suppressed = explanation.directions("out")[1].words(3)
    scores = explanation.words["out"].scores[1]
    assert [w.token for w in promoted] == np.argsort(-scores)[:3].tolist()
    assert [w.token for w in suppressed] == np.argsort(scores)[:3].tolist()
    assert promoted[0].word == f"w{promoted[0].token}" and explanation.directions("in")[0].words() == ([], [])


# --- contexts in a text


def text(keep=None):
    """Two sequences of 20 tokens, the second one short, with the coordinate in the first of two inputs."""
    tokens = np.arange(40).reshape(2, 20) % 7
    tokens[1, 12:] = -1
    places = np.argwhere(tokens >= 0)
    places = places if keep is None else places[keep]
    x = np.stack([places[:, 1] + 100.0 * (places[:, 0] == 0), np.ones(len(places))], axis=1).astype(np.float32)
    return Texts(x, places, tokens, [f" {c}" for c in "abcdef"] + ["\n<b>"])


def test_a_context_is_the_text_around_a_row():
    of = text()
    z = np.arange(32.0)
    context = of.context(13, z)
    assert (context.sequence, context.position, context.value) == (0, 13, 13.0)
    assert context.at == BEFORE and len(context.words) == BEFORE + 1 + BEHIND
    assert context.words[context.at] == of.word(int(of.tokens[0, 13]))
    assert context.values == tuple(np.arange(13 - BEFORE, 13 + BEHIND + 1.0))
    early, late = of.context(1, z), of.context(31, z)
    assert early.at == 1 and len(early.words) == 2 + BEHIND, "nothing stands before the first token"
    assert late.position == 11 and len(late.words) == late.at + 1, "nothing stands behind the last one"
    assert of.word(6) == "⏎<b>" and of.word(7) == "⟨7⟩" and word(None, 3) == "⟨3⟩"
    assert word(["\u202e\x1b[31m"], 0) == "\\u202e\\x1b[31m"


def test_neighbours_that_were_not_captured_have_no_value():
    of = text(keep=slice(None, None, 3))
    context = of.context(4, np.arange(float(len(of.x))))
    assert context.position == 12 and context.values[context.at] == 4.0
    assert [v is not None for v in context.values] == [(p % 3) == 0 for p in range(12 - BEFORE, 12 + BEHIND + 1)]


def test_contexts_that_are_alike_are_shown_once():
    tokens = np.tile([1, 2, 3, 4], (6, 1))
    places = np.argwhere(tokens >= 0)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((24, 3)).astype(np.float32)
    x[:, 0] += 10 * (places[:, 1] == 2)
    layer = rs.MLP(rng.standard_normal((4, 3)).astype(np.float32), None, np.eye(4, dtype=np.float32))
    r = rs.Rotations.identity(3, 4)
    of = Explanation(layer, x, r, units=UNITS, examples=Texts(x, places, tokens, None))
    top = of.directions("in")[0].top(4)
    assert [c.words[c.at] for c in top].count("⟨3⟩") == 1, "all six are the third token behind the same two"
    assert top[0].words[top[0].at] == "⟨3⟩"


def test_rows_of_images_are_named_by_image_and_patch(tmp_path):
    np.save(tmp_path / "images.npy", inputs("vit"))
    source = models.ImageFile(tmp_path / "images.npy")
    (store,) = models.capture(tiny("vit"), source, [(0, "input")], tmp_path / "store", batch=2)
    found = texts(store)
    assert len(found.x) == 10 and found.context(6, np.zeros(10)).words == ("image 1, patch 1",)
    with pytest.raises(ValueError, match="does not hold the tokens"):
        store.tokens()


def test_long_texts_are_looked_at_in_whole_sequences(tmp_path):
    np.save(tmp_path / "tokens.npy", np.arange(320).reshape(20, 16) % 31)
    source = models.TokenFile(tmp_path / "tokens.npy")
    (store,) = models.capture(tiny("llama"), source, [(0, "input")], tmp_path / "store", length=16)
    found = texts(store, most=80)
    assert isinstance(found, Texts) and np.unique(found.places[:, 0]).tolist() == [0, 5, 10, 14, 19]
    np.testing.assert_array_equal(found.x[16:32], store.read(range(80, 96)))


def test_labels_and_pictures_belong_to_examples():
    x = np.zeros((3, 2), np.float32)
    with pytest.raises(ValueError, match="labels should be one for each of the 3 examples, got 2"):
        Examples(x, labels=["a", "b"])
    assert Examples(x, labels=["a", "\x1b", "c"]).context(1, np.zeros(3)).words == ("\\x1b",)
