"""What experiments say of a fit: the sentences of `rotsparse fit`, by the same code."""

from collections.abc import Mapping, Sequence
from typing import Any

import rotsparse as rs
from rotsparse.evaluation.agreement import agreements
from rotsparse.evaluation.compare import Comparison
from rotsparse.evaluation.fit_nulls import REDRAWS, quick_control
from rotsparse.evaluation.units import units_of
from rotsparse.evaluation.verdict import SHARE, Structure, structure, verdict


def judged(
    layer: rs.Layer,
    train,
    test,
    solution: rs.Solution,
    comparison: Comparison,
    *,
    key,
    nulls: Mapping[str, Sequence[rs.Layer]] | None = None,
    scale_inputs: bool = True,
) -> dict[str, Any]:
    """The verdict on a fit and on `against_nulls`, and what the restarts agree on."""
    found = against_nulls(layer, train, test, key=key, nulls=nulls, scale_inputs=scale_inputs)
    agreement = agreements(layer, test, solution, **units_of(layer, train, scale_inputs=scale_inputs))
    return {
        "verdict": verdict(comparison, layer, solution, found.control, agreement)[0],
        "agreement": " ".join(of.sentence() for of in agreement.values()),
        "reproduced": {space: float(of.again.mean()) for space, of in agreement.items()},
        **figures(found),
    }


def against_nulls(
    layer: rs.Layer,
    train,
    test,
    *,
    key,
    draws: int = REDRAWS,
    nulls: Mapping[str, Sequence[rs.Layer]] | None = None,
    scale_inputs: bool = True,
) -> Structure:
    """Shorter fits of a layer against some draws of each null (by default all that it has)."""
    control = quick_control(layer, train, test, key=key, draws=draws, nulls=nulls, scale_inputs=scale_inputs)
    assert control is not None
    return structure(control)


def figures(found: Structure) -> dict[str, Any]:
    """Every metric of the shorter fits; the share of small entries in the layer and in the strictest null."""
    return {
        "control": found.control.to_json(),
        "short_fit": found.control.learned[SHARE]._asdict(),
        "strictest": found.strictest,
        "strictest_null": found.control.another(found.strictest, SHARE)._asdict(),
    }
