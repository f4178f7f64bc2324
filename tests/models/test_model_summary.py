import json

from rotsparse.models import summarize
from tiny_models import tiny


def test_what_a_summary_says():
    summary = summarize(tiny("llama"))
    assert summary["parameters"] == 31 * 16 * 2 + 2 * (2 * 16 * 16 + 2 * 8 * 16 + 3 * 16 * 24 + 32) + 16
    assert [layer["mlp"] for layer in summary["layers"]] == ["gated silu"] * 2
    assert summary["stream"]["foldable"] and len(summary["stream"]["places"]) == 5
    json.dumps(summary)


def test_layer_norm_models_must_keep_the_mean():
    assert "keep_mean" in summarize(tiny("gpt2"))["stream"]["export"]
    assert summarize(tiny("gpt2"))["head"] == "tied"


def test_models_that_cannot_be_folded_say_why():
    stream = summarize(tiny("bert"))["stream"]
    assert not stream["foldable"] and "post-LN" in stream["reason"] and stream["export"] is None
