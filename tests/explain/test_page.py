"""The page: its numbers are the library's, its texts are inert."""

import base64
import json
import re

import jax
import numpy as np
import pytest

import rotsparse as rs
from layer_kinds import D_IN, LAYERS, correlated_inputs
from rotsparse.explain.data import (
    EDGES_DRAWN,
    ENDS,
    NEURONS,
    NOTHING,
    PARTNERS,
    SHARE,
    WORDS,
    Drawing,
    page_data,
    percent,
)
from rotsparse.explain.directions import Explanation
from rotsparse.explain.examples import BEFORE, Examples, Texts
from rotsparse.explain.graph import layer_graph
from rotsparse.explain.graph_drawing import about as about_edge
from rotsparse.explain.page import Layer, index, render, write_page
from rotsparse.explain.words import WordScores

HOSTILE = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<!--", "\u2028", "\u202e", "\x1b[31m"]
HOSTILE += ["&lt;", "{{data}}"]


def explanation(words=HOSTILE, **options):
    """A layer behind a text of hostile words."""
    rng = np.random.default_rng(0)
    layer, x = LAYERS["mlp"](rng), correlated_inputs(rng, 200)
    tokens = rng.integers(0, len(words), (10, 20))
    r = rs.Rotations.haar(jax.random.key(0), D_IN, 4)
    scores = {side: WordScores(rng.standard_normal((d, len(words))), words) for side, d in (("in", D_IN), ("out", 4))}
    scores["out through"] = WordScores(rng.standard_normal((4, len(words))), words)
    cosines = {"in": [0.999, 0.5, None, 0.991, 0.99, 0.2]}
    text = Texts(x, np.argwhere(tokens >= 0), tokens, words)
    options = {"units": {"scale_inputs": True}, "cosines": cosines, "examples": text, "words": scores} | options
    return Explanation(layer, x, r, **options)


def content(page):
    """The data of a page, as a browser would find it: up to the first end of a script."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    return json.loads(found[1])


def unpacked(side, name, kind):
    of = np.frombuffer(base64.b64decode(side[name]), kind)
    return of.reshape(len(side["facts"]), side["slots"], -1)


def test_every_number_is_the_librarys():
    of = explanation()
    page = content(render(page_data(of, title="t", facts={}, verdict=["v"])))
    for name, side in page["sides"].items():
        directions = of.directions(name)
        assert not side["wide"]
        words, values = unpacked(side, "words", np.uint16), unpacked(side, "values", np.int16)
        places = unpacked(side, "places", np.int32)
        assert side["count"] == len(directions) == len(side["facts"])
        for direction, facts, counts, partners, scores in zip(
            directions, side["facts"], side["histograms"], side["partners"], side["scores"], strict=True
        ):
            i = direction.number
            assert facts["influence"] == percent(direction.influence)
            assert facts["again"] is direction.found_again
            assert facts["cosine"] == (None if direction.cosine is None else f"{direction.cosine:.3f}")
            assert (
                facts["variance"] == f"{direction.variance:.3g}" and facts["kurtosis"] == f"{direction.kurtosis:+.1f}"
            )
            assert facts["skewness"] == f"{direction.skewness:+.2f}"
            assert counts == direction.histogram()
            expected = direction.partners(PARTNERS)
            assert [p[0] for p in partners] == [p.number for p in expected]
            for (number, effect, size, share, often, neurons), p in zip(partners, expected, strict=True):
                assert (effect, size) == (f"{p.effect:+.3f}", f"{p.size:.3f}")
                assert (share, often) == (percent(p.share), percent(p.often))
                assert neurons == [[n.number, f"{n.effect:+.3f}"] for n in direction.neurons(number, NEURONS)]
            for end, library in zip(scores, direction.words(WORDS), strict=True):
                assert end == [[w.word, f"{w.score:+.1f}"] for w in library]
            through = direction.words(WORDS, through=True)
            spelled = [[[w.word, f"{w.score:+.1f}"] for w in end] for end in through]
            assert side["through"][i] == (spelled if name == "out" else None)
            ends = [direction.top(ENDS), direction.bottom(ENDS), direction.between()]
            for slots, contexts in zip(np.split(np.arange(side["slots"]), [ENDS, 2 * ENDS]), ends, strict=True):
                for slot, context in zip(slots, contexts, strict=False):
                    assert tuple(places[i, slot]) == (context.sequence, context.position)
                    assert values[i, slot, BEFORE] == round(100 * context.value)
                    start = BEFORE - context.at
                    shown = words[i, slot, start : start + len(context.words)]
                    assert [page["words"][w] for w in shown] == list(context.words)
                    seen = values[i, slot, start : start + len(context.words)]
                    assert seen.tolist() == [NOTHING if v is None else round(100 * v) for v in context.values]
                assert (words[i, slots[len(contexts) :]] == 2**16 - 1).all(), "places that are free are empty"


def test_the_graph_is_the_librarys():
    of = explanation()
    page = content(render(page_data(of, title="t", facts={}, verdict=["v"])))["graph"]
    graph = layer_graph(of, share=SHARE, title="t")
    assert sorted(about for *_, about in page["curves"]) == sorted(map(about_edge, graph.edges))
    assert {f"{side}-{number}" for side, number, *_ in page["dots"]} == {node.name for node in graph.nodes}
    for node, direction in ((n, of.directions(("in", "out")[n.place])[n.number]) for n in graph.nodes):
        assert node.influence == direction.influence
    modules = graph.modules()
    assert page["said"] == [graph.stages[0].cut, str(modules)]
    assert [[f"{side}-{number}" for side, number in group] for group in page["modules"]] == modules.groups
    drawn = page_data(of, title="t", facts={}, verdict=[])["graph"]
    assert len(drawn["curves"]) <= EDGES_DRAWN


def test_no_text_is_markup(tmp_path):
    of = explanation()
    hostile = HOSTILE[0]
    data = page_data(
        of, title=hostile, facts={hostile: hostile}, verdict=[hostile], missing=[hostile], links={hostile: "a"}
    )
    page = render(data)
    assert (
        page.count("<script") == 2 and page.count("</script") == 2 and "<img" not in page and "alert(1)</" not in page
    )
    assert "<!--" not in page and "\u202e" not in page and "\x1b" not in page and "\u2028" not in page
    assert content(page)["title"] == hostile and hostile in content(page)["words"]
    assert re.search("<title>(.*)</title>", page)[1] == "&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;"
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", ""), "it loads nothing"
    listed = index(hostile, [Layer(0, '"><script>', hostile, hostile)])
    assert "<script" not in listed and "<img" not in listed
    path = write_page(tmp_path, data)
    assert path.read_text() == page


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0999, 0.01, 0.00999, 1e-6])
def test_shares_have_about_three_digits(share):
    assert float(percent(share).rstrip("%")) / 100 == pytest.approx(share, abs=6e-6 if share < 0.1 else 6e-4)


def test_examples_that_are_no_text():
    rng = np.random.default_rng(0)
    x, pictures = correlated_inputs(rng, 200), rng.random((200, 3, 2))
    of = explanation(examples=Examples(x, labels=[f"<b>{i}" for i in range(200)], pictures=pictures))
    of.words = {}
    drawings = {"in": [Drawing(np.linspace(-1, 2, 7), "a <wave>")] * D_IN, "out": [Drawing(np.eye(3), "a face")] * 4}
    page = content(render(page_data(of, title="t", facts={}, verdict=[], drawings=drawings)))
    assert page["window"] == 1 and page["text"] is False and page["pictures"]["size"] == [3, 2]
    side = page["sides"]["in"]
    assert side["drawings"][0] == {"size": [7], "values": [-50, -25, 0, 25, 50, 75, 100], "caption": "a <wave>"}
    assert side["scores"] == [None] * D_IN
    row = int(unpacked(side, "places", np.int32)[0, 0, 0])
    assert row == int(np.argmax(of.coordinates("in")[0]))
    grey = np.frombuffer(base64.b64decode(page["pictures"]["of"][str(row)]), np.uint8)
    np.testing.assert_array_equal(grey, np.round(255 * pictures[row]).ravel())


def test_a_wide_layer_fits_into_five_megabytes():
    """A text in which no two contexts are alike, 576 directions on each side."""
    d, rng = 576, np.random.default_rng(0)
    weights = (rng.standard_normal(s).astype(np.float32) for s in ((8, d), (d, 8)))
    layer = rs.MLP(next(weights), None, next(weights))
    x, tokens = rng.standard_normal((300, d)).astype(np.float32), rng.integers(0, 40_000, (10, 30))
    words = [f" word{i}" for i in range(40_000)]
    text = Texts(x, np.argwhere(tokens >= 0), tokens, words)
    scores = WordScores(rng.standard_normal((d, 40_000), np.float32), words)
    r = rs.Rotations(np.eye(d, dtype=np.float32), np.eye(d, dtype=np.float32))
    every: dict[str, WordScores] = {
        f"{side}{through}": scores for side in ("in", "out") for through in ("", " through")
    }
    of = Explanation(layer, x[:20], r, units={"scale_inputs": True}, examples=text, words=every)
    page = render(page_data(of, title="t", facts={}, verdict=[]))
    assert len(page.encode()) < 5_000_000
