"""The generalised power method for `TopK`: no step lowers the energy of the largest coordinates."""

import dataclasses
from typing import cast

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rotsparse._core.orthogonal import matmul
from rotsparse.engine.method import Method
from rotsparse.objectives.activation import ActivationSparsity
from rotsparse.objectives.measures import TopK
from rotsparse.solvers._rotated_moments import check_objective
from rotsparse.solvers.combine import Each
from rotsparse.solvers.fixed_point import FixedPoint, top_k


class PowerMethod(Method):
    """`FixedPoint(top_k(k))` from the start and from the uncentred principal components, in which few directions hold
    most of the energy; the result with the lower objective is returned (Journée et al. 2010).

    Meant to follow annealing, which ends a little above the optimum because of its minibatches. Raises `ValueError` for
    objectives other than `ActivationSparsity` with `TopK`.
    """

    steps: int = eqx.field(static=True, default=60)

    def run(self, problem, starts, *, key, run):
        if len(starts) != 1:
            return Each(self).run(problem, starts, key=key, run=run)
        objective = check_objective(problem.objective)
        if not isinstance(objective.measure, TopK):
            raise ValueError(f"the power method is for TopK, and the measure is {objective.measure}")
        start, d = starts[0], objective.x.shape[1]
        from_components = {objective.space: principal_components(objective)}
        method = FixedPoint(response=top_k(cast(TopK, objective.measure).count(d)), steps=self.steps)
        with run.listening() as run:
            solution = method.run(problem, (start,), key=key, run=run.subrun("start"))
            stages = [solution.stages[0]._replace(name="PowerMethod")]
            if not solution.result.broken_off:
                found = method.run(problem, (from_components,), key=key, run=run.subrun("components"))
                stages.append(found.stages[0]._replace(name="PowerMethod from principal components"))
                best = solution.improved(found.bases, problem.objective, problem.validation)
                result = found.result if found.result.broken_off else best.result
                seconds = solution.stats["seconds"] + found.stats["seconds"]
                solution = dataclasses.replace(best, result=result, stats=best.stats | {"seconds": seconds})
        return dataclasses.replace(solution, stages=tuple(stages))


def principal_components(objective: ActivationSparsity) -> Float[Array, "d d"]:
    """The uncentred principal components of the examples in memory, the largest first."""
    x = objective.x
    _, components = np.linalg.eigh(np.asarray(matmul(x.T, x), np.float64))
    return jnp.asarray(components.T[::-1], x.dtype)
