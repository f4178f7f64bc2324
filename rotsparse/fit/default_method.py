"""The default methods of `find_rotations` and `find_basis`."""

import numpy as np

from rotsparse._core.orthogonal import WIDE
from rotsparse.engine.method import Method
from rotsparse.layers.base import Layer
from rotsparse.layers.jacobians import jacobian_flops
from rotsparse.objectives.activation import ActivationSparsity
from rotsparse.objectives.measures import GemanMcClure, Measure, TopK
from rotsparse.solvers.anneal import Anneal
from rotsparse.solvers.combine import Each, Then, WithMeasure
from rotsparse.solvers.fixed_point_newton import FixedPointNewton
from rotsparse.solvers.hinted import Hinted
from rotsparse.solvers.power_method import PowerMethod
from rotsparse.solvers.refine import Refine

STEPS, EXAMPLES = 4000, 16

# A fit of a wide layer takes about so many floating-point operations, 8 minutes at 170 GFLOP/s, unless these are too
# few for anything: then FEWEST steps. Examples are saved first, because a noisier gradient costs less than a step.
FLOPS, FEWEST, FEWER_EXAMPLES = 8e13, 500, 8

# Rows of activations in a step. An example here is one row, not a matrix, so a gradient of the same quality needs more
# of them.
ROWS = 256

# In wide spaces staying orthogonal costs as much as 2·d rows, fewer save little, and fewer steps do: so many times
# through the data, within these limits.
EPOCHS, WIDE_STEPS = 20, (1000, 4000)


def default_method(layer: Layer | None = None, *, steps: int | None = None, batch_size: int | None = None) -> Method:
    """The default for layers: annealing on minibatches (more `steps` find better optima), and half as many steps at
    small angles from the bases in which the layer's weights are sparse, or from the singular vectors of its mean
    Jacobian where these are clear of all else (`Hinted` says which of the results is kept, and where one of the two is
    enough); then pair searches for as long as they pay. `Refine` is skipped for layers larger than 256×256, tied fits,
    and measures that are not elementwise.

    4000 steps of 16 examples by default; for a `layer` so wide that this would take more than 8·10^13 floating-point
    operations, as many steps of 8 as do not, and at least 500.
    """
    if layer is not None and steps is None and batch_size is None:
        steps, batch_size = _affordable(layer)
    steps, batch_size = STEPS if steps is None else steps, EXAMPLES if batch_size is None else batch_size
    polish = Anneal(steps=-(-steps // 4), angle=0.1, batch_size=batch_size)
    near = Anneal(steps=-(-steps // 2), angle=0.1, batch_size=batch_size)
    return Then(Hinted(Anneal(steps=steps, batch_size=batch_size), near), Refine(polish))


def _affordable(layer: Layer) -> tuple[int, int]:
    """Steps and examples a step."""

    def whole(examples: int) -> float:
        """The flops of a step, with its share of the steps from hints."""
        return 1.5 * (examples * jacobian_flops(layer) + 10.0 * (layer.d_in**3 + layer.d_out**3))

    if STEPS * whole(EXAMPLES) <= FLOPS:
        return STEPS, EXAMPLES
    return int(np.clip(FLOPS / whole(FEWER_EXAMPLES), FEWEST, STEPS)), FEWER_EXAMPLES


def default_basis_method(
    measure: Measure,
    objective: ActivationSparsity | None = None,
    *,
    steps: int | None = None,
    batch_size: int | None = None,
) -> Method:
    """The default for activations.

    With `TopK`: anneal on a smooth measure, which has a gradient for every coordinate; anneal each start separately on
    `TopK` at small angles; then run the power method. With other measures: anneal, then run `FixedPointNewton`. If
    there is one sharp basis, `FixedPointNewton` finds it from any start; if there are many good optima, annealing
    avoids the poor ones. Which case applies is not known beforehand, so both run.

    4000 steps of 256 rows by default. For the `objective` of a space of d ≥ 256 dimensions: steps of `2·d` rows, as
    many as go through the data 20 times, between 1000 and 4000; with `TopK` half of them from an angle of 0.2, and no
    power method, whose steps are polar factors. Of a source, methods that look at all rows in every step are left out.
    """
    wide = False
    if objective is not None and is_wide(objective):
        wide = True
        rows, d = objective.data.total_count, objective.x.shape[1]
        batch_size = 2 * d if batch_size is None else batch_size
        steps = int(np.clip(EPOCHS * rows / batch_size, *WIDE_STEPS)) if steps is None else steps
    steps, batch_size = STEPS if steps is None else steps, ROWS if batch_size is None else batch_size
    streamed = objective is not None and objective.data.source is not None
    if isinstance(measure, TopK):
        hot = Anneal(steps=-(-steps // 2), angle=0.2 if wide else 0.4, batch_size=batch_size)
        cold = Anneal(steps=max(1, steps // 2), angle=0.1, batch_size=batch_size)
        stages = WithMeasure(GemanMcClure(0.6), hot), Each(cold)
        return Then(*stages) if wide or streamed else Then(*stages, PowerMethod())
    anneal = Anneal(steps=steps, batch_size=batch_size)
    return anneal if streamed else Then(anneal, FixedPointNewton(random_starts=1))


def is_wide(objective: ActivationSparsity) -> bool:
    """Whether staying orthogonal costs more than looking at data."""
    return objective.x.shape[1] >= WIDE
