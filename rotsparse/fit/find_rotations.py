"""`find_rotations`: fit the rotations of one layer."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from rotsparse._core import checks
from rotsparse._core.files import adopt
from rotsparse._core.precision import check_precision, lacking
from rotsparse._core.types import Data, Vectors
from rotsparse.data.moments import FAR, Moments, far_rows, stream_moments
from rotsparse.data.scales import Scale
from rotsparse.data.sources import Source, as_source, in_memory
from rotsparse.engine.method import Method
from rotsparse.engine.run import Run
from rotsparse.engine.solution import Solution
from rotsparse.fit.active_subspace import ActiveSubspace
from rotsparse.fit.default_method import default_method
from rotsparse.fit.minimize import minimize
from rotsparse.fit.weight_bases import known_starts
from rotsparse.layers.base import ClosedForm, Layer
from rotsparse.layers.jacobians import apply
from rotsparse.layers.rotations import Rotations
from rotsparse.objectives.base import Bases, Objective
from rotsparse.objectives.combined import Held
from rotsparse.objectives.jacobian import JacobianSparsity
from rotsparse.objectives.measures import Log, Measure


def find_rotations(
    layer: Layer,
    x: Float[Data, "n d_in"] | Source | Vectors,
    *,
    key: PRNGKeyArray,
    measure: Measure = Log(0.1),  # noqa: B008 (immutable)
    method: Method | None = None,
    restarts: int = 1,
    validation: Float[Data, "m d_in"] | Source | Vectors | None = None,
    start: Rotations | None = None,
    scale_inputs: Scale = True,
    scale_outputs: Scale = False,
    tie: bool = False,
    hold: Sequence[str] = (),
    active_subspace: float | None = None,
    precision: str = "highest",
    looks: int | None = None,
    run: Run | str | os.PathLike | None = None,
) -> Solution:
    """Find rotations of the layer's inputs and outputs in which its per-example Jacobians are sparse.

    Minimise `E_x mean S(z)` over orthogonal `R_in`, `R_out`, where z are the entries of `R_out J(x) R_inᵀ`, each
    column multiplied by the standard deviation of its rotated input (`scale_inputs`), divided by their root mean
    square over all examples.

    Main arguments:

    - `x`: the layer's inputs, `[n, d_in]`. If they do not fit into memory, give a source (`open_source(path)`, a NumPy
      memory map, a `grain.MapDataset` of vectors): minibatches are read as they are needed, one pass computes the
      covariance, and rotations are judged on a sample (see `data.sources`).
    - `key`: the same key and inputs give the same bits on the same machine.
    - `measure`: the sparsity measure S.
    - `method`: how to minimise it. The default, `default_method(layer)`, anneals and then runs pair searches for as
      long as they pay; these leave a certificate. Without a `start` it first looks at the bases in which the weights
      are sparse and at the singular vectors of the mean Jacobian. It anneals from there too, keeps what leaves fewer
      entries above ε, and in a single fit goes on from there alone if one is clear of all else (`Hinted`).
      `Anneal(steps=20_000)` takes more steps; `Riemannian(optax.adam(0.1))` uses any optax optimiser.
    - `restarts`: number of independent starts; the best result is returned, and `Solution.agreement` compares them.
    - `validation`: held-out inputs; if given, the best step and the best restart are chosen on them (on a sample, if
      they are a source).

    Other arguments:

    - `start`: the first start (default: the neuron basis); the others are Haar-random rotations.
    - `scale_inputs`: multiply each column of the Jacobian by the standard deviation of its input. `scale_outputs`: also
      divide each row by the standard deviation of its output, so that entries have no unit. Either may be a function of
      rows `[n, d]` that returns the covariance from which deviations are taken: `rs.winsorised` is one that 2% of the
      rows cannot move far. The default (`True`) leaves rows out that are far from all others.
    - `tie`: use one rotation for both sides (a residual stream). `hold`: sides ("in", "out") that are not rotated away
      from their start.
    - `active_subspace`: rotate only the principal components that hold this share (e.g. 0.999) of the variance of
      inputs and of outputs, starting from these components. If the variance lies in few directions, this is much
      faster and finds better optima. The solution's values are those of the Jacobian between these directions.
    - `precision`: of the products in which steps see the data: "highest" (float32), "tensorfloat32" or "bfloat16" (a
      mantissa of 10 or 7 bits; where a device lacks one, the detail says what was used). Rotations are orthogonalised,
      judged and certified in full precision.
    - `looks`: on how many examples the objective is computed where rotations are judged (default: all but of wide
      layers, see `JacobianSparsity`). Steps draw from all.
    - `run`: folder for checkpoints and log, progress bar, devices (see `Run`); a path stands for `Run(path)`.

    The returned objective (on `validation`, if given) never exceeds the start's. Raises `ValueError` if inputs do not
    fit the layer, are not finite, or do not vary, or if other arguments do not fit each other.
    """
    run = Run.of(run)
    method = default_method(layer) if method is None else method
    space_out = "in" if tie else "out"
    check_precision(precision)
    objective = JacobianSparsity(
        layer,
        x,
        measure,
        scale_inputs=scale_inputs,
        scale_outputs=scale_outputs,
        space_out=space_out,
        precision=precision,
        moments=kept_moments(x, run) if scale_inputs is True else None,
        looks=looks,
    )
    held_out = None
    if validation is not None:
        held_out = objective.on(checks.activations("validation", in_memory(validation)[0], layer.d_in), looks)
    unknown = set(hold) - set(objective.spaces)
    if unknown:
        raise ValueError(f"hold names {sorted(unknown)}: expected some of {sorted(objective.spaces)}")
    if start is not None and (start.r_in.shape[0], start.r_out.shape[0]) != (layer.d_in, layer.d_out):
        raise ValueError(
            f"start has widths {start.r_in.shape[0]} and {start.r_out.shape[0]}, the layer {layer.d_in} and "
            f"{layer.d_out}"
        )
    if start is not None and tie and not np.array_equal(start.r_in, start.r_out):
        raise ValueError("a tied fit has one rotation: its start needs r_in and r_out to be equal")
    dtype = objective.x.dtype
    first = {name: jnp.eye(d, dtype=dtype) for name, d in objective.spaces.items()}
    if start is not None:
        first |= {"in": jnp.asarray(start.r_in, dtype), space_out: jnp.asarray(start.r_out, dtype)}

    options: dict[str, Any] = {"key": key, "restarts": restarts, "run": run}
    if active_subspace is not None:
        if start is not None or tie or hold:
            raise ValueError("active_subspace starts at principal components: it excludes start, tie and hold")
        subspace = ActiveSubspace(layer, objective.data.known, active_subspace)
        small, small_held_out = subspace.restrict(objective), held_out and subspace.restrict(held_out)
        solution = minimize(small, method=method, validation=small_held_out, **options)
        return _remarked(solution.lifted(subspace.lift, subspace.free), objective)

    held = {name: first[name] for name in hold}
    free: Objective = Held(objective, held) if held else objective
    if start is None and not tie and method.takes_hints and isinstance(layer, ClosedForm):
        sides = [{"in": r.r_in, "out": r.r_out} for r in known_starts(layer, objective.data.known)]
        options["hints"] = [{name: jnp.asarray(side[name], dtype) for name in free.spaces} for side in sides]
    free_held_out = Held(held_out, held) if held and held_out is not None else held_out
    solution = minimize(free, first, method=method, validation=free_held_out, **options)

    def lift(bases: Bases) -> Bases:
        return held | bases

    turned = {name: np.full(d, name not in held) for name, d in objective.spaces.items()}
    return _remarked(solution.lifted(lift, turned) if held else solution, objective)


def _remarked(solution: Solution, objective: JacobianSparsity) -> Solution:
    """Say in the detail what the fit did on its own account: another precision, rows that do not count."""
    remarks = [solution.detail, lacking(objective.precision)]
    known = objective.data.known
    if objective.scale_inputs is True and (far := far_rows(known)):
        remarks.append(
            f"{far:,} of {len(known):,} examples lie more than {FAR:g} times as far from the median as most do "
            "(attention sinks?) and are left out of the standard deviations that scale entries"
        )
    if objective.scale_outputs is True:
        outputs = np.asarray(apply(objective.layer, objective.x))
        if far := far_rows(outputs):
            remarks.append(
                f"the outputs of {far:,} of {len(outputs):,} examples are as far from the median of outputs, and left "
                "out of theirs"
            )
    return dataclasses.replace(solution, detail="; ".join(filter(None, remarks)))


def kept_moments(x, run: Run, name: str = "moments") -> Moments | None:
    """The moments of a source, saved beside the checkpoints because the pass over the source may take long. `None` if
    there are no checkpoints, or no source."""
    source, folder = as_source(x), run.checkpoints
    if source is None or folder is None:
        return None
    adopt(folder)
    return stream_moments(source, folder / f"{name}.npz")
