"""A fit that was stopped and continued is the fit that was never stopped: the same bits, for everything that a fit can
be made of."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from rotsparse._core.orthogonal import haar, retract_polar
from rotsparse.data import sources
from rotsparse.engine.log import read_log
from rotsparse.engine.run import Run
from rotsparse.engine.solution import Result
from rotsparse.engine.steps import Stepwise
from rotsparse.fit.chain import fit_chain
from rotsparse.fit.default_method import default_basis_method, default_method
from rotsparse.fit.find_basis import find_basis
from rotsparse.fit.find_rotations import find_rotations
from rotsparse.fit.minimize import minimize
from rotsparse.layers.mlp import Dense
from rotsparse.objectives import ActivationSparsity, WeightedSum
from rotsparse.objectives.measures import Log, TopK
from rotsparse.solvers import (
    Anneal,
    BestOf,
    Each,
    FixedPointNewton,
    PairSearch,
    PowerMethod,
    Riemannian,
    Then,
    WithMeasure,
)
from rotsparse.solvers.fixed_point import FixedPoint, top_k
from rotsparse.solvers.riemannian import geometric

KEY = jax.random.key(3)
D = 5

# Neither a divisor of a chunk nor of the number of steps: checkpoints lie anywhere.
STEPS, EVERY = 50, 7


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    """Every fit here runs three times: keep what XLA compiles."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for values in (options, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # JAX looks at the options once
        if values is options:
            yield


@pytest.fixture
def interrupt(monkeypatch):
    """`interrupt(n)`: from now on, the n-th slice of every stage is the last of its session."""
    from rotsparse.engine._progress import Progress

    def interrupt_after(slices):
        enter = Progress.__enter__

        def begin(self):
            self.left = slices
            return enter(self)

        def update(self, done, **shown):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

        monkeypatch.setattr(Progress, "__enter__", begin)
        monkeypatch.setattr(Progress, "update", update)

    yield interrupt_after


class Wandering(Stepwise):
    """A method of a user's own, with a random state that lives in its keys: steps of random direction."""

    steps: int = eqx.field(static=True, default=STEPS)

    def init(self, bases):
        return {"key": jax.random.key(5), "steps": jnp.zeros((), jnp.int32), "nothing": jnp.zeros((0, 2))}

    def step(self, objective, bases, state, step):
        value, _ = objective.value_and_grad(bases)
        key, now = jax.random.split(state["key"])
        bases = {
            name: retract_polar(r, 0.1 * (draw - draw.T))
            for (name, r) in bases.items()
            for draw in [jax.random.normal(now, r.shape, r.dtype)]
        }
        return bases, {**state, "key": key, "steps": state["steps"] + 1}, value


def problem(n=60, seed=0):
    rng = np.random.default_rng(seed)
    layer = Dense(rng.standard_normal((D, D)).astype(np.float32), activation="gelu")
    return layer, rng.standard_normal((n, D)).astype(np.float32)


def a_fit(**options):
    def fit(**more):
        layer, x = problem()
        return find_rotations(layer, x, key=KEY, **{"method": Anneal(steps=STEPS), **options}, **more)

    return fit


def a_sum(**more):
    _, x = problem()
    terms = [ActivationSparsity(x, Log(0.3)), ActivationSparsity(x[:30], Log(1.0), space="out")]
    start = {"in": haar(KEY, D), "out": haar(KEY, D)}
    return minimize(
        WeightedSum(terms, [1.0, 0.5]), start, key=KEY, method=Anneal(steps=STEPS, batch_size=8), restarts=2, **more
    )


def fixed_point(**more):
    objective = ActivationSparsity(problem()[1], TopK(0.5))
    return minimize(objective, {"in": haar(KEY, D)}, key=KEY, method=FixedPoint(top_k(3), steps=STEPS), **more)


def basis(measure, method):
    return lambda **more: find_basis(problem()[1], key=KEY, measure=measure, method=method, restarts=2, **more)


