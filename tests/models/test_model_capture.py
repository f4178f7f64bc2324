import importlib
import json
import tracemalloc
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from rotsparse._core.errors import CheckError
from rotsparse._core.lock import FolderLock
from rotsparse.data.store import open_store
from rotsparse.models._capture import capture
from rotsparse.models.layers import mlp_layer
from rotsparse.models.load import load_model, load_tokenizer
from rotsparse.models.sequences import TextFile, TokenFile
from rotsparse.models.transformer import run
from tiny_models import STORIES, message, needs_stories, tiny

# The package exports a function of the same name.
capture_module = importlib.import_module("rotsparse.models._capture")
store_module = importlib.import_module("rotsparse.data.store")
POINTS = [(0, "input"), (1, "hidden")]
# Small shards, so that there are several: two batches of two sequences each.
SMALL: dict[str, Any] = {"length": 8, "batch": 2, "shard_bytes": 8 * 2 * 2 * 24 * 4}


@pytest.fixture
def model():
    return tiny("llama")


@pytest.fixture
def tokens(tmp_path):
    """61 tokens: seven sequences of eight, and five left over."""
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 31, 61).astype(np.uint16))
    return TokenFile(tmp_path / "tokens.npy")


def everything(stores):
    return [store.read(range(len(store))) for store in stores]


def test_rows_are_what_the_model_computes(model, tokens, tmp_path):
    stores = capture(model, tokens, POINTS, tmp_path / "out", **SMALL)
    line = np.load(tokens.path)
    expected = [
        run(model.params, model.config, line[None, i : i + 8], capture=tuple(POINTS))[1] for i in range(0, 61, 8)
    ]
    for store, point in zip(stores, POINTS, strict=True):
        assert len(store.manifest["shards"]) == 2 and store.shape[0] == 61
        np.testing.assert_allclose(everything([store])[0], np.concatenate([e[point][0] for e in expected]), atol=1e-5)
    again = open_store(tmp_path / "out/1.hidden", model.fingerprint())
    assert again.shape == (61, 24)
    np.testing.assert_array_equal(again.read(range(50, 20, -3)), everything(stores)[1][50:20:-3])


def test_a_share_of_the_tokens(model, tokens, tmp_path):
    whole = everything(capture(model, tokens, POINTS, tmp_path / "whole", **SMALL))[0]
    some = everything(capture(model, tokens, POINTS, tmp_path / "some", keep=0.25, **SMALL))[0]
    other = everything(capture(model, tokens, POINTS, tmp_path / "other", keep=0.25, seed=1, **SMALL))[0]
    assert len(some) == 2 * 7 + 1
    for i in range(7):  # two rows of each sequence, none twice
        rows = [np.abs(whole[8 * i : 8 * i + 8] - row).max(axis=1).argmin() for row in some[2 * i : 2 * i + 2]]
        assert len(set(rows)) == 2
    assert not np.array_equal(some, other)
    # The choice does not depend on how the work is cut.
    larger = everything(capture(model, tokens, POINTS, tmp_path / "larger", length=8, batch=4, keep=0.25))[0]
    np.testing.assert_allclose(larger, some, atol=1e-5)


def test_rows_of_sequences_and_a_limit(model, tmp_path):
    np.save(tmp_path / "two.npy", np.arange(20).reshape(2, 10))
    source = TokenFile(tmp_path / "two.npy")
    assert [list(piece) for piece, _ in source.sequences(8)] == [[*range(8)], [8, 9], [*range(10, 18)], [18, 19]]
    (store,) = capture(model, source, POINTS[:1], tmp_path / "out", sequences=3, **SMALL)
    assert len(store) == 8 + 2 + 8


