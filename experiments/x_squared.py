"""The smallest network worth a look: 1-32-32-1, ReLU, trained to compute x². What directions has its middle layer?

Its one input makes every direction of an activation space a function of x that can be drawn. Principal components of
the first hidden layer are orthogonal to each other over the inputs, and that alone makes them wiggle: they look like
the first Legendre polynomials, whatever the network computes. Directions in which the middle layer's Jacobian is sparse
have no such constraint. Several networks are trained, since what one of them does need not be what they do.

`extent` of a direction z(x): the share of the inputs over which it moves, the participation ratio `(E z'²)² / E z'⁴` of
its squared slope. 1 is a straight line; a direction that only moves on one half of the inputs has 0.5 at most.
"""

import dataclasses
from typing import Any

import _common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _verdict import judged
from jaxtyping import Float
from matplotlib.figure import Figure

import rotsparse as rs
from rotsparse.data.moments import covariance
from rotsparse.evaluation.verdict import SHARE

SHOWN = {"pca": "Principal components", "learned": "Learned directions"}
COLOURS = ("#0072b2", "#d55e00", "#009e73")


@dataclasses.dataclass(frozen=True)
class Config(_common.Options):
    """Principal components against learned directions of a network that computes x²."""

    quick: bool = False
    """One network: half a minute."""
    networks: int = 3
    width: int = 32
    training_steps: int = 5000
    points: int = 512
    """Inputs on [-1, 1] to train and to fit on; as many between them are held out."""
    steps: int = 4000
    restarts: int = 4


@dataclasses.dataclass(frozen=True)
class Network:
    """A trained network: its middle layer, that layer's inputs for training and held-out x, and its error on those."""

    layer: rs.Layer
    x: Float[np.ndarray, "m"]
    train: Float[np.ndarray, "n width"]
    test: Float[np.ndarray, "m width"]
    error: float


def train(config: Config, seed: int) -> Network:
    """AdamW on the mean squared error, all points at once."""
    width = config.width
    keys = jax.random.split(jax.random.key(seed), 4)
    params = [
        (jax.random.normal(keys[0], (width, 1)), jax.random.uniform(keys[1], (width,), minval=-1, maxval=1)),
        (jax.random.normal(keys[2], (width, width)) / jnp.sqrt(width / 2), jnp.zeros(width)),
        (jax.random.normal(keys[3], (1, width)) / jnp.sqrt(width), jnp.zeros(1)),
    ]
    optimizer = optax.adamw(optax.cosine_decay_schedule(5e-3, config.training_steps), weight_decay=1e-2)
    points = jnp.linspace(-1, 1, config.points)[:, None]
    between = (points[1:] + points[:-1]) / 2

    def error(params, x):
        return jnp.mean(jnp.square(_run(params, x) - x**2))

    @jax.jit
    def fit(params):
        def step(_, carry):
            params, state = carry
            updates, state = optimizer.update(jax.grad(error)(params, points), state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, config.training_steps, step, (params, optimizer.init(params)))[0]

    params = fit(params)
    first, middle = (rs.Dense(w, b) for w, b in params[:2])
    rmse = float(jnp.sqrt(error(params, between)))
    return Network(middle, np.asarray(between[:, 0]), np.asarray(first(points)), np.asarray(first(between)), rmse)


def _run(params, x):
    for w, b in params[:-1]:
        x = jax.nn.relu(x @ w.T + b)
    w, b = params[-1]
    return x @ w.T + b


def study(network: Network, config: Config, seed: int) -> tuple[dict[str, Any], dict[str, rs.Rotations]]:
    """Fit the middle layer, and compare with every baseline and with its nulls on held-out inputs."""
    key = jax.random.key(seed)
    options = {"restarts": config.restarts, "method": rs.default_method(steps=config.steps), "key": key}
    layer, x = network.layer, network.train
    solution = rs.find_rotations(layer, x, validation=network.test[::2], **options).completed()
    bases = {"learned": solution.rotations} | rs.baselines.all_baselines(layer, x, key=jax.random.fold_in(key, 2))
    test = network.test[1::2]  # those between were chosen on
    comparison = rs.compare(layer, test, bases, covariance=covariance(x)[1], key=jax.random.fold_in(key, 3))
    return {
        "error": network.error,
        **comparison.to_json(),
        **judged(layer, x, test, solution, comparison, key=jax.random.fold_in(key, 1)),
        "extents": {name: extents(network, bases[name]).tolist() for name in SHOWN},
    }, bases


