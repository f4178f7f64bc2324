"""`Solution`: what a fit returns, and how it ended."""

import dataclasses
import enum
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool

from rotsparse._core.alignment import match, reordered
from rotsparse._core.files import npz, write_atomically
from rotsparse._core.orthogonal import exact_error
from rotsparse._core.reading import load_npz
from rotsparse.engine.history import History
from rotsparse.layers.rotations import Rotations
from rotsparse.objectives.base import Bases, Objective

# Two directions count as the same if their |cos| is larger.
SAME = 0.99


class Result(enum.Enum):
    """How a fit ended. The value is a sentence for the user: what happened, and what to try."""

    ALL_STEPS = "All steps were taken. If the objective was still falling at the end, use more steps."
    CONVERGED = "Stopped early: no improvement for `patience` steps. More restarts may still find a better optimum."
    NO_IMPROVEMENT = (
        "Nothing better than the start was found, and the start is returned. Try a smaller step (`max_step`, learning "
        "rate), more steps, or another start; if restarts agree, the start may simply be optimal."
    )
    NON_FINITE = (
        "The objective or the rotations became NaN or infinite, and the last good rotations are returned. Look for "
        "activations or weights so large that the layer overflows, or for a custom optimiser or function that does."
    )
    INTERRUPTED = "Interrupted: the best rotations so far are returned. They are valid, but the fit is not finished."

    @property
    def broken_off(self) -> bool:
        """Whether the fit ended early, so that no further stage runs."""
        return self in (Result.INTERRUPTED, Result.NON_FINITE)

    @property
    def ok(self) -> bool:
        """Whether the fit ran to its end and found something better than its start."""
        return self in (Result.ALL_STEPS, Result.CONVERGED)


@dataclasses.dataclass(frozen=True)
class Certificate:
    """No rotation of any tested pair of rows improves the objective by more than `delta`.

    `tested` and `pairs`: how many pairs of each space were tested, and how many there are. `value`: the objective on
    these examples. Angles were searched on a grid of 2.8° and refined to 0.04° around its best point.
    """

    delta: float
    value: float
    tested: dict[str, int]
    pairs: dict[str, int]

    def __str__(self) -> str:
        counts = ", ".join(f"{self.tested[space]} of {self.pairs[space]} in {space!r}" for space in self.pairs)
        share = self.delta / abs(self.value) if self.value else 0.0
        return (
            f"no rotation of two rows improves the objective by more than {self.delta:.2g} ({share:.2g} of its value); "
            f"pairs tested: {counts}"
        )


class Stage(NamedTuple):
    """What one stage of a fit reached: the lowest judged objective, the name of its `Result`, the time, and a
    remark."""

    name: str
    value: float
    result: str
    seconds: float
    remark: str = ""

    def __str__(self) -> str:
        remark = f" ({self.remark})" if self.remark else ""
        return f"{self.name} reached {self.value:.6g} in {self.seconds:.3g} s{remark}"


