from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rotsparse.layers.gated import GatedMLP
from rotsparse.models.language import generate
from rotsparse.models.layers import mlp_layer, with_mlp_layer
from rotsparse.models.transformer import SITES, run
from tiny_models import RAW, inputs, message, tiny

TOKENS = np.random.default_rng(0).integers(0, 31, (2, 9))
DECODERS = [name for name in RAW if tiny(name).config.causal]


def placement(name):
    return tiny(name).config.placement


@pytest.mark.parametrize("name", RAW)
def test_captured_values_fit_together(name):
    """The layer taken from the model maps what was captured in front of it to what was captured behind."""
    model = tiny(name)
    points = tuple((1, site) for site in SITES)
    _, seen = run(model.params, model.config, inputs(name), capture=points)
    assert set(seen) == set(points)
    assert seen[1, "hidden"].shape == (2, 5 if name == "vit" else 9, model.config.d_hidden)
    layer = mlp_layer(model, 1)
    np.testing.assert_allclose(layer(seen[1, "input"]), seen[1, "output"], atol=1e-5)
    if placement(name) in ("post", "output"):
        np.testing.assert_array_equal(seen[1, "residual"], seen[1, "input"])
        return
    np.testing.assert_allclose(mlp_layer(model, 1, norm=True)(seen[1, "residual"]), seen[1, "output"], atol=1e-5)
    if placement(name) == "pre":
        block = mlp_layer(model, 1, norm=True, skip=True)(seen[1, "residual"])
        np.testing.assert_allclose(block, seen[1, "residual"] + seen[1, "output"], atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2", "bert", "olmo2"])  # each arrangement of norms
@pytest.mark.parametrize("site", SITES)
def test_interventions(name, site):
    """Putting back the value changes nothing, another value changes the output."""
    model = tiny(name)
    plain, seen = run(model.params, model.config, TOKENS, capture=((0, site),))
    same, again = run(
        model.params, model.config, TOKENS, capture=((0, site),), intervene={(0, site): lambda _: seen[0, site]}
    )
    np.testing.assert_allclose(same, plain, atol=1e-6)
    np.testing.assert_array_equal(again[0, site], seen[0, site])

    changed = run(model.params, model.config, TOKENS, intervene={(0, site): lambda v: -v})[0]
    assert np.abs(changed - plain).max() > 1e-3


def test_jit_traces_once():
    model = tiny("qwen3")
    points = ((0, "input"), (1, "hidden"))
    traces = []

    @jax.jit
    def compiled(params, tokens):
        traces.append(tokens.shape)
        return run(params, model.config, tokens, capture=points, intervene={(0, "output"): jnp.negative})

    for tokens in (TOKENS, TOKENS[::-1]):
        expected = run(model.params, model.config, tokens, capture=points, intervene={(0, "output"): jnp.negative})
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), compiled(model.params, tokens), expected)
    assert len(traces) == 1


@pytest.mark.parametrize("name", DECODERS)
def test_no_token_sees_a_later_one(name):
    model = tiny(name)
    changed = TOKENS.copy()
    changed[:, -1] = (changed[:, -1] + 1) % 31
    a, b = (np.asarray(run(model.params, model.config, t)[0]) for t in (TOKENS, changed))
    np.testing.assert_allclose(a[:, :-1], b[:, :-1], atol=1e-6)
    assert np.abs(a[:, -1] - b[:, -1]).max() > 1e-3


def test_a_window_hides_what_is_further_back():
    model = tiny("mistral", num_hidden_layers=1)
    changed = TOKENS.copy()
    changed[:, 0] = (changed[:, 0] + 1) % 31
    a, b = (np.asarray(run(model.params, model.config, t)[0]) for t in (TOKENS, changed))
    different = np.abs(a - b).max(axis=(0, 2)) > 1e-6
    np.testing.assert_array_equal(different, [True] * 5 + [False] * 4)  # a window of 5 tokens, itself included


