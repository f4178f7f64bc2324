"""Claim: objective and relative gradient of a wide MLP block run at most of the machine's matrix-product rate, and many
times faster than vmapped `jax.jacrev` with autodiff through it.

Everything is timed in this one process, in turn. Work is counted as what the closed form needs,
`2·n·(d_out·h·d_in + d_out²·d_in + d_out·d_in²)` flops; the matrix-product rate is that of the same three products
with nothing between them (and of one large square product, for reference).
"""

import dataclasses
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from _results import Results, start
from rich.console import Console
from rich.table import Table

import rotsparse as rs
from rotsparse._core.orthogonal import haar, skew
from rotsparse.objectives import JacobianSparsity


@dataclasses.dataclass
class Config:
    """Objective and gradient against autodiff and against the matrix-product rate."""

    quick: bool = False
    """Only the smallest shape, and fewer repeats."""
    examples: int = 64
    """Examples for the closed form; autodiff gets 32 of them."""
    out: Path | None = None
    """A JSON file for the figures."""


@dataclasses.dataclass(frozen=True)
class Shape:
    d: int
    hidden: int
    gated: bool

    @property
    def name(self) -> str:
        return f"d={self.d}, hidden={self.hidden}{', gated' if self.gated else ''}"


SHAPES = [Shape(256, 1024, False), Shape(384, 1536, False), Shape(768, 3072, False), Shape(2048, 8192, True)]
GPU_SHAPES = [*SHAPES[2:], Shape(4096, 14336, True)]


def main(config: Config) -> None:
    results = Results(config)
    shapes = GPU_SHAPES if jax.default_backend() != "cpu" else SHAPES
    shapes = shapes[:1] if config.quick else shapes
    table = Table(title=f"objective and gradient on {jax.devices()[0].device_kind} ({jax.local_device_count()} device)")
    for heading in (
        "layer",
        "examples/s",
        "GF/s",
        "same products GF/s",
        "square product GF/s",
        "share",
        "÷ autodiff",
        "÷ factored autodiff",
    ):
        table.add_column(heading, justify="right")
    figures = []
    for shape in shapes:
        result = measure(
            shape, config.examples if shape.d < 1000 else max(8, config.examples // 8), 3 if config.quick else 5
        )
        figures.append(result)
        table.add_row(
            shape.name,
            f"{result['examples_per_second']:.1f}",
            f"{result['gflops']:.0f}",
            f"{result['products_gflops']:.0f}",
            f"{result['square_gflops']:.0f}",
            f"{result['share_of_products']:.0%}",
            f"{result['speedup_over_autodiff']:.1f}×",
            f"{result['speedup_over_factored_autodiff']:.1f}×",
        )
    Console().print(table)
    results.write(figures)


def measure(shape: Shape, n: int, repeats: int) -> dict:
    rng = np.random.default_rng(0)
    layer, x = make_layer(rng, shape), rng.standard_normal((n, shape.d)).astype(np.float32)
    objective = JacobianSparsity(layer, x, rs.Log(0.1))
    bases = {"in": haar(jax.random.key(0), shape.d), "out": haar(jax.random.key(1), shape.d)}

    closed = jax.jit(lambda bases: objective.value_and_grad(bases))
    few = jnp.asarray(x[:32])
    auto = jax.jit(lambda bases: autodiff(layer, few, objective, bases))
    better = jax.jit(lambda bases: factored(layer, few, objective, bases))
    d, h = shape.d, shape.hidden
    chunk = min(n, objective.chunk)
    a, gated, z = jnp.ones((d, h)), jnp.ones((h, chunk * d)), jnp.ones((d, chunk * d))
    products = jax.jit(lambda a, gated, z: ((a @ gated)[:1], z @ z.T, z.T.reshape(d, -1) @ z.T.reshape(d, -1).T))
    square = jax.jit(lambda a: a @ a)
    big = jnp.ones((4096 if shape.d > 1000 else 2048,) * 2)

    times = {name: [] for name in ("closed", "auto", "better", "products", "square")}
    for i in range(repeats + 1):
        for name, run in {
            "closed": lambda: closed(bases),
            "auto": lambda: auto(bases),
            "better": lambda: better(bases),
            "products": lambda: products(a, gated, z),
            "square": lambda: square(big),
        }.items():
            begun = time.perf_counter()
            jax.block_until_ready(run())
            if i > 0:  # the first round compiles
                times[name].append(time.perf_counter() - begun)
    seconds = {name: float(np.median(t)) for name, t in times.items()}
    flops = 2 * (d * h * d + 2 * d**3)
    gflops = n * flops / seconds["closed"] / 1e9
    products_gflops = chunk * flops / seconds["products"] / 1e9
    return {
        "shape": dataclasses.asdict(shape),
        "examples": n,
        "examples_per_second": n / seconds["closed"],
        "gflops": gflops,
        "products_gflops": products_gflops,
        "square_gflops": 2 * len(big) ** 3 / seconds["square"] / 1e9,
        "share_of_products": gflops / products_gflops,
        "speedup_over_autodiff": (seconds["auto"] / len(few)) / (seconds["closed"] / n),
        "speedup_over_factored_autodiff": (seconds["better"] / len(few)) / (seconds["closed"] / n),
    }


def autodiff(layer, x, objective, bases):
    """The same value and relative gradient as one would first write it: `jacrev` of the rotated layer, vmapped over the
    examples, and reverse-mode autodiff through all of it."""

    def value(bases):
        rotated = lambda z: bases["out"] @ layer(bases["in"].T @ z)  # noqa: E731
        return spread(jax.vmap(jax.jacrev(rotated))(x @ bases["in"].T), objective, bases)

    return relative(value, bases)


def factored(layer, x, objective, bases):
    """A better use of autodiff: the Jacobian does not depend on the rotations, so only the rotating is
    differentiated."""

    def value(bases):
        j = jax.vmap(jax.jacrev(layer))(x)
        return spread(jnp.einsum("po,noi,ji->npj", bases["out"], j, bases["in"]), objective, bases)

    return relative(value, bases)


def spread(z, objective, bases):
    z = z * jnp.sqrt(jnp.einsum("ij,jk,ik->i", bases["in"], objective.covariance, bases["in"]))
    return jnp.mean(objective.measure(z / jnp.sqrt(jnp.mean(z**2))))


def relative(value, bases):
    value, grads = jax.value_and_grad(value)(bases)
    return value, {name: skew(g @ bases[name].T) for name, g in grads.items()}


def make_layer(rng, shape: Shape) -> rs.Layer:
    weights = lambda out, into: (rng.standard_normal((out, into)) / into**0.5).astype(np.float32)  # noqa: E731
    up, down = weights(shape.hidden, shape.d), weights(shape.d, shape.hidden)
    if shape.gated:
        return rs.GatedMLP(weights(shape.hidden, shape.d), up, down)
    return rs.MLP(up, None, down, None, activation="gelu")


if __name__ == "__main__":
    start(main, Config)