def test_an_encoders_padding_is_neither_seen_nor_kept(tokens, tmp_path):
    bert = tiny("bert")
    (store,) = capture(bert, tokens, POINTS[:1], tmp_path / "out", **SMALL)
    last = np.load(tokens.path)[None, 56:]
    expected = run(bert.params, bert.config, last, capture=((0, "input"),))[1][0, "input"][0]
    np.testing.assert_allclose(store.read(range(56, 61)), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("where", "calls"), [*(("compute", n) for n in (0, 3, 6, 7)), *(("write", n) for n in (0, 1, 2, 3, 5, 7))]
)
def test_an_interrupted_capture_goes_on(where, calls, model, tokens, tmp_path, monkeypatch):
    expected = everything(capture(model, tokens, POINTS, tmp_path / "whole", **SMALL))
    module, name = (capture_module, "_stored") if where == "compute" else (store_module, "write_atomically")
    original, count = getattr(module, name), iter(range(10**6))

    def interrupted(*args):
        if next(count) == calls:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            capture(model, tokens, POINTS, tmp_path / "out", **SMALL)
    with pytest.raises(ValueError, match=r"was interrupted|holds no activations"):
        open_store(tmp_path / "out/1.hidden", model.fingerprint())  # the one that is written last
    finished = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.npy") if begun_shard(p)}
    resumed = capture(model, tokens, POINTS, tmp_path / "out", **SMALL)
    for ours, theirs in zip(everything(resumed), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert {p: p.stat().st_mtime_ns for p in finished} == finished  # nothing was computed twice
    for store in resumed:
        store.verify()


def begun_shard(path):
    """Whether a shard is in its store's manifest (one that was written just before the interruption is not)."""
    manifest = path.parent / "manifest.json"
    return manifest.exists() and path.name in {s["file"] for s in json.loads(manifest.read_text())["shards"]}


def test_a_finished_capture_is_opened_without_running(model, tokens, tmp_path, monkeypatch):
    first = everything(capture(model, tokens, POINTS, tmp_path / "out", **SMALL))
    monkeypatch.setattr(capture_module, "_forward", None)
    np.testing.assert_array_equal(everything(capture(model, tokens, POINTS, tmp_path / "out", **SMALL))[1], first[1])


def test_only_one_capture_writes_to_a_folder(model, tokens, tmp_path):
    lock = FolderLock(tmp_path / "out")
    with pytest.raises(ValueError, match=r"out is in use by process \d+"):
        capture(model, tokens, POINTS, tmp_path / "out", **SMALL)
    lock.release()
    capture(model, tokens, POINTS, tmp_path / "out", **SMALL)
    lock = FolderLock(tmp_path / "out")  # what is finished is only opened, whoever holds the folder
    assert len(capture(model, tokens, POINTS, tmp_path / "out", **SMALL)[0]) == 61
    lock.release()


def test_float16(model, tokens, tmp_path):
    full, half = (
        everything(capture(model, tokens, POINTS, tmp_path / t.__name__, dtype=t, **SMALL))[0]
        for t in (np.float32, np.float16)
    )
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, full, rtol=1e-3, atol=1e-3)
    assert np.load(tmp_path / "float16/0.input/00000.npy").dtype == np.float16


def test_memory_does_not_grow_with_the_tokens(model, tmp_path):
    peaks = []
    for n in (1000, 20_000):
        np.save(tmp_path / f"{n}.npy", np.random.default_rng(0).integers(0, 31, n))
        settings: dict[str, Any] = {"length": 32, "batch": 8, "shard_bytes": 1 << 16}
        tracemalloc.start()
        capture(model, TokenFile(tmp_path / f"{n}.npy"), POINTS[1:], tmp_path / f"out{n}", **settings)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    rows = 19_000 * 24 * 4
    assert peaks[1] - peaks[0] < 0.2 * rows


@needs_stories
def test_real_text_through_a_real_model(tmp_path):
    model = load_model(STORIES / "stories260K.bin")
    tokenizer = load_tokenizer(STORIES / "tok512.bin", model)
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside.\n" * 20
    (tmp_path / "story.txt").write_text(story)
    source = TextFile(tmp_path / "story.txt", tokenizer)
    inputs, outputs = capture(model, source, [(4, "input"), (4, "output")], tmp_path / "out", length=64, batch=2)
    n = len(tokenizer.encode(story))
    assert inputs.shape == outputs.shape == (n, 64)  # the beginning-of-text tokens are not kept
    computed = mlp_layer(model, 4)(jnp.asarray(inputs.read(range(n))))
    np.testing.assert_allclose(computed, outputs.read(range(n)), atol=1e-4)