@dataclasses.dataclass(frozen=True)
class Solution:
    """The best rotations of a fit, and the evidence.

    `value` and `start_value`: the objective on all training examples, of the result and of the start that it came from.
    `validation_value`: the objective on held-out examples, if there were any. `candidates`: the best rotations of each
    restart. `candidate_values`: their judged objectives. `free`: for every space, which directions the fit could turn
    (the others were held, or lie outside the active subspace). `stages`: what each stage of the method reached.
    `certificate`: that of the last pair search, if the method had one. `stats`: counts, times and errors.
    """

    bases: Bases
    result: Result
    detail: str
    value: float
    start_value: float
    validation_value: float | None
    history: History
    candidates: tuple[Bases, ...]
    candidate_values: np.ndarray
    stats: dict[str, Any]
    free: dict[str, Bool[np.ndarray, "_"]]
    stages: tuple[Stage, ...] = ()
    certificate: Certificate | None = None

    @property
    def rotations(self) -> Rotations:
        """The rotations of a layer from `find_rotations`; a tied fit has the same one on both sides. Raises
        `ValueError` for other fits: activations have one rotation, chains have many."""
        if "in" not in self.bases:
            raise ValueError(
                f"this fit is not one of a layer: its rotations are solution.bases[{next(iter(self.bases))!r}], ... To "
                "fold a basis R of a layer's inputs into it, take Rotations(R, np.eye(layer.d_out, dtype=R.dtype))"
            )
        return Rotations(self.bases["in"], self.bases.get("out", self.bases["in"]))

    @property
    def best(self) -> int:
        """Which of the candidates the result is: the one with the lowest judged objective, unless the method chose
        another."""
        same = [all(np.array_equal(c[name], r) for name, r in self.bases.items()) for c in self.candidates]
        return same.index(True) if any(same) else int(np.argmin(self.candidate_values))

    def completed(self) -> "Solution":
        """Return self, or raise `KeyboardInterrupt` if the fit was interrupted."""
        if self.result is Result.INTERRUPTED:
            raise KeyboardInterrupt
        return self

    def lifted(self, lift: Callable[[Bases], Bases], free: dict[str, Bool[np.ndarray, "_"]]) -> "Solution":
        """Extend the solution of a restricted problem (some spaces, or some directions) to the whole one: `lift`
        extends the rotations, and `free` says which directions of the whole could be turned. Values stay those of the
        restricted problem."""
        return dataclasses.replace(
            self, bases=lift(self.bases), candidates=tuple(map(lift, self.candidates)), free=free
        )

    def improved(self, bases: Bases, objective: Objective, validation: Objective | None) -> "Solution":
        """Replace the best rotations with `bases` if their judged objective is lower."""
        judged = judged_value(validation or objective, bases)
        if not judged < self.candidate_values[self.best]:
            return self
        return self.replaced(bases, judged, objective, validation)

    def replaced(self, bases: Bases, judged: float, objective: Objective, validation: Objective | None) -> "Solution":
        """Put these rotations in place of the best ones. `judged`: their objective, on `validation` if there is one."""
        value, evident = evidence(objective, bases)
        best = self.best
        values = np.where(np.arange(len(self.candidates)) == best, judged, self.candidate_values)
        return dataclasses.replace(
            self,
            bases=bases,
            value=judged if validation is None else value,
            validation_value=None if validation is None else judged,
            candidates=tuple(bases if i == best else old for i, old in enumerate(self.candidates)),
            candidate_values=values,
            stats=self.stats | evident,
        )

    def renumbered(self, numbers: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> "Solution":
        """The same solution with the directions of some spaces in another order and with other signs: direction i of a
        space becomes `signs[i]` times its earlier direction `order[i]`. The other restarts stay as they are."""

        def changed(bases: Bases) -> Bases:
            turned: dict[str, Any] = {name: reordered(bases[name], *of) for name, of in numbers.items()}
            return bases | turned

        best = self.best
        candidates = tuple(changed(c) if i == best else c for i, c in enumerate(self.candidates))
        free = self.free | {name: self.free[name][order] for name, (order, _) in numbers.items()}
        return dataclasses.replace(self, bases=changed(self.bases), candidates=candidates, free=free)

    def agreement(self) -> dict[str, np.ndarray]:
        """How well the restarts agree: for every space, `|cos|` of each direction of the result with its match in each
        of the other restarts (matched up to sign and order), `[restarts - 1, d]`.

        A direction that independent restarts all find at |cos| ≈ 1 is identified by the data; one that none finds
        again is not, however sparse the result. Raises `ValueError` after a single restart.
        """
        best = self.best
        others = [candidate for i, candidate in enumerate(self.candidates) if i != best]
        if not others:
            raise ValueError("agreement compares restarts, and this fit had one: use restarts=2 or more")
        return {
            name: np.stack([match(np.asarray(r), np.asarray(other[name])).cosines for other in others])
            for name, r in self.candidates[best].items()
        }

    def reproduced(self) -> dict[str, np.ndarray] | None:
        """For every space, which of its `free` directions every other restart found again (`|cos| > SAME`). `None`
        after a single restart."""
        if len(self.candidates) == 1:
            return None
        again = {space: cosines.min(axis=0) > SAME for space, cosines in self.agreement().items()}
        return {space: found[self.free[space]] for space, found in again.items() if self.free[space].any()}

    def save(self, path: str | os.PathLike) -> None:
        """Write everything to one `.npz` file. Atomic."""
        scalars = {
            "result": self.result.name,
            "detail": self.detail,
            "value": self.value,
            "start_value": self.start_value,
            "validation_value": self.validation_value,
            "stats": self.stats,
            "certificate": None if self.certificate is None else dataclasses.asdict(self.certificate),
            "stages": self.stages,
        }
        arrays: dict[str, Any] = {f"bases/{name}": r for name, r in self.bases.items()}
        for i, candidate in enumerate(self.candidates):
            arrays |= {f"candidates/{i}/{name}": r for name, r in candidate.items()}
        arrays |= {f"free/{name}": mask for name, mask in self.free.items()}
        arrays |= {f"history/{name}": value for name, value in dataclasses.asdict(self.history).items()}
        scalars = {"scalars": json.dumps(scalars), "candidate_values": self.candidate_values}
        write_atomically(path, npz(**scalars | arrays))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Solution":
        """Read what `save` wrote. Raises `ValueError` if the file is missing or damaged."""
        try:
            arrays = load_npz(path)
            scalars = json.loads(str(arrays["scalars"]))
            certificate = scalars.pop("certificate")

            def under(prefix: str) -> dict[str, Any]:
                return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}

            found = cls(
                bases=under("bases/"),
                result=Result[scalars.pop("result")],
                history=History(**under("history/")),
                candidates=tuple(under(f"candidates/{i}/") for i in range(len(arrays["candidate_values"]))),
                candidate_values=arrays["candidate_values"],
                free=under("free/"),
                certificate=None if certificate is None else Certificate(**certificate),
                stages=tuple(Stage(*stage) for stage in scalars.pop("stages")),
                **scalars,
            )
            found.summary()  # it says everything that is no array: what is of another type ends here
            return found
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"cannot read a solution from {path}: {error}") from None

    def summary(self) -> str:
        """A summary in a few lines of text."""
        lines = [
            f"{self.result.name}: {self.result.value}" + (f" ({self.detail})" if self.detail else ""),
            f"objective {self.start_value:.4f} -> {self.value:.4f}"
            + ("" if self.validation_value is None else f", held-out {self.validation_value:.4f}"),
            ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in self.stats.items()),
        ]
        lines += map(str, self.stages)
        return "\n".join(lines if self.certificate is None else [*lines, str(self.certificate)])


def evidence(objective: Objective, bases: Bases) -> tuple[float, dict[str, float]]:
    """The objective of rotations, the norm of its gradient, and the orthogonality error."""
    value, grads = _value_and_grad(objective.in_full_precision(), bases)
    return float(value), {
        "gradient_norm": float(optax.tree.norm(grads)),
        "orthogonality_error": max(map(exact_error, bases.values())),
    }


def judged_value(objective: Objective, bases: Bases) -> float:
    """The objective, computed by a program that is compiled once for each kind of objective."""
    return float(_value(objective.in_full_precision(), bases))


@eqx.filter_jit
def _value(objective, bases):
    return objective.value(bases)


@eqx.filter_jit
def _value_and_grad(objective, bases):
    return objective.value_and_grad(bases)


def _short(value):
    if isinstance(value, (float, np.floating, jnp.ndarray)):
        return f"{float(value):.3g}"
    return str(value)
