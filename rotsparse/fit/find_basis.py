"""`find_basis`: a rotation in which a space's activations are sparse."""

import os

import jax.numpy as jnp
from jaxtyping import Float, PRNGKeyArray

from rotsparse._core import checks
from rotsparse._core.types import Data
from rotsparse.data.sources import whole
from rotsparse.engine.method import Method
from rotsparse.engine.run import Run
from rotsparse.engine.solution import Solution
from rotsparse.fit.default_method import default_basis_method
from rotsparse.fit.minimize import minimize
from rotsparse.objectives.activation import ActivationSparsity
from rotsparse.objectives.measures import Measure, TopK

SPACE = "x"


def find_basis(
    x: Float[Data, "n d"],
    *,
    key: PRNGKeyArray,
    measure: Measure = TopK(0.5),  # noqa: B008 (immutable)
    method: Method | None = None,
    restarts: int = 1,
    validation: Float[Data, "m d"] | None = None,
    start: Float[Data, "d d"] | None = None,
    run: Run | str | os.PathLike | None = None,
) -> Solution:
    """The rotation R, `solution.bases["x"]`, that makes activations sparse: minimises `E_x mean_i S(z_i)`,
    `z = R x / rms(x)`.

    - `x`: activations, `[n, d]`: a layer's inputs, or `layer(x)` for its outputs. Not centred: to skip a coordinate is
      to set it to zero.
    - `measure`: the default is the share of the energy that is lost when each example keeps the larger half of its
      coordinates, which is what a matrix product that skips the others loses; `TopK(0.3)` keeps 30%. To find out which
      directions there *are*, take a sharp measure that is not told how many, such as `Log(0.1)`.
    - `method`: how it is minimised (default: `default_basis_method(measure)`).
    - `restarts`: independent starts. `start`: where the first begins (default: the neurons); the others begin at
      Haar-random rotations. `validation`: held-out activations; when given, the best step, restart and stage are
      chosen on them.
    - `run`: where checkpoints and the log go, progress, devices (see `Run`); a folder stands for `Run(folder)`.

    The returned objective (on `validation`, if given) never exceeds the start's; `solution.stages` says what each stage
    reached. Same key and inputs, same bits on the same machine. Raises `ValueError` for activations that are not finite
    floats `[n, d]` or no array, and a start or validation data that do not fit them.
    """
    objective = ActivationSparsity(whole("x", x), measure, space=SPACE)
    d, dtype = objective.x.shape[1], objective.x.dtype
    first = jnp.eye(d, dtype=dtype) if start is None else jnp.asarray(checks.orthogonal("start", start, d), dtype)
    held_out = None if validation is None else objective.on(checks.activations("validation", validation, d))
    return minimize(
        objective,
        {SPACE: first},
        method=method or default_basis_method(measure),
        key=key,
        restarts=restarts,
        validation=held_out,
        run=run,
    )