FITS = {
    "annealing, minibatches, restarts": a_fit(restarts=3),
    "all defaults and held-out data": a_fit(method=default_method(steps=STEPS), validation=problem(seed=1)[1]),
    "adam": a_fit(method=Riemannian(optax.adam(0.1), steps=STEPS, eps=geometric(1.0, 0.1))),
    "momentum, minibatches": a_fit(
        method=Riemannian(optax.sgd(0.1, momentum=0.9), steps=STEPS, batch_size=4), restarts=2
    ),
    "chained transformations, patience": a_fit(
        method=Riemannian(
            optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(0.1, 0, 50))),
            steps=STEPS,
            patience=20,
        )
    ),
    "a method of one's own": a_fit(method=Wandering(), restarts=2),
    "one side held": a_fit(hold=("out",)),
    "tied": a_fit(tie=True),
    "active subspace": a_fit(active_subspace=0.9),
    "a sum of objectives": a_sum,
    "fixed point": fixed_point,
    "pair searches": a_fit(method=Then(Anneal(steps=STEPS), PairSearch(tolerance=0.0))),
    "the best of two, each by itself": a_fit(
        method=BestOf(Each(Anneal(steps=STEPS)), Riemannian(optax.adam(0.1), steps=STEPS)), restarts=2
    ),
    "a basis, all defaults": basis(TopK(0.5), default_basis_method(TopK(0.5), steps=STEPS, batch_size=8)),
    "a basis, a smooth measure first": basis(
        Log(0.3), Then(WithMeasure(Log(1.0), Anneal(steps=STEPS)), Anneal(steps=STEPS), FixedPointNewton())
    ),
    "power method": basis(TopK(0.5), PowerMethod(steps=STEPS)),
}


def same(a, b):
    """The same bits, but for what a clock said."""
    clocks = {"seconds", "compile_seconds", "resumed_at"}
    plain = lambda s: dataclasses.replace(  # noqa: E731
        s,
        stats={k: v for k, v in s.stats.items() if k not in clocks},
        stages=tuple(stage._replace(seconds=0.0) for stage in s.stages),
    )
    a, b = (jax.tree_util.tree_leaves_with_path(dataclasses.asdict(plain(s))) for s in (a, b))
    for (path, u), (other_path, v) in zip(a, b, strict=True):
        assert path == other_path
        is_array = isinstance(u, jax.Array | np.ndarray)
        assert np.asarray(u).tobytes() == np.asarray(v).tobytes() if is_array else u == v, jax.tree_util.keystr(path)


def continued(fit, **more):
    """Call again and again until it is done; the number of sessions it took."""
    for sessions in range(1, 100):
        solution = fit(**more)
        if solution.result is not Result.INTERRUPTED:
            return solution, sessions
    raise AssertionError("it does not end")


FAST = "annealing, minibatches, restarts", "adam", "a method of one's own", "one side held"
FAST += "a sum of objectives", "fixed point", "pair searches", "a basis, all defaults"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in FITS]
)
def test_stopped_and_continued_is_never_stopped(name, tmp_path, interrupt):
    whole = FITS[name]()
    interrupt(3)
    run = Run(tmp_path / "run", every_steps=EVERY, every_minutes=None)
    solution, sessions = continued(FITS[name], run=run)
    assert sessions >= 2
    same(whole, solution)
    logs = [[line["step"] for line in read_log(log.parent)] for log in tmp_path.rglob("log.jsonl")]
    assert logs and all(steps == sorted(set(steps)) for steps in logs)
    assert len(whole.stages) > 1 or logs[0][-1] == whole.stats["steps"]


@pytest.mark.parametrize("joint", [pytest.param(False, marks=pytest.mark.slow), True], ids=["separate", "joint"])
def test_chains(joint, tmp_path, interrupt, monkeypatch):
    layers = [problem(seed=i)[0] for i in range(2)]
    monkeypatch.setattr(sources, "RESIDENT_EXAMPLES", 20)
    x = sources.ArrayRows(problem()[1])  # a source, so what enters the second layer is computed as it is read
    fit = lambda **more: fit_chain(layers, x, key=KEY, joint=joint, method=Anneal(steps=40), restarts=2, **more)  # noqa: E731
    whole = fit()
    interrupt(2)
    solution, sessions = continued(fit, run=tmp_path)
    assert sessions >= 2
    same(whole, solution)


def test_a_fit_that_is_done_is_not_done_again(tmp_path):
    """The last checkpoint is at the end: the next call only reads it."""
    fit = a_fit()
    first = fit(run=tmp_path)
    again = fit(run=tmp_path)
    assert again.stats["resumed_at"] == STEPS
    same(first, again)


def test_a_fit_that_goes_wrong_does_so_again(tmp_path):
    """NaN at step 30: the checkpoints are from before, and continuing ends at the same step."""

    class Breaking(Anneal):
        def step(self, objective, bases, state, step):
            bases, state, value = super().step(objective, bases, state, step)
            return bases, state, jnp.where(step == 30, jnp.nan, value)

    fit = a_fit(method=Breaking(steps=STEPS), restarts=2)
    run = Run(tmp_path, every_steps=EVERY)
    runs = [fit(), fit(run=run), fit(run=run)]
    assert all(fitted.result is Result.NON_FINITE and "step 30" in fitted.detail for fitted in runs)
    same(runs[0], runs[1])
    assert runs[2].stats["resumed_at"] == 28
    same(runs[0], runs[2])
