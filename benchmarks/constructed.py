"""Claim: `evaluation.verdict` calls at most 2% of layers that are noise structure, and at most 10% of layers with a
planted sparse basis noise, where the planted basis itself passes.

Small layers are made whose truth is known. *Nothing*: random weights, also with uneven neuron norms, of rank 4, with
heavy tails, without a nonlinearity; inputs with heavy tails, copies, outliers; few held-out examples. *Structure*:
weights with two entries a neuron, hidden by rotations of inputs and outputs, with noise added to every entry. Each
layer and three draws of each of its nulls are fitted alike, and every candidate rule decides from the same figures. The
truth of a planted layer is only asked for where its own basis, which no fit has to find, passes the same rule.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from _publish import publish
from _results import Results, described, start
from rich.console import Console
from rich.markdown import Markdown
from scipy.stats import t as student_t

import rotsparse as rs
from rotsparse._core.intervals import Interval
from rotsparse._core.modules import replace_fields
from rotsparse.evaluation.concentration import without_top
from rotsparse.evaluation.control import Control
from rotsparse.evaluation.metrics import NO_INFLUENCE
from rotsparse.evaluation.nulls import draw_nulls
from rotsparse.evaluation.verdict import GAIN, structure
from rotsparse.layers.base import Layer
from rotsparse.objectives.base import sampled

PAGE = Path(__file__).resolve().parents[1] / "docs" / "null.md"
DRAWS = 3
TOGETHER = 32  # fits in one program


@dataclasses.dataclass(frozen=True)
class Config:
    """Rates of false structure and false nothing, on layers whose truth is known."""

    quick: bool = False
    """Two layers of each kind, fewer steps."""
    layers: int = 12
    """Layers of each kind."""
    d: int = 24
    """Inputs and outputs of a block; it has twice as many hidden neurons."""
    steps: int = 500
    """Of annealing, each fit."""
    examples: tuple[int, int] = (300, 200)
    """To fit on and to test on."""
    seed: int = 0
    only: tuple[str, ...] = ()
    """Kinds of layers whose names begin like one of these."""
    out: Path | None = None
    """A JSON file for the figures."""
    publish: bool = False
    """Write the tables into docs/null.md."""


class Problem(NamedTuple):
    """A layer, its inputs, and the rotations that were planted, if any."""

    layer: Layer
    train: np.ndarray
    test: np.ndarray
    oracle: rs.Rotations | None = None


# --- layers whose truth is known


def orthogonal(rng, d: int) -> np.ndarray:
    q, upper = np.linalg.qr(rng.standard_normal((d, d)))
    return q * np.sign(np.diagonal(upper))


def inputs(rng, config: Config, kind: str = "") -> tuple[np.ndarray, np.ndarray]:
    """Correlated Gaussian inputs, or what the kind says of them."""
    d, (fitted, tested) = config.d, config.examples
    n = fitted + tested
    mixing = np.arange(1, d + 1)[:, None] ** -0.25 * orthogonal(rng, d)
    latent = rng.standard_t(2.5, (n, d)) if kind == "heavy-tailed inputs" else rng.standard_normal((n, d))
    x = latent @ mixing
    if kind == "copied inputs":
        x[:, d // 2 :] = x[:, : d - d // 2] + 0.01 * rng.standard_normal((n, d - d // 2))
        x[n // 2 :] = x[: n - n // 2][rng.permutation(n - n // 2)]
        x = x[rng.permutation(n)]
    if kind == "outliers":
        x[rng.permutation(n)[: n // 100]] *= 30
    train, test = x[:fitted], x[fitted:]
    return train.astype(np.float32), test[: 20 if kind == "few held-out rows" else None].astype(np.float32)


def noise_weights(rng, shape: tuple[int, int], kind: str) -> np.ndarray:
    """Weights `[neurons, inputs]` without structure."""
    if kind == "rank 4":
        return rng.standard_normal((shape[0], 4)) @ rng.standard_normal((4, shape[1])) / 2
    w = rng.standard_t(2, shape) if kind == "Student-t weights" else rng.standard_normal(shape)
    return w * np.exp(rng.standard_normal((shape[0], 1))) if kind == "lognormal norms" else w


def sparse_rows(rng, rows: int, d: int) -> np.ndarray:
    """Two entries a row, the first ones so that every column has some."""
    w = np.zeros((rows, d))
    for i in range(rows):
        at = [i % d, (i + 1 + rng.integers(d - 1)) % d]
        w[i, at] = rng.choice([-1, 1], 2) * rng.uniform(0.7, 1.3, 2)
    return w


def block(rng, config: Config, w_in: np.ndarray, w_out: np.ndarray, kind: str, activation: str) -> Layer:
    bias = rng.standard_normal(len(w_in)) - 0.5 if kind == "uneven biases" else None
    size = lambda w: (w / np.sqrt(np.square(w).sum() / len(w))).astype(np.float32)  # noqa: E731
    bias = None if bias is None else bias.astype(np.float32)
    return rs.MLP(size(w_in), bias, size(w_out), None, activation=activation)


def nothing(kind: str, *, single: bool = False, activation: str = "relu") -> Callable[[Any, Config], Problem]:
    def make(rng, config: Config) -> Problem:
        d = config.d
        x = inputs(rng, config, kind)
        if single:
            w = noise_weights(rng, (d, d), kind)
            return Problem(rs.Dense((w / np.sqrt(d)).astype(np.float32), activation=activation), *x)
        w_in, w_out = noise_weights(rng, (2 * d, d), kind), noise_weights(rng, (2 * d, d), kind).T
        return Problem(block(rng, config, w_in, w_out, kind, activation), *x)

    return make


def wired_rows(rng, rows: int, d: int) -> np.ndarray:
    """Neurons in groups: those of a group have weights on the same two directions, and those only."""
    w = np.zeros((rows, d))
    for i in range(rows):
        first = i % (d // 2) * 2
        w[i, first : first + 2] = rng.choice([-1, 1], 2) * rng.uniform(0.7, 1.3, 2)
    return w


def planted(
    noise: float, kind: str = "", *, single: bool = False, wired: bool = False, activation: str = "relu"
) -> Callable[[Any, Config], Problem]:
    """`noise`: standard deviation of what is added to every weight, as a share of the rms of the planted ones. `wired`:
    the neurons that share inputs share outputs."""

    def make(rng, config: Config) -> Problem:
        d = config.d
        r_in, r_out = orthogonal(rng, d), orthogonal(rng, d)
        norms = np.exp(0.5 * rng.standard_normal((2 * d, 1))) if kind == "lognormal norms" else 1
        rows = wired_rows if wired else sparse_rows
        w_in, w_out = (norms * (rows(rng, 2 * d, d) + noise * rng.standard_normal((2 * d, d))) for _ in range(2))
        x = inputs(rng, config, kind)
        if single:
            layer = rs.Dense((w_in @ r_in / np.sqrt(2)).astype(np.float32), activation=activation)
            return Problem(layer, *x, _rotations(r_in, np.eye(2 * d)))
        layer = block(rng, config, w_in @ r_in, r_out.T @ w_out.T, kind, activation)
        return Problem(layer, *x, _rotations(r_in, r_out))

    return make


def _rotations(r_in, r_out) -> rs.Rotations:
    return rs.Rotations(r_in.astype(np.float32), r_out.astype(np.float32))


NOTHING = {
    "block, Gaussian weights": nothing("Gaussian"),
    "block, Gaussian, GELU": nothing("Gaussian", activation="gelu"),
    "block, Gaussian, linear": nothing("Gaussian", activation="identity"),
    "block, lognormal norms": nothing("lognormal norms"),
    "block, rank 4": nothing("rank 4"),
    "block, Student-t weights": nothing("Student-t weights"),
    "block, uneven biases": nothing("uneven biases"),
    "block, heavy-tailed inputs": nothing("heavy-tailed inputs"),
    "block, copied inputs": nothing("copied inputs"),
    "block, outliers": nothing("outliers"),
    "block, few held-out rows": nothing("few held-out rows"),
    "single, Gaussian weights": nothing("Gaussian", single=True),
    "single, lognormal norms": nothing("lognormal norms", single=True),
    "single, rank 4": nothing("rank 4", single=True),
    "single, Student-t weights": nothing("Student-t weights", single=True),
}
STRUCTURE = {
    "block, planted": planted(0),
    "block, planted, noise 0.02": planted(0.02),
    "block, planted, noise 0.05": planted(0.05),
    "block, planted, noise 0.1": planted(0.1),
    "block, planted, GELU": planted(0.02, activation="gelu"),
    "block, planted, uneven norms": planted(0.02, "lognormal norms"),
    "block, planted, uneven biases": planted(0.02, "uneven biases"),
    "block, planted, outliers": planted(0.02, "outliers"),
    "block, planted, few held-out rows": planted(0.02, "few held-out rows"),
    "block, planted and wired, noise 0.02": planted(0.02, wired=True),
    "block, planted and wired, noise 0.1": planted(0.1, wired=True),
    "single, planted": planted(0, single=True),
    "single, planted, noise 0.05": planted(0.05, single=True),
}


# --- fits, many in one program


def fits(layers: list[tuple[Layer, np.ndarray]], steps: int, seed: int) -> list[rs.Rotations]:
    """Rotations for every layer and its inputs, by annealing from the neurons; layers of one shape together."""
    found: list[rs.Rotations | None] = [None] * len(layers)
    shapes: dict[Any, list[int]] = {}
    for i, (layer, x) in enumerate(layers):
        arrays, static = eqx.partition(layer, eqx.is_array_like)
        shape = str((jax.tree.structure(arrays), jax.tree.map(np.shape, arrays), static, x.shape))
        shapes.setdefault(shape, []).append(i)
    for members in shapes.values():
        for begin in range(0, len(members), TOGETHER):
            part = members[begin : begin + TOGETHER]
            missing = TOGETHER - len(part) if len(members) > TOGETHER else 0  # the last part as large as the others
            filled = [layers[i] for i in part] + [layers[part[0]]] * missing
            objectives = [_objective(*of) for of in filled]
            arrays, rest = zip(*(eqx.partition(o, eqx.is_array) for o in objectives), strict=True)
            together = eqx.combine(jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays), rest[0])
            bases = jax.tree.map(np.asarray, _fit(together, jax.random.split(jax.random.key(seed), len(filled)), steps))
            for k, i in enumerate(part):
                found[i] = rs.Rotations(bases["in"][k], bases["out"][k])
    return [r for r in found if r is not None]


def _objective(layer: Layer, x: np.ndarray) -> rs.JacobianSparsity:
    layer = jax.tree.map(jnp.asarray, layer)
    return replace_fields(rs.JacobianSparsity(layer, x, rs.Log(0.1)), layer=layer)  # not gathered: one shape for all


@eqx.filter_jit
@eqx.filter_vmap(in_axes=(eqx.if_array(0), 0, None))
def _fit(objective: rs.JacobianSparsity, key, steps: int):
    method = rs.Anneal(steps=steps)
    bases = {space: jnp.eye(d) for space, d in objective.spaces.items()}

    def body(i, carry):
        bases, state = carry
        batch = sampled(objective, jax.random.fold_in(key, i), method.batch_size)
        bases, state, _ = method.step(batch, bases, state, i)
        return bases, state

    return jax.lax.fori_loop(0, steps, body, (bases, method.init(bases)))[0]


# --- what is measured of a fit: value and standard error of every statistic

EDGES = "edges"
Figures = dict[str, tuple[float, float]]


def figures(layer: Layer, train: np.ndarray, test: np.ndarray, r: rs.Rotations) -> Figures:
    """Shares of entries of held-out Jacobians below 0.1 rms (as the metrics of `rs.evaluate` define them), and the
    share of entries that are no edge at 99%."""
    r_in = np.asarray(r.r_in, np.float64)
    scale = np.sqrt(np.maximum(np.einsum("ij,jk,ik->i", r_in, np.cov(train.T, bias=True), r_in), 0))
    z = np.abs(np.asarray(_jacobian(layer, test, (r_in * scale[:, None]).astype(np.float32), r.r_out)))
    square = np.square(z, dtype=np.float64).mean(axis=0)
    square /= square.mean()
    z = z / np.sqrt(np.square(z, dtype=np.float64).mean())
    kept = np.ix_(*without_top(square))
    rest = z[(slice(None), *kept)]
    units: dict[str, Any] = {
        "global": (z, 1.0),
        "by row": (z, np.sqrt(square.mean(axis=1, keepdims=True))),
        "by column": (z, np.sqrt(square.mean(axis=0, keepdims=True))),
        "without top": (rest, np.sqrt(square[kept].mean())),
    }
    found: Figures = {}
    for name, (entries, rms) in units.items():
        counts = np.broadcast_to(rms > NO_INFLUENCE, entries.shape[1:])
        share = (np.count_nonzero((entries < 0.1 * rms) & counts, axis=(1, 2)) / max(counts.sum(), 1)).astype(float)
        found[name] = (float(share.mean()), float(share.std() / np.sqrt(len(share))))
    cumulative = np.cumsum(np.sort(square.ravel())[::-1])
    found[EDGES] = (1 - (np.searchsorted(cumulative, 0.99 * cumulative[-1]) + 1) / square.size, 0.0)
    return found


@eqx.filter_jit
def _jacobian(layer, x, r_in, r_out):
    return layer.jacobian(jnp.asarray(x), r_in, r_out)


@dataclasses.dataclass(frozen=True)
class Case:
    """Figures of one layer: of its own fit, of the planted basis, of every draw of every null."""

    kind: str
    structure: bool
    learned: Figures
    oracle: Figures | None
    nulls: dict[str, list[Figures]]


def measure(config: Config, progress: Callable[[str], None] = lambda _: None) -> list[Case]:
    """All layers and their nulls, fitted kind by kind."""
    cases = []
    for number, (kind, make) in enumerate({**NOTHING, **STRUCTURE}.items()):
        if config.only and not kind.startswith(config.only):
            continue
        problems, layers = [], []
        for i in range(config.layers):
            problem = make(np.random.default_rng([config.seed, number, i]), config)
            key = jax.random.fold_in(jax.random.key(config.seed), 1000 * number + i)
            of = draw_nulls(problem.layer, problem.train, key=key, draws=DRAWS)
            problems.append((problem, of))
            layers += [problem.layer, *(layer for draws in of.values() for layer in draws)]
        of_layer = [p.train for p, of in problems for _ in range(1 + sum(map(len, of.values())))]
        found = iter(fits(list(zip(layers, of_layer, strict=True)), config.steps, config.seed))
        for problem, of in problems:
            data = problem.train, problem.test
            learned = figures(problem.layer, *data, next(found))
            drawn = {name: [figures(layer, *data, next(found)) for layer in draws] for name, draws in of.items()}
            oracle = None if problem.oracle is None else figures(problem.layer, *data, problem.oracle)
            cases.append(Case(kind, kind in STRUCTURE, learned, oracle, drawn))
        progress(kind)
    return cases


# --- rules


@dataclasses.dataclass(frozen=True)
class Rule:
    """Structure is what beats every one of `nulls` by every one of `statistics`: above `reach` of their draws, and with
    odds of a small entry larger by the factor `gain`.

    `reach`: "interval", the 95% prediction interval of one more draw in logits, null by null; "pooled", the same with
    the spread of the draws pooled over all nulls, which has more degrees of freedom; "draws", the largest draw.
    """

    statistics: tuple[str, ...]
    nulls: tuple[str, ...]
    reach: str = "interval"
    gain: float = GAIN

    def __call__(self, case: Case, figures: Figures | None = None) -> bool:
        of = [name for name in self.nulls if name in case.nulls]
        return all(self._beats(case, s, figures or case.learned, of) for s in self.statistics)

    def _beats(self, case: Case, statistic: str, learned: Figures, of: list[str]) -> bool:
        draws = np.array([[_logit(f[statistic][0]) for f in case.nulls[name]] for name in of])
        means, k = draws.mean(axis=1), draws.shape[1]
        value, error = learned[statistic]
        deviations = draws.std(axis=1, ddof=1)
        freedom = k - 1
        if self.reach == "pooled":
            freedom = len(of) * (k - 1)
            deviations = np.full(len(of), np.sqrt(np.mean(np.square(deviations))))
        bounds = means + student_t.ppf(0.975, freedom) * deviations * np.sqrt(1 + 1 / k)
        if self.reach == "draws":
            bounds = draws.max(axis=1)
        return _logit(value - 1.96 * error) > bounds.max() and _logit(value) > means.max() + np.log(self.gain)


def _logit(share: float) -> float:
    share = min(max(share, 1e-6), 1 - 1e-6)
    return float(np.log(share / (1 - share)))


def verdict(case: Case, figures: Figures | None = None) -> bool:
    """What `evaluation.verdict` says: structure in the learned weights, whichever neuron is wired to which."""

    def metrics(of: Figures) -> dict[str, Interval]:
        names = {"fraction_below_0.1_rms": "global", "small_without_top": "without top"}
        return {
            metric: Interval(value, value - 1.96 * error, value + 1.96 * error)
            for metric, (value, error) in ((m, of[name]) for m, name in names.items())
        }

    drawn = {name: tuple(map(metrics, draws)) for name, draws in case.nulls.items()}
    return structure(Control(metrics(figures or case.learned), drawn)).learned


ONE, MATCHED = ("random weights",), ("random weights", "rates matched", "same spectrum")
WEIGHTS = (*MATCHED, "weights shuffled")
RULES: dict[str, Callable[..., bool]] = {
    "small entries; random weights": Rule(("global",), ONE),
    "small entries; and rates matched, same spectrum": Rule(("global",), MATCHED),
    "small entries; and weights shuffled": Rule(("global",), WEIGHTS),
    "**the verdict**: small entries, also without the top; the same nulls": verdict,
    "the same without weights shuffled": Rule(("global", "without top"), MATCHED),
    "the same, draws of all nulls pooled": Rule(("global", "without top"), WEIGHTS, "pooled"),
    "the same, above the largest draw": Rule(("global", "without top"), WEIGHTS, "draws"),
    "the same, odds larger by 1.1 only": Rule(("global", "without top"), WEIGHTS, gain=1.1),
    "small entries row by row": Rule(("by row",), WEIGHTS),
    "edges@99": Rule((EDGES,), WEIGHTS),
    "small entries; neurons re-paired, too": Rule(("global",), (*WEIGHTS, "neurons re-paired")),
}


def rules_table(cases: list[Case]) -> str:
    """Rates of both errors, rule by rule, in Markdown."""
    noise, planted = ([case for case in cases if case.structure == truth] for truth in (False, True))
    lines = ["| rule | false structure | false nothing | planted layers found |", "|---|---:|---:|---:|"]
    for name, rule in RULES.items():
        false = sum(map(rule, noise))
        shown = [case for case in planted if rule(case, case.oracle)]
        missed = sum(not rule(case) for case in shown)
        cells = (_share(false, len(noise)), _share(missed, len(shown)), _share(sum(map(rule, planted)), len(planted)))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def kinds_table(cases: list[Case]) -> str:
    """The verdict, kind by kind, in Markdown."""
    lines = [
        "| layers | small entries | strictest null | called structure | planted basis passes |",
        "|---|---:|---:|---:|---:|",
    ]
    for kind in dict.fromkeys(case.kind for case in cases):
        of = [case for case in cases if case.kind == kind]
        small = lambda figures: np.mean([f["global"][0] for f in figures])  # noqa: E731
        nulls = {name: small([f for case in of for f in case.nulls[name]]) for name in WEIGHTS}
        strictest = max(nulls, key=lambda name: nulls[name])
        passes = sum(verdict(case, case.oracle) for case in of) if of[0].structure else "–"
        lines.append(
            f"| {kind} | {small([case.learned for case in of]):.3f} | {nulls[strictest]:.3f} ({strictest}) | "
            f"{sum(map(verdict, of))} of {len(of)} | {passes} |"
        )
    return "\n".join(lines)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%} ({part} of {whole})" if whole else "–"


def main(config: Config) -> None:
    console, results = Console(), Results(config)
    if config.publish:
        PAGE.read_text(encoding="utf-8")  # before anything is computed
    config = dataclasses.replace(config, layers=2, steps=100) if config.quick else config
    cases = measure(config, lambda kind: console.print(kind, highlight=False))
    results.write([dataclasses.asdict(case) for case in cases])
    text = f"{rules_table(cases)}\n\n{kinds_table(cases)}\n\n({results.form} form; {described([results.provenance])})\n"
    console.print(Markdown(text))
    if config.publish:
        publish(PAGE, "constructed", text)


if __name__ == "__main__":
    start(main, Config)