# --- bad input ----------------------------------------------------------------------------------------------------


def test_foreign_and_different_stores_are_refused(model, tokens, tmp_path):
    capture(model, tokens, POINTS, tmp_path / "out", **SMALL)
    other = tiny("llama", seed=1)
    with pytest.raises(ValueError, match="come from another model"):
        open_store(tmp_path / "out/0.input", other.fingerprint())
    with pytest.raises(ValueError, match="holds activations of another model"):
        capture(other, tokens, POINTS, tmp_path / "out", **SMALL)
    with pytest.raises(ValueError, match=r"was begun with other settings:\n  seed: 0 then, 1 now\n"):
        capture(model, tokens, POINTS, tmp_path / "out", seed=1, **SMALL)


def test_damaged_stores(model, tokens, tmp_path):
    (store,) = capture(model, tokens, POINTS[:1], tmp_path / "out", **SMALL)
    shard = tmp_path / "out/0.input/00001.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckError, match=r"00001\.npy is damaged"):
        store.verify()
    shard.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"cannot read .*00001\.npy"):
        store.read(range(61))
    shard.unlink()
    with pytest.raises(ValueError, match=r"lacks 00001\.npy"):
        open_store(tmp_path / "out/0.input")
    with pytest.raises(ValueError, match="outside the store"):
        store.read(range(60, 62))
    (tmp_path / "out/0.input/manifest.json").write_text("[]")
    with pytest.raises(ValueError, match="not the manifest"):
        open_store(tmp_path / "out/0.input")
    with pytest.raises(ValueError, match="holds no activations"):
        open_store(tmp_path)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"keep": 0.0}, "0 < keep <= 1"),
        ({"length": 33}, "the model's 32 positions"),
        ({"length": 0}, "got length=0"),
        ({"dtype": np.int8}, "not int8"),
        ({"points": [(0, "gate")]}, "no point 0.gate"),
        ({"points": []}, "no points to capture"),
    ],
)
def test_settings_that_make_no_sense(changes, text, model, tokens, tmp_path):
    settings: dict[str, Any] = {"points": POINTS, **SMALL, **changes}
    with pytest.raises(ValueError) as error:
        capture(model, tokens, settings.pop("points"), tmp_path / "out", **settings)
    assert text in message(error)
    assert not (tmp_path / "out").exists()


def test_token_files_that_do_not_fit(model, tmp_path):
    np.save(tmp_path / "large.npy", np.array([3, 31]))
    with pytest.raises(ValueError, match="tokens from 3 to 31, the model's are 0 to 30"):
        capture(model, TokenFile(tmp_path / "large.npy"), POINTS, tmp_path / "out", **SMALL)
    np.save(tmp_path / "empty.npy", np.zeros(0, int))
    with pytest.raises(ValueError, match="holds no tokens"):
        capture(model, TokenFile(tmp_path / "empty.npy"), POINTS, tmp_path / "empty", **SMALL)
    np.save(tmp_path / "floats.npy", np.ones(3))
    with pytest.raises(ValueError, match=r"holds float64 \[3\]: expected integer tokens"):
        TokenFile(tmp_path / "floats.npy")
    with pytest.raises(ValueError, match="no file"):
        TokenFile(tmp_path / "absent.npy")
    (tmp_path / "text.npy").write_text("one two")
    with pytest.raises(ValueError, match="cannot read tokens"):
        TokenFile(tmp_path / "text.npy")


def test_activations_that_overflow(model, tokens, tmp_path):
    model.params["layers"][0]["mlp_norm"]["scale"] = np.full(16, 1e5, np.float32)
    with pytest.raises(ValueError, match="not finite in float16: store float32"):
        capture(model, tokens, POINTS, tmp_path / "out", dtype=np.float16, **SMALL)


@needs_stories
def test_text_that_is_no_text(tmp_path):
    model = load_model(STORIES / "stories260K.bin")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 10)
    source = TextFile(tmp_path / "latin.txt", load_tokenizer(STORIES / "tok512.bin", model))
    with pytest.raises(ValueError, match="no UTF-8 text"):
        capture(model, source, POINTS, tmp_path / "out", **SMALL)


