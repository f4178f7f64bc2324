"""`find_basis`: a rotation in which a space's activations are sparse."""

import os

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from rotsparse._core import checks
from rotsparse._core.types import Data, Vectors
from rotsparse.data.sources import Source, in_memory
from rotsparse.engine.method import Method
from rotsparse.engine.run import Run
from rotsparse.engine.solution import Solution
from rotsparse.fit.default_method import default_basis_method, is_wide
from rotsparse.fit.minimize import minimize
from rotsparse.objectives.activation import ActivationSparsity
from rotsparse.objectives.measures import Measure, TopK
from rotsparse.solvers.power_method import principal_components

SPACE = "x"


def find_basis(
    x: Float[Data, "n d"] | Source | Vectors,
    *,
    key: PRNGKeyArray,
    measure: Measure = TopK(0.5),  # noqa: B008 (immutable)
    method: Method | None = None,
    restarts: int = 1,
    validation: Float[Data, "m d"] | Source | Vectors | None = None,
    start: Float[Data, "d d"] | None = None,
    run: Run | str | os.PathLike | None = None,
) -> Solution:
    """Find the rotation R, `solution.bases["x"]`, that makes activations sparse: minimise `E_x mean_i S(z_i)` with
    `z = R x / rms(x)`.

    - `x`: activations, `[n, d]`: a layer's inputs, or `layer(x)` for its outputs. They are not centred, because
      skipping a coordinate sets it to zero, not to its mean. If they do not fit into memory, give a source, as for
      `find_rotations`. A rotation has d²/2 free numbers: fit wide spaces on 100·d rows and more, and look at held-out
      ones.
    - `measure`: the default is the share of the energy that is lost if each example keeps the larger half of its
      coordinates, which is the error of a matrix product that skips the rest; `TopK(0.3)` keeps 30%. To find the
      directions that the activations are made of, use a sharp measure that does not fix their number, such as
      `Log(0.1)`.
    - `method`: how to minimise it (default: `default_basis_method(measure, d)`).
    - `restarts`: number of independent starts. `start`: the first (default: the neuron basis); the others are
      Haar-random rotations. `validation`: held-out activations; if given, the best step, restart and stage are chosen
      on them.
    - `run`: folder for checkpoints and log, progress bar, devices (see `Run`); a path stands for `Run(path)`.

    The returned objective (on `validation`, if given) never exceeds the start's; `solution.stages` says what each stage
    reached. The same key and inputs give the same bits on the same machine. Raises `ValueError` if the activations are
    not an array of finite floats `[n, d]`, or if `start` or `validation` do not fit them.
    """
    x = np.asarray(x) if isinstance(x, np.memmap) else x
    objective = ActivationSparsity(x, measure, space=SPACE)
    d, dtype = objective.x.shape[1], objective.x.dtype
    if start is not None:
        first = jnp.asarray(checks.orthogonal("start", start, d), dtype)
    elif isinstance(measure, TopK) and is_wide(objective):
        first = principal_components(objective)
    else:
        first = jnp.eye(d, dtype=dtype)
    held_out = None
    if validation is not None:
        held_out = objective.on(checks.activations("validation", in_memory(validation)[0], d))
    return minimize(
        objective,
        {SPACE: first},
        method=default_basis_method(measure, objective) if method is None else method,
        key=key,
        restarts=restarts,
        validation=held_out,
        run=run,
    )
