"""Claim: on real trained layers the default of `find_rotations` reaches a lower objective than full-batch Riemannian
Adam, conjugate gradients, L-BFGS and every baseline, from every start; on thousands of examples also in less time than
Adam, on few of them not. From a random start it finds most of the ReLU neurons, the one truth that is known about such
a layer.

`Log(eps=0.1)`. Every method starts from the neurons, from a random rotation, from the SVD of the mean Jacobian and from
PCA, and minimises over the same examples; `held-out` is the same objective on other examples. Times include
compilation. CG and L-BFGS get the time that rotsparse took, Adam an eighth of its steps, each on all examples.
`--figure` draws, and `--out` keeps, the course of every fit: objective against seconds and against evaluations (those
of our methods spread evenly over their steps, after compilation).

`evaluations` are values with gradients on all examples, or as many examples in minibatches; a value alone (in a line
search, or a look at all examples by which steps are chosen) is half of one. What the pair searches and polishes at the
end of rotsparse's fits evaluate is not among them, because no solution tells it: only the seconds have it.

`--starts` compares starts instead: the first look at each, a fit from there (`--start-steps`, 4,000, at angle 0.4 from
the neurons, half of them at 0.1 from the others, at 0.2 from the hybrid), and the default, which looks at the neurons,
the singular vectors of the mean Jacobian and the sparse basis of the weights. `hybrid`: the most active neurons get
their own SVD, the others stay neurons and go on by Gram-Schmidt, most active first; as many get it as give the lowest
objective. It needs a single layer, and the default does not use it. On the digits networks of four seeds, or those of
`--only`.

Layers: the second one of the digits network and of the MNIST network (on 150 and on 4000 examples), raw; the MLP with
its skip of a modular-addition transformer and the first MLPs of stories260K and of MiniLM, with scaled inputs. Those
whose files are not there (`--data`, `--minilm`) are skipped, visibly.
"""

import dataclasses
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _networks import Case, Missing, cases
from _results import Results, start
from _starts import compare_starts, show_starts, started
from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize as scipy_minimize

import rotsparse as rs
from rotsparse._core.files import PNG, writing
from rotsparse._core.orthogonal import retract_cayley, skew
from rotsparse.objectives import JacobianSparsity

ROOT = Path(__file__).resolve().parents[1]

LAYERS = {
    "digits, layer 2 (raw)": (1437,),
    "MNIST, hidden 1 → hidden 2 (raw)": (150, 4000),
    "modular addition 0, MLP and skip": (512,),
    "stories260K, MLP 0": (512,),
    "MiniLM, MLP 0": (64,),
}
"""Names of networks, and how many examples to fit on."""

WIDE = 256
"""Layers with more inputs take an eighth of the steps."""

VALUE = 0.5
"""Evaluations that a value without its gradient is worth."""


@dataclasses.dataclass
class Config:
    """The default method against peers on real trained layers."""

    quick: bool = False
    """Digits only, two starts, fewer steps."""
    data: Path = ROOT.parent / "shared" / "data"
    """The folder with mnist, mlp_mnist, modular_addition, stories260k and text."""
    minilm: Path = ROOT.parent / "shared" / "data" / "minilm"
    """A Hugging Face folder of all-MiniLM-L6-v2."""
    starts: bool = False
    """Compare starts, not methods."""
    start_steps: int = 4000
    """Steps from the neurons, with `--starts`; half of them from the other starts."""
    only: tuple[str, ...] = ()
    """Networks whose names begin like one of these."""
    steps: int = 8000
    """Steps of the default method, from the given start and from a random one; full-batch Adam takes an eighth."""
    out: Path | None = None
    """A JSON file for the figures."""
    figure: Path | None = None
    """A PNG file for the courses."""


def main(config: Config) -> None:
    results, found = Results(config), []
    if config.starts:
        for name, case in started(config.data, config.only, quick=config.quick):
            rows = compare_starts(case, 200 if config.quick else config.start_steps)
            show_starts(name, rows)
            found += [{"layer": name, **row} for row in rows]
            results.write(found)
        return
    for name, case, examples in layers(config):
        rows = compare(case, examples, config)
        show(f"{name}, {examples} examples", rows)
        found += [{"layer": name, "examples": examples, **row} for row in rows]
        results.write(found)  # after each: later ones take long
        if config.figure:
            draw(config.figure, found)


def layers(config: Config) -> Iterator[tuple[str, Case, int]]:
    known = dict(cases(config.data, config.minilm))
    for name, sizes in list(LAYERS.items())[: 1 if config.quick else None]:
        if config.only and not name.startswith(config.only):
            continue
        try:
            case = known[name]()
        except Missing as missing:
            Console().print(f"skipped: {name} ({missing})")
            continue
        for examples in sizes:
            yield name, case, examples


