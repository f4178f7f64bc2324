"""The methods that `find_rotations` and `find_basis` take unless told otherwise, written down."""

from rotsparse.engine.method import Method
from rotsparse.objectives.measures import GemanMcClure, Measure, TopK
from rotsparse.solvers.anneal import Anneal
from rotsparse.solvers.combine import Each, Then, WithMeasure
from rotsparse.solvers.fixed_point_newton import FixedPointNewton
from rotsparse.solvers.power_method import PowerMethod
from rotsparse.solvers.refine import Refine

STEPS = 4000

# Rows of activations a step. An example is one row there, not a matrix: more are needed for a gradient of the same
# quality.
ROWS = 256


def default_method(*, steps: int = STEPS, batch_size: int = 16) -> Method:
    """Annealing on minibatches (more `steps` find better optima), followed by searches over pairs of directions for as
    long as they pay. `Refine` skips itself for layers of more than 256×256, tied fits and measures that are not
    elementwise."""
    polish = Anneal(steps=-(-steps // 4), angle=0.1, batch_size=batch_size)
    return Then(Anneal(steps=steps, batch_size=batch_size), Refine(polish))


def default_basis_method(measure: Measure, *, steps: int = STEPS, batch_size: int = ROWS) -> Method:
    """For activations. With `TopK`, annealing on a smooth measure, whose gradient every coordinate feels, then, every
    start by itself, at small angles on `TopK`, then the power method. With other measures, annealing, then
    `FixedPointNewton`: where there is one sharp basis that finds it from anywhere, and where good optima are many
    annealing escapes the poor ones. Nobody knows beforehand which case it is."""
    if isinstance(measure, TopK):
        return Then(
            WithMeasure(GemanMcClure(0.6), Anneal(steps=-(-steps // 2), batch_size=batch_size)),
            Each(Anneal(steps=max(1, steps // 2), angle=0.1, batch_size=batch_size)),
            PowerMethod(),
        )
    return Then(Anneal(steps=steps, batch_size=batch_size), FixedPointNewton(random_starts=1))
