"""Claim: annealing followed by pair searches reaches the planted objective of two-sided sparse networks, or less, in
every seed, where manifold optimisers get stuck above it.

Planted networks: an MLP block of 2n neurons, each with two inputs and two outputs (normal weights), hidden by two
Haar-random rotations; 512 Gaussian examples; raw Jacobians, Log(0.1). Every method starts at the neuron basis. Warm
times: without compilation, in this process, in turn. `rows` is the share of planted directions that are found at
|cos| > 0.99, on both sides. Peers get the time that rotsparse took, and best of 8 restarts ten times that.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from _results import Results, start
from rich.console import Console
from rich.table import Table

import rotsparse as rs
from rotsparse._core.orthogonal import haar

KEY = jax.random.key(0)


@dataclasses.dataclass
class Config:
    """Recovery of planted rotations of Jacobians against pymanopt, Riemannian Adam and restarts."""

    quick: bool = False
    """Only n = 32, two seeds, without the restarts."""
    sizes: tuple[int, ...] = (32, 64, 128, 256)
    """Widths n."""
    only: tuple[str, ...] = ()
    """Methods; all by default."""
    seeds: int = 3
    """Problems of each activation up to n = 64; above, where one takes many minutes, there is one, without the
    restarts."""
    out: Path | None = None
    """A JSON file for the figures."""


@dataclasses.dataclass(frozen=True)
class Problem:
    objective: rs.JacobianSparsity
    truth: dict

    @property
    def start(self):
        return {space: jnp.eye(d) for space, d in self.objective.spaces.items()}

    def rows(self, bases) -> float:
        found = [np.abs(np.asarray(bases[k]) @ np.asarray(self.truth[k]).T).max(axis=0) > 0.99 for k in self.truth]
        return float(np.mean(found))


def main(config: Config) -> None:
    results, found = Results(config), []
    for n in (32,) if config.quick else config.sizes:
        for activation in ("relu", "gelu"):
            small = n <= 64
            methods = METHODS if small and not config.quick else {k: METHODS[k] for k in METHODS if k != BEST_OF_8}
            methods = {name: methods[name] for name in config.only or methods}
            rows = compare(n, activation, 2 if config.quick else config.seeds if small else 1, methods)
            show(n, activation, rows)
            found += rows
            results.write(found)  # after each: later ones take long


def planted(n: int, activation: str, seed: int) -> Problem:
    rng = np.random.default_rng(seed)
    w_in, w_out = np.zeros((2 * n, n), np.float32), np.zeros((n, 2 * n), np.float32)
    for neuron in range(2 * n):
        w_in[neuron, rng.choice(n, 2, replace=False)] = rng.standard_normal(2)
        w_out[rng.choice(n, 2, replace=False), neuron] = rng.standard_normal(2)
    q_in, q_out = (haar(key, n) for key in jax.random.split(jax.random.key(seed)))
    bias = (0.1 * rng.standard_normal(2 * n)).astype(np.float32)
    layer = rs.MLP(w_in @ q_in, bias, q_out.T @ w_out, activation=activation)
    x = rng.standard_normal((512, n)).astype(np.float32) @ q_in
    objective = rs.JacobianSparsity(layer, x, rs.Log(0.1), scale_inputs=False)
    return Problem(objective, {"in": q_in, "out": q_out})


def compare(n: int, activation: str, seeds: int, methods: dict) -> list[dict]:
    rows = {}
    for seed in range(seeds):
        problem = planted(n, activation, seed)
        value = eqx.filter_jit(problem.objective.value)
        budget = 0.0
        for name, method in methods.items():
            bases, seconds = method(problem, budget)
            budget = seconds if name == "rotsparse" else budget
            row = rows.setdefault(name, {"n": n, "activation": activation, "method": name})
            for key, entry in {"objective": float(value(bases)), "rows": problem.rows(bases), "s": seconds}.items():
                row.setdefault(key, []).append(entry)
            row.setdefault("planted", []).append(float(value(problem.truth)))
    return list(rows.values())


class Compiled(rs.Method):
    """A method that notes how long it compiled."""

    method: rs.Method
    seconds: list[float] = eqx.field(static=True, default_factory=list)

    def run(self, problem, starts, *, key, run):
        solution = self.method.run(problem, starts, key=key, run=run)
        self.seconds.append(solution.stats["compile_seconds"])
        return solution


def rotsparse(problem: Problem, budget: float):
    """Annealing, then pair searches and polishes in turn for as long as they pay."""
    rs.certify(problem.objective, problem.start)  # compiles
    annealing, polish = (Compiled(rs.Anneal(steps=n, angle=a)) for n, a in ((2000, 0.4), (500, 0.1)))
    begun = time.perf_counter()
    bases = problem.start
    for method in (annealing, rs.Refine(polish)):
        bases = rs.minimize(problem.objective, bases, method=method, key=KEY).completed().bases
    return bases, time.perf_counter() - begun - sum(annealing.seconds + polish.seconds)


def from_weights(problem: Problem, budget: float):
    """The default method, which looks at the weights first; as many steps as `rotsparse`."""
    compiled = near, polish = [Compiled(rs.Anneal(steps=n, angle=0.1)) for n in (1000, 500)]
    method = rs.Then(rs.Hinted(rs.Anneal(steps=2000), near), rs.Refine(polish))
    layer, x = problem.objective.layer, problem.objective.x
    begun = time.perf_counter()
    fit = rs.find_rotations(layer, x, key=KEY, scale_inputs=False, method=method).completed()
    return fit.bases, time.perf_counter() - begun - sum(sum(method.seconds) for method in compiled)


def annealing(problem: Problem, budget: float):
    """As many steps as take about as long."""
    return fit(problem, lambda steps: rs.Anneal(steps=steps), budget=budget)


def adam(problem: Problem, budget: float):
    """Riemannian Adam on all examples, bounded steps, cosine decay."""
    return fit(problem, lambda steps: rs.Riemannian(steps=steps), budget=budget)


def adam_of_8(problem: Problem, budget: float):
    """The best of eight Haar-random or neuron starts, vmapped."""
    return fit(problem, lambda steps: rs.Riemannian(steps=steps), budget=10 * budget, restarts=8)


def fit(problem: Problem, method: Callable[[int], rs.Method], *, budget: float, restarts=1):
    """As many steps of a method as take about `budget` seconds."""
    run = lambda steps: rs.minimize(  # noqa: E731
        problem.objective, problem.start, method=method(steps), key=KEY, restarts=restarts
    ).completed()
    seconds = lambda solution: solution.stats["seconds"] - solution.stats["compile_seconds"]  # noqa: E731
    solution = run(max(100, int(100 * budget / seconds(run(100)))))
    return solution.bases, seconds(solution)


def pymanopt(problem: Problem, budget: float):
    """Conjugate gradients on the product of two orthogonal groups, with our value and gradient, jitted."""
    import pymanopt
    from pymanopt.manifolds import Product, Stiefel
    from pymanopt.optimizers import ConjugateGradient

    spaces = problem.objective.spaces
    manifold = Product([Stiefel(d, d) for d in spaces.values()])
    value, gradient = eqx.filter_jit(problem.objective.value), eqx.filter_jit(problem.objective.value_and_grad)
    named = lambda points: {k: jnp.asarray(r, jnp.float32) for k, r in zip(spaces, points, strict=True)}  # noqa: E731

    @pymanopt.function.numpy(manifold)
    def cost(*points):
        return float(value(named(points)))

    @pymanopt.function.numpy(manifold)
    def euclidean_gradient(*points):
        bases = named(points)
        relative = gradient(bases)[1]
        return [np.asarray(relative[k] @ bases[k], np.float64) for k in spaces]

    start = [np.eye(d) for d in spaces.values()]
    for function in (value, gradient):
        function(named(start))  # compiles
    solver = ConjugateGradient(verbosity=0, max_time=budget, max_iterations=10**6, min_gradient_norm=1e-6)
    begun = time.perf_counter()
    point = solver.run(
        pymanopt.Problem(manifold, cost, euclidean_gradient=euclidean_gradient), initial_point=start
    ).point
    return named(point), time.perf_counter() - begun


BEST_OF_8 = "best of 8 Adam"
METHODS = {
    "rotsparse": rotsparse,
    "from the weights": from_weights,
    "annealing only": annealing,
    "Riemannian Adam": adam,
    BEST_OF_8: adam_of_8,
    "pymanopt CG": pymanopt,
}


def show(n: int, activation: str, rows: list[dict]) -> None:
    seeds = len(rows[0]["s"])
    table = Table(title=f"planted, two-sided, n = {n}, {activation}: mean of {seeds} problems")
    for heading in ("method", "objective", "÷ planted", "worst ÷ planted", "rows", "s"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in rows:
        ratio = np.divide(row["objective"], row["planted"])
        table.add_row(
            row["method"],
            f"{np.mean(row['objective']):.4f}",
            f"{np.mean(ratio):.3f}",
            f"{np.max(ratio):.3f}",
            f"{np.mean(row['rows']):.0%}",
            f"{np.mean(row['s']):.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    start(main, Config)