def compare(case: Case, examples: int, config: Config) -> list[dict]:
    layer, train, test = case.layer, case.train[:examples], case.test[:1000]
    if layer.d_in > WIDE:
        test = test[:64]
    measure, key, scale = rs.Log(0.1), jax.random.key(0), case.options.get("scale_inputs", True)
    objective, held_out = (JacobianSparsity(layer, x, measure, scale_inputs=scale) for x in (train, test))
    starts = {
        "neurons": rs.Rotations.identity(layer.d_in, layer.d_out),
        "haar": rs.Rotations.haar(key, layer.d_in, layer.d_out),
        "svd": rs.baselines.svd_mean_jacobian(layer, train),
        "pca": rs.baselines.pca(layer, train),
    }
    starts = dict(itertools.islice(starts.items(), 2 if config.quick else None))
    steps = config.steps // (5 if config.quick else 8 if layer.d_in > WIDE else 1)
    rows = []
    for start_name, given in starts.items():
        bases = {"in": jnp.asarray(given.r_in), "out": jnp.asarray(given.r_out)}

        def add(method, found, course, name=start_name):
            rows.append(row(method, name, found, course, objective, held_out))

        add("start", bases, Course())
        options: dict[str, Any] = {"measure": measure, "scale_inputs": scale, "key": key, "start": given}
        batch = min(16, examples)
        ours = rs.default_method(steps=steps, batch_size=batch)
        adam = rs.Riemannian(optax.adam(0.2), steps=steps // 8, max_step=0.4)
        budget = 0.0
        fits: list[tuple[str, float, dict[str, Any]]] = [
            ("rotsparse", batch / examples, {"method": ours, "restarts": 2}),
            ("Riemannian Adam", 1, {"method": adam}),
        ]
        for method, share, settings in fits:
            begun = time.perf_counter()
            fit = rs.find_rotations(layer, train, **options, **settings).completed()
            seconds = time.perf_counter() - begun
            budget = budget or seconds
            add(method, fit.bases, course_of(fit, seconds, share))
        for method, peer in {"pymanopt CG": conjugate_gradients, "L-BFGS": lbfgs}.items():
            course = Course()
            add(method, peer(objective, bases, budget, course), course)
    return rows


class Course:
    """The objective after so many seconds and evaluations since this was made."""

    def __init__(self):
        self.begun = time.perf_counter()
        self.seconds, self.evaluations, self.objective = [0.0], [0.0], [np.nan]

    def add(self, value: float, evaluations: float = 1) -> None:
        """What one more evaluation found."""
        self.seconds.append(time.perf_counter() - self.begun)
        self.evaluations.append(self.evaluations[-1] + evaluations)
        self.objective.append(value)

    def running_minimum(self) -> dict[str, list[float]]:
        best = np.fmin.accumulate(self.objective)
        keep = np.unique(np.linspace(0, len(best) - 1, 200).astype(int))  # enough for a curve
        return {
            "seconds": np.array(self.seconds)[keep].tolist(),
            "evaluations": np.array(self.evaluations)[keep].tolist(),
            "objective": best[keep].tolist(),
        }


def course_of(fit: rs.Solution, seconds: float, share: float) -> Course:
    """`share`: of all examples, what a step of one restart looks at. Every restart takes the steps and the looks at the
    objective of all examples; pair searches come after the last of them."""
    course, at, restarts = Course(), fit.history.checked_at, len(fit.candidates)
    compiling, annealed = fit.stats["compile_seconds"], fit.stats["seconds"]
    course.seconds = [*(compiling + (annealed - compiling) * at / at[-1]), seconds]
    looks = np.arange(1, len(at) + 1)
    evaluations = restarts * (share * at + VALUE * looks)
    course.evaluations = [*evaluations, evaluations[-1] + 1]
    course.objective = [*fit.history.checked.min(axis=0), fit.value]
    return course


@eqx.filter_jit
def value_of(objective, bases):
    return objective.value(bases)


@eqx.filter_jit
def evaluate(objective, bases):
    """Value and ordinary (Euclidean) gradients `∂F/∂R = Γ R`, tangent to the group."""
    value, grads = objective.value_and_grad(bases)
    return value, {name: g @ bases[name] for name, g in grads.items()}


def conjugate_gradients(objective, bases, budget, course):
    """pymanopt's conjugate gradients on O(d_in) × O(d_out)."""
    import pymanopt
    from pymanopt.manifolds import Product, Stiefel
    from pymanopt.optimizers import ConjugateGradient

    manifold = Product([Stiefel(len(bases[name]), len(bases[name])) for name in ("in", "out")])

    @pymanopt.function.numpy(manifold)
    def cost(r_in, r_out):
        value = float(value_of(objective, to_bases(r_in, r_out)))
        course.add(value, VALUE)
        return value

    @pymanopt.function.numpy(manifold)
    def gradient(r_in, r_out):
        value, grads = evaluate(objective, to_bases(r_in, r_out))
        course.add(float(value))
        return [np.asarray(grads["in"], np.float64), np.asarray(grads["out"], np.float64)]

    problem = pymanopt.Problem(manifold, cost, euclidean_gradient=gradient)
    solver = ConjugateGradient(verbosity=0, max_time=budget, max_iterations=100_000, min_step_size=1e-12)
    start = [np.asarray(bases[name], np.float64) for name in ("in", "out")]
    return to_bases(*solver.run(problem, initial_point=start).point)


def lbfgs(objective, bases, budget, course):
    """SciPy's L-BFGS over skew matrices through the Cayley transform at the start."""
    sizes = {name: np.triu_indices(len(r), 1) for name, r in bases.items()}
    split = len(sizes["in"][0])

    def rotations(v):
        parts = {"in": v[:split], "out": v[split:]}
        return {n: retract_cayley(r, skewed(parts[n], sizes[n], len(r))) for n, r in bases.items()}

    @jax.jit
    def value_and_grad(v):
        current, pull = jax.vjp(rotations, v)
        value, grads = objective.value_and_grad(current)
        return value, pull({name: g @ current[name] for name, g in grads.items()})[0]

    def stop(_):
        if course.seconds[-1] > budget:
            raise StopIteration

    def function(v):
        value, grad = value_and_grad(jnp.asarray(v, jnp.float32))
        course.add(float(value))
        return float(value), np.asarray(grad, np.float64)

    zero = np.zeros(split + len(sizes["out"][0]))
    options = {"maxiter": 100_000, "maxfun": 1_000_000, "maxcor": 20}
    found = scipy_minimize(function, zero, jac=True, method="L-BFGS-B", callback=stop, options=options)
    return rotations(jnp.asarray(found.x, jnp.float32))


def skewed(v, upper, d):
    return 2 * skew(jnp.zeros((d, d), v.dtype).at[upper].set(v))


def to_bases(r_in, r_out):
    return {"in": jnp.asarray(r_in, jnp.float32), "out": jnp.asarray(r_out, jnp.float32)}


def row(method, start, bases, course, objective, held_out) -> dict:
    neurons = np.sum(np.max(np.abs(np.asarray(bases["out"])), axis=1) > 0.99)
    return {
        "method": method,
        "start": start,
        "seconds": course.seconds[-1],
        "evaluations": round(course.evaluations[-1]),
        "neurons": int(neurons),
        "train": float(evaluate(objective, bases)[0]),
        "held_out": float(evaluate(held_out, bases)[0]),
        "course": course.running_minimum(),
    }


def show(name: str, rows: list[dict]) -> None:
    table = Table(title=f"{name}: objective log(1 + z²/0.1²)")
    for heading in ("start", "method", "train", "held-out", "seconds", "evaluations", "outputs that are neurons"):
        table.add_column(heading, justify="left" if heading in ("start", "method") else "right")
    for r in rows:
        table.add_row(
            r["start"],
            r["method"],
            f"{r['train']:.4f}",
            f"{r['held_out']:.4f}",
            f"{r['seconds']:.1f}",
            str(r["evaluations"]),
            str(r["neurons"]),
            end_section=r["method"] == "L-BFGS",
        )
    Console(width=110).print(table)
    ours = [r["train"] for r in rows if r["method"] == "rotsparse"]
    Console().print(
        f"rotsparse over the starts: {min(ours):.4f} to {max(ours):.4f} ({max(ours) / min(ours) - 1:.2%} apart)\n"
    )


COLOURS = {"rotsparse": "#d95f02", "Riemannian Adam": "#222222", "pymanopt CG": "#0072b2", "L-BFGS": "#999999"}


def draw(path: Path, results: list[dict]) -> None:
    """A row a layer: objective against seconds and against evaluations; a line for every start."""
    from matplotlib.figure import Figure

    problems = list(dict.fromkeys((r["layer"], r["examples"]) for r in results))
    figure = Figure(figsize=(9, 2.6 * len(problems)), layout="constrained")
    axes = figure.subplots(len(problems), 2, squeeze=False, sharey="row")
    for (layer, examples), pair in zip(problems, axes, strict=True):
        rows = [r for r in results if (r["layer"], r["examples"]) == (layer, examples)]
        for r in rows:
            if r["method"] in COLOURS:
                label = r["method"] if r["start"] == rows[0]["start"] else None
                for axis, unit in zip(pair, ("seconds", "evaluations"), strict=True):
                    style = {"color": COLOURS[r["method"]], "linewidth": 2 if r["method"] == "rotsparse" else 1}
                    begun = np.array(r["course"][unit]) > 0
                    axis.plot(*(np.array(r["course"][key])[begun] for key in (unit, "objective")), label=label, **style)
        best = min(r["train"] for r in rows)
        pair[0].set(title=f"{layer}, {examples} examples", ylabel="objective", ylim=(0.95 * best, 2.5 * best))
        for axis, unit in zip(
            pair, ("seconds", "evaluations on all examples (pair searches not counted)"), strict=True
        ):
            axis.set(xscale="log", xlabel=unit)
    axes[0, 0].legend(fontsize="small")
    with writing(path) as file:
        figure.savefig(file, format="png", dpi=150, metadata=PNG)


if __name__ == "__main__":
    start(main, Config)