def strongest(network: Network, rotations: rs.Rotations, count: int) -> Float[np.ndarray, "n count"]:
    """The rotated inputs of largest variance as functions of x, of mean 0 and variance 1."""
    z = (network.test - network.test.mean(axis=0)) @ np.asarray(rotations.r_in).T
    z = z[:, np.argsort(-z.std(axis=0))[:count]]
    return z / z.std(axis=0)


def extents(network: Network, rotations: rs.Rotations) -> Float[np.ndarray, "3"]:
    """The extents of the strongest rotated inputs."""
    slope = np.square(np.diff(strongest(network, rotations, len(COLOURS)), axis=0))
    return np.square(slope.mean(axis=0)) / np.square(slope).mean(axis=0)


def figure(networks: list[Network], bases: list[dict[str, rs.Rotations]]) -> Figure:
    """The three strongest directions of each network as functions of x."""
    fig = Figure(figsize=(3.4 * len(networks) + 1, 5.2), dpi=160, layout="constrained")
    axes = fig.subplots(len(SHOWN), len(networks), sharex=True, sharey=True, squeeze=False)
    for row, (name, title) in zip(axes, SHOWN.items(), strict=True):
        for i, (ax, network, of) in enumerate(zip(row, networks, bases, strict=True)):
            for number, (z, colour) in enumerate(zip(strongest(network, of[name], 3).T, COLOURS, strict=True)):
                sign = np.sign(z[np.argmax(np.abs(z))])  # it means nothing: the largest value is drawn upwards
                ax.plot(network.x, sign * z, color=colour, lw=2, label=("strongest", "second", "third")[number])
            _common.style(ax, f"{title}, network {i}")
    for ax in axes[-1]:
        ax.set_xlabel("x")
    for ax in axes[:, 0]:
        ax.set_ylabel("activation (unit variance)")
    _common.legend_beside(axes[0, -1])
    return fig


def report(networks: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = ["# x²", "", "Held-out Jacobians of the middle layer, inputs scaled by their standard deviations.", ""]
    lines += [
        "| network | error | entries < 0.1 rms: learned | PCA | neurons | best baseline | short fit | strictest null |"
    ]
    lines += ["|---:|---:|---:|---:|---:|---|---:|---|"]
    for i, of in enumerate(networks):
        rivals = {name: m[SHARE]["value"] for name, m in of["metrics"].items() if name != "learned"}
        best = max(rivals, key=rivals.__getitem__)
        learned, short, null = map(
            _common.shown, (of["metrics"]["learned"][SHARE], of["short_fit"], of["strictest_null"])
        )
        lines.append(
            f"| {i} | {of['error']:.4f} | {learned} | {rivals['pca']:.3f} | {rivals['neurons']:.3f} | "
            f"{best} {rivals[best]:.3f} | {short} | {of['strictest']} {null} |"
        )
    lines += ["", "Share of the inputs over which the three strongest directions move (1: a straight line):", ""]
    for i, of in enumerate(networks):
        shown = ("; ".join(f"{n} " + ", ".join(f"{e:.2f}" for e in of["extents"][n]) for n in SHOWN)) + "."
        lines.append(f"- network {i}: {shown} {of['verdict']} {of['agreement']}")
    return "\n".join(lines) + "\n"


def main(config: Config) -> None:
    config = dataclasses.replace(config, networks=1) if config.quick else config
    seeds = range(config.seed, config.seed + config.networks)
    with _common.run("x_squared", config) as run:
        networks = [train(config, seed) for seed in seeds]
        studies = [study(network, config, seed) for network, seed in zip(networks, seeds, strict=True)]
        found = [of for of, _ in studies]
        directions = figure(networks, [bases for _, bases in studies])
        run.finish({"networks": found}, report(found), directions=directions)


if __name__ == "__main__":
    _common.start(main, Config)