@pytest.mark.parametrize("name", ["mistral", "gpt2", "gpt_neox", "gemma3_text", "opt", "olmo2"])
def test_generated_tokens_are_the_likeliest(name):
    """Written one at a time from remembered keys and values, judged by a run over the whole text."""
    model = tiny(name)
    written = generate(model, TOKENS[:, :3], 12)
    np.testing.assert_array_equal(written[:, :3], TOKENS[:, :3])
    logits = np.asarray(run(model.params, model.config, written)[0])
    chosen = np.take_along_axis(logits[:, 2:-1], written[:, 3:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(chosen, logits[:, 2:-1].max(axis=-1), atol=1e-4)


def test_generation_ends_with_the_models_positions():
    with pytest.raises(ValueError, match="at most the model's 32 positions, got 33"):
        generate(tiny("llama"), TOKENS, 33)


def test_padding_is_not_looked_at():
    model = tiny("bert")
    mask = np.ones((2, 9), bool)
    mask[0, 6:] = False
    padded = run(model.params, model.config, TOKENS, mask=mask)[0]
    alone = run(model.params, model.config, TOKENS[:1, :6])[0]
    np.testing.assert_allclose(padded[:1, :6], alone, atol=1e-5)


def test_points_that_are_not_there():
    model = tiny("llama")
    for point in [(2, "input"), (0, "gate"), (-1, "input")]:
        with pytest.raises(ValueError, match="layers 0 to 1, sites attention, heads, residual, input, hidden, output"):
            run(model.params, model.config, TOKENS, capture=(point,))
    with pytest.raises(ValueError, match=r"intervention at 0\.input returned shape \[2, 9\]"):
        run(model.params, model.config, TOKENS, intervene={(0, "input"): lambda v: v[..., 0]})
    with pytest.raises(ValueError, match="40 tokens a sequence, but the model has 32 positions"):
        run(model.params, model.config, np.zeros((1, 40), int))


# --- layers taken out and put back --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RAW)
def test_layer_put_back_is_the_same_model(name):
    model = tiny(name)
    options = {"norm": placement(name) in ("pre", "sandwich"), "skip": placement(name) == "pre"}
    again = with_mlp_layer(model, 1, mlp_layer(model, 1, **options))
    assert again.fingerprint() == model.fingerprint()


def test_layer_put_back_changes_only_its_own_model():
    model = tiny("llama")
    before = model.fingerprint()
    layer = mlp_layer(model, 0)
    assert isinstance(layer, GatedMLP)
    changed = with_mlp_layer(model, 0, layer.rotate(None, jnp.eye(16)[::-1]))
    assert model.fingerprint() == before != changed.fingerprint()
    np.testing.assert_array_equal(changed.params["layers"][0]["mlp"]["w_down"], layer.w_down[::-1])


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("bert", {"norm": True}, "bert normalises behind its blocks"),
        ("gemma2", {"norm": True, "skip": True}, "no rotsparse layer does"),
        ("llama", {"skip": True}, "set norm=True too"),
    ],
)
def test_layers_that_cannot_be(name, options, text):
    with pytest.raises(ValueError) as error:
        mlp_layer(tiny(name), 0, **options)
    assert text in message(error)


def test_layers_that_do_not_fit():
    model = tiny("gpt2")
    with pytest.raises(ValueError, match="layer 0 is a MLP with gelu_tanh, got a GatedMLP with silu"):
        with_mlp_layer(model, 0, mlp_layer(tiny("llama"), 0))
    with pytest.raises(ValueError, match=r"w_in has shape \[24, 32\], the model needs \[24, 16\]"):
        with_mlp_layer(model, 0, mlp_layer(tiny("gpt2", n_embd=32), 0))
    rotated = mlp_layer(model, 0, norm=True).rotate(jnp.linalg.qr(jnp.ones((16, 16)) + jnp.eye(16))[0], None)
    with pytest.raises(ValueError, match="removes another direction"):
        with_mlp_layer(model, 0, rotated)
