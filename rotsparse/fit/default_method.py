"""The default methods of `find_rotations` and `find_basis`."""

from rotsparse.engine.method import Method
from rotsparse.objectives.measures import GemanMcClure, Measure, TopK
from rotsparse.solvers.anneal import Anneal
from rotsparse.solvers.combine import Each, Then, WithMeasure
from rotsparse.solvers.fixed_point_newton import FixedPointNewton
from rotsparse.solvers.hinted import Hinted
from rotsparse.solvers.power_method import PowerMethod
from rotsparse.solvers.refine import Refine

STEPS = 4000

# Rows of activations in a step. An example here is one row, not a matrix, so a gradient of the same quality needs more
# of them.
ROWS = 256


def default_method(*, steps: int = STEPS, batch_size: int = 16) -> Method:
    """The default for layers: annealing on minibatches (more `steps` find better optima), then pair searches for as
    long as they pay; and annealing at small angles from the bases in which the layer's weights are sparse, which
    `find_rotations` knows. `Refine` is skipped for layers larger than 256×256, tied fits, and measures that are not
    elementwise.
    """
    polish = Anneal(steps=-(-steps // 4), angle=0.1, batch_size=batch_size)
    near = Anneal(steps=-(-steps // 2), angle=0.1, batch_size=batch_size)
    return Hinted(Then(Anneal(steps=steps, batch_size=batch_size), Refine(polish)), near)


def default_basis_method(measure: Measure, *, steps: int = STEPS, batch_size: int = ROWS) -> Method:
    """The default for activations.

    With `TopK`: anneal on a smooth measure, which has a gradient for every coordinate; anneal each start separately on
    `TopK` at small angles; then run the power method. With other measures: anneal, then run `FixedPointNewton`. If
    there is one sharp basis, `FixedPointNewton` finds it from any start; if there are many good optima, annealing
    avoids the poor ones. Which case applies is not known beforehand, so both run.
    """
    if isinstance(measure, TopK):
        return Then(
            WithMeasure(GemanMcClure(0.6), Anneal(steps=-(-steps // 2), batch_size=batch_size)),
            Each(Anneal(steps=max(1, steps // 2), angle=0.1, batch_size=batch_size)),
            PowerMethod(),
        )
    return Then(Anneal(steps=steps, batch_size=batch_size), FixedPointNewton(random_starts=1))