# --- where rows come from ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1.0, 0.25])
def test_every_row_knows_its_token_and_its_place(keep, model, tokens, tmp_path):
    (store,) = capture(model, tokens, POINTS[:1], tmp_path / "out", keep=keep, **SMALL)
    line = np.load(tokens.path)
    places, sequences = store.places(), store.tokens()
    assert places.shape == (len(store), 2) and sequences.shape == (8, 8)
    np.testing.assert_array_equal(sequences.ravel()[:61], line)
    assert (sequences.ravel()[61:] == store_module.NO_TOKEN).all()
    for row, (sequence, position) in enumerate(places):
        seen = run(model.params, model.config, line[None, sequence * 8 :][:, :8], capture=((0, "input"),))[1]
        np.testing.assert_allclose(store[row], seen[0, "input"][0, position], atol=1e-5)
    store.verify()
    assert store.vocabulary() is None, "there was no tokenizer"


def as_format_1(folder):
    """Make a store one of the earlier format, which had rows alone."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest = {**manifest, "format": "rotsparse activations 1"}
    manifest["shards"] = [{k: shard[k] for k in ("file", "rows", "sha256")} for shard in manifest["shards"]]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for path in [*folder.glob("*.places.npy"), *folder.glob("*.tokens.npy")]:
        path.unlink()


def test_a_store_of_format_1_opens_and_says_what_it_lacks(model, tokens, tmp_path):
    expected = everything(capture(model, tokens, POINTS[:1], tmp_path / "out", **SMALL))[0]
    as_format_1(tmp_path / "out/0.input")
    store = open_store(tmp_path / "out/0.input", model.fingerprint())
    store.verify()
    np.testing.assert_array_equal(store.read(range(61)), expected)
    with pytest.raises(ValueError, match=r"does not hold the places of its rows \(it was captured by an earlier"):
        store.places()
    with pytest.raises(ValueError, match="does not hold the tokens of its rows"):
        store.tokens()
    (again,) = capture(model, tokens, POINTS[:1], tmp_path / "out", **SMALL)
    assert again.manifest["format"].endswith("1"), "a complete store is only opened"
    manifest = json.loads((tmp_path / "out/0.input/manifest.json").read_text())
    (tmp_path / "out/0.input/manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    with pytest.raises(ValueError, match="was begun by an earlier version"):
        capture(model, tokens, POINTS[:1], tmp_path / "out", **SMALL)


def test_damage_beside_the_rows_is_noticed(model, tokens, tmp_path):
    (store,) = capture(model, tokens, POINTS[:1], tmp_path / "out", **SMALL)
    path = tmp_path / "out/0.input/00001.places.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckError, match=r"00001\.places\.npy is damaged"):
        store.verify()
    np.save(path, np.zeros((3, 2), np.int32))
    with pytest.raises(CheckError, match="says of"):
        store.places()
    np.save(path, np.zeros((3, 2)))
    with pytest.raises(CheckError, match="not what was written"):
        store.places()
    manifest = json.loads((tmp_path / "out/0.input/manifest.json").read_text())
    manifest["shards"][0]["beside"]["places"]["file"] = "../../tokens.npy"
    (tmp_path / "out/0.input/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"tokens\.npy"):
        open_store(tmp_path / "out/0.input")


@needs_stories
def test_the_words_of_a_store_join_to_its_text(tmp_path):
    model = load_model(STORIES / "stories260K.bin")
    (tmp_path / "text.txt").write_text("Once upon a time, there was a little girl named Lily. é\n")
    source = TextFile(tmp_path / "text.txt", load_tokenizer(STORIES / "tok512.bin", model))
    (store,) = capture(model, source, [(0, "input")], tmp_path / "out", length=64)
    words, tokens = store.vocabulary(), store.tokens()[0]
    shown = "".join(words[t] for t in tokens if t != store_module.NO_TOKEN and t > 2)
    assert shown.strip().startswith("Once upon a time, there was a little girl named Lily.")
    store.verify()
