"""Claim: on real trained layers the default of `find_rotations` reaches a lower objective than full-batch Riemannian
Adam, conjugate gradients, L-BFGS and every baseline, from every start, in less time; and finds the ReLU neurons from
a random start, the one truth that is known about such a layer.

`Log(eps=0.1)`. Every method starts from the neurons, from a random rotation, from the SVD of the mean Jacobian and from
PCA, and minimises over the same examples; `held-out` is the same objective on other examples. Times include
compilation; `evaluations` are values with gradients on all examples, or as many examples in minibatches. The peers get
at least the time that rotsparse took. `--out` also keeps the course of every fit of ours: objective against steps.

Layers: the second one of the digits network and of the MNIST network (on 150 and on 4000 examples), raw; the MLP with
its skip of a modular-addition transformer and the first MLPs of stories260K and of MiniLM, with scaled inputs. Those
whose files are not there (`--data`, `--minilm`) are skipped, visibly.
"""

import dataclasses
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from _networks import Case, Missing, cases
from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize as scipy_minimize

import rotsparse as rs
from rotsparse.objectives import JacobianSparsity
from rotsparse.orthogonal import retract_cayley, skew

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


@dataclasses.dataclass
class Config:
    """The default solver against peers on real trained layers."""

    quick: bool = False
    """Digits only, two starts, fewer steps."""
    data: Path = ROOT.parent / "shared" / "data"
    """The folder with mnist, mlp_mnist, modular_addition, stories260k and text."""
    minilm: Path = ROOT.parent / "shared" / "data" / "minilm"
    """A Hugging Face folder of all-MiniLM-L6-v2."""
    only: tuple[str, ...] = ()
    """Networks whose names begin like one of these."""
    steps: int = 8000
    """Steps of the default solver, from the given start and from a random one; full-batch Adam takes an eighth."""
    out: Path | None = None
    """A JSON file for the figures."""


def main(config: Config) -> None:
    results = []
    for name, case, examples in layers(config):
        rows = compare(case, examples, config)
        show(f"{name}, {examples} examples", rows)
        results += [{"layer": name, "examples": examples, **row} for row in rows]
        if config.out:  # after each: later ones take long
            config.out.write_text(json.dumps(results, indent=2))


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
    for start_name, start in starts.items():
        bases = {"in": jnp.asarray(start.r_in), "out": jnp.asarray(start.r_out)}

        def add(method, seconds, evaluations, found, name=start_name, **more):
            rows.append(row(method, name, seconds, evaluations, found, objective, held_out) | more)

        add("start", 0.0, 0, bases)
        options = {"measure": measure, "scale_inputs": scale, "key": key, "start": start}
        begun = time.perf_counter()
        fit = rs.find_rotations(layer, train, steps=steps, restarts=2, **options)
        budget = time.perf_counter() - begun
        course = {"checked_at": fit.history.checked_at.tolist(), "checked": fit.history.checked.tolist()}
        add("rotsparse", budget, 2 * steps * 16 / examples, fit.bases, course=course)
        begun = time.perf_counter()
        adam = rs.Riemannian(optax.adam(0.2), max_step=0.4)
        found = rs.find_rotations(layer, train, steps=steps // 8, solver=adam, **options).bases
        add("Riemannian Adam", time.perf_counter() - begun, steps // 8, found)
        for name, peer in {"pymanopt CG": conjugate_gradients, "L-BFGS": lbfgs}.items():
            begun = time.perf_counter()
            found, evaluations = peer(objective, bases, budget)
            add(name, time.perf_counter() - begun, evaluations, found)
    return rows


@eqx.filter_jit
def evaluate(objective, bases):
    """Value and ordinary (Euclidean) gradients `∂F/∂R = Γ R`, tangent to the group."""
    value, grads = objective.value_and_grad(bases)
    return value, {name: g @ bases[name] for name, g in grads.items()}


def conjugate_gradients(objective, bases, budget):
    """pymanopt's conjugate gradients on O(d_in) × O(d_out), and how many gradients they took."""
    import pymanopt
    from pymanopt.manifolds import Product, Stiefel
    from pymanopt.optimizers import ConjugateGradient

    manifold = Product([Stiefel(len(bases[name]), len(bases[name])) for name in ("in", "out")])

    @pymanopt.function.numpy(manifold)
    def cost(r_in, r_out):
        return float(evaluate(objective, to_bases(r_in, r_out))[0])

    evaluations = 0

    @pymanopt.function.numpy(manifold)
    def gradient(r_in, r_out):
        nonlocal evaluations
        evaluations += 1
        grads = evaluate(objective, to_bases(r_in, r_out))[1]
        return [np.asarray(grads["in"], np.float64), np.asarray(grads["out"], np.float64)]

    problem = pymanopt.Problem(manifold, cost, euclidean_gradient=gradient)
    solver = ConjugateGradient(verbosity=0, max_time=budget, max_iterations=100_000, min_step_size=1e-12)
    start = [np.asarray(bases[name], np.float64) for name in ("in", "out")]
    return to_bases(*solver.run(problem, initial_point=start).point), evaluations


def lbfgs(objective, bases, budget):
    """SciPy's L-BFGS over skew matrices through the Cayley transform at the start, and how many gradients it took."""
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

    begun = time.perf_counter()

    def stop(_):
        if time.perf_counter() - begun > budget:
            raise StopIteration

    def function(v):
        value, grad = value_and_grad(jnp.asarray(v, jnp.float32))
        return float(value), np.asarray(grad, np.float64)

    zero = np.zeros(split + len(sizes["out"][0]))
    options = {"maxiter": 100_000, "maxfun": 1_000_000, "maxcor": 20}
    found = scipy_minimize(function, zero, jac=True, method="L-BFGS-B", callback=stop, options=options)
    return rotations(jnp.asarray(found.x, jnp.float32)), int(found.nfev)


def skewed(v, upper, d):
    return 2 * skew(jnp.zeros((d, d), v.dtype).at[upper].set(v))


def to_bases(r_in, r_out):
    return {"in": jnp.asarray(r_in, jnp.float32), "out": jnp.asarray(r_out, jnp.float32)}


def row(method, start, seconds, evaluations, bases, objective, held_out) -> dict:
    neurons = np.sum(np.max(np.abs(np.asarray(bases["out"])), axis=1) > 0.99)
    values = {"train": evaluate(objective, bases)[0], "held_out": evaluate(held_out, bases)[0]}
    counts = {"evaluations": round(evaluations), "neurons": int(neurons)}
    return {"method": method, "start": start, "seconds": seconds, **counts, **to_floats(values)}


def to_floats(values):
    return {name: float(value) for name, value in values.items()}


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
    Console().print(table)
    ours = [r["train"] for r in rows if r["method"] == "rotsparse"]
    Console().print(
        f"rotsparse over the starts: {min(ours):.4f} to {max(ours):.4f} ({max(ours) / min(ours) - 1:.2%} apart)\n"
    )


if __name__ == "__main__":
    main(tyro.cli(Config))
