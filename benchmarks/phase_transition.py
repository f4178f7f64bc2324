"""Claim: `FixedPointNewton` recovers a planted sparse basis exactly from several times fewer examples than FastICA
needs to come near it.

n = 30 Bernoulli-Gaussian activations with θ from 0.1 to 0.6, and 5 to 160 examples a dimension. A fit counts as a
recovery when its error `1 - ‖R D‖₄⁴/n` is below 1%, which asks for |cos| > 0.995 of a typical direction (`exact`: below
1e-4). rotsparse takes the best objective of eight starts; more starts do nothing for the peers, whose error is
statistical (FastICA from eight starts, the best by its own contrast, is in the table too).
"""

import dataclasses
import warnings
from pathlib import Path

import numpy as np
from _peers import bernoulli_gaussian, error, fastica, l4, orthogonalised, picard, rotsparse
from _results import Results, start
from rich.console import Console
from rich.table import Table

from rotsparse._core.files import PNG, writing

N = 30
THETAS = (0.1, 0.3, 0.5, 0.6)
RATIOS = (5, 7, 10, 14, 20, 28, 40, 57, 80, 113, 160)
RECOVERED, EXACT = 1e-2, 1e-4


@dataclasses.dataclass
class Config:
    """Share of planted bases recovered, by the number of examples."""

    quick: bool = False
    """Two θ, every second ratio, three problems each."""
    seeds: int = 8
    """Problems at each point."""
    out: Path | None = None
    """A JSON file for the errors."""
    figure: Path | None = None
    """A PNG file for the curves."""


def fastica_restarted(y, seed, restarts=8):
    """The FastICA solution with the largest non-Gaussianity of its own kind, `Σ (E log cosh z - E log cosh ν)²`."""
    y = y / np.sqrt(np.mean(y**2))
    gaussian = 0.3745672  # E log cosh of a standard normal variable
    candidates = [orthogonalised(fastica(y, 100 * seed + i)) for i in range(restarts)]
    contrast = lambda r: np.sum((np.mean(np.log(np.cosh(y @ r.T)), axis=0) - gaussian) ** 2)  # noqa: E731
    return max(candidates, key=contrast)


METHODS = {
    "rotsparse": lambda y, seed: rotsparse(y, seed, eps=0.01, starts=8),
    "rotsparse, one start": lambda y, seed: rotsparse(y, seed, eps=0.01),
    "FastICA": fastica,
    "FastICA, best of 8": fastica_restarted,
    "picard": picard,
    "L4 (MSP)": l4,
}


def main(config: Config) -> None:
    warnings.simplefilter("ignore")
    results = Results(config)
    thetas, ratios, seeds = (THETAS, RATIOS, config.seeds)
    if config.quick:
        thetas, ratios, seeds = (0.1, 0.5), RATIOS[::2], 3
    errors = {theta: {name: [] for name in METHODS} for theta in thetas}
    for theta in thetas:
        for ratio in ratios:
            problems = [bernoulli_gaussian(N, N * ratio, theta, seed) for seed in range(seeds)]
            for name, method in METHODS.items():
                errors[theta][name].append([error(method(q.y, seed), q) for seed, q in enumerate(problems)])
        show(theta, ratios, errors[theta])
        done = {theta: of for theta, of in errors.items() if of["rotsparse"]}
        results.write({"ratios": ratios, "errors": done})  # after each: all of them take long
    if config.figure:
        draw(config.figure, thetas, ratios, errors)


def needed(ratios, errors, threshold: float) -> float:
    """The least p/n from which on at least nine of ten problems are recovered, at every larger one too."""
    good = np.mean(np.array(errors) < threshold, axis=1) >= 0.9
    bad = np.flatnonzero(~good)
    first = bad[-1] + 1 if len(bad) else 0
    return ratios[first] if first < len(ratios) else np.inf


def show(theta, ratios, errors) -> None:
    table = Table(title=f"n = {N}, θ = {theta}: share recovered, by examples a dimension")
    table.add_column("method")
    for heading in (*map(str, ratios), "needs", "exact needs"):
        table.add_column(heading, justify="right")
    for name, values in errors.items():
        shares = np.mean(np.array(values) < RECOVERED, axis=1)
        needs = [needed(ratios, values, threshold) for threshold in (RECOVERED, EXACT)]
        cells = [f"{need:.0f}" if np.isfinite(need) else f"> {ratios[-1]}" for need in needs]
        table.add_row(name, *(f"{share:.2f}" for share in shares), *cells)
    Console(width=140).print(table)


# Several of the curves coincide: wide ones lie below, dashed ones on top.
STYLES = {
    "rotsparse": {"color": "#0072b2", "linewidth": 3},
    "rotsparse, one start": {"color": "#56b4e9", "linestyle": "--"},
    "FastICA": {"color": "#d55e00", "linewidth": 4, "alpha": 0.4},
    "FastICA, best of 8": {"color": "#d55e00"},
    "picard": {"color": "black", "linestyle": ":"},
    "L4 (MSP)": {"color": "#999999"},
}


def draw(path: Path, thetas, ratios, errors) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.8 * len(thetas), 3.2), layout="constrained")
    axes = figure.subplots(1, len(thetas), sharey=True, squeeze=False)[0]
    for axis, theta in zip(axes, thetas, strict=True):
        for name, values in errors[theta].items():
            shares = np.mean(np.array(values) < RECOVERED, axis=1)
            axis.semilogx(ratios, shares, label=name, **STYLES[name])
        axis.set(title=f"θ = {theta}", xlabel="examples / dimension", xticks=ratios[::2], xticklabels=ratios[::2])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("share of problems recovered")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(STYLES), frameon=False)
    with writing(path) as file:
        figure.savefig(file, format="png", dpi=150, metadata=PNG)


if __name__ == "__main__":
    start(main, Config)
