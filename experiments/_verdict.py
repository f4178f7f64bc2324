"""What experiments say of a fit: the sentences of `rotsparse fit`, by the same code."""

from collections.abc import Mapping, Sequence
from typing import Any

import rotsparse as rs
from rotsparse.evaluation.agreement import agreements
from rotsparse.evaluation.compare import Comparison
from rotsparse.evaluation.fit_nulls import quick_control
from rotsparse.evaluation.units import units_of
from rotsparse.evaluation.verdict import SHARE, structure, verdict


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
    """The verdict on a fit; of its shorter fits against three draws of each null (by default all that the layer has),
    the share of small entries in the layer and in the strictest null; and what the restarts agree on."""
    control = quick_control(layer, train, test, key=key, nulls=nulls, scale_inputs=scale_inputs)
    assert control is not None
    agreement = agreements(layer, test, solution, **units_of(layer, train, scale_inputs=scale_inputs))
    found = structure(control)
    return {
        "verdict": verdict(comparison, layer, solution, control, agreement)[0],
        "agreement": " ".join(of.sentence() for of in agreement.values()),
        "reproduced": {space: float(of.again.mean()) for space, of in agreement.items()},
        "control": control.to_json(),
        "short_fit": control.learned[SHARE]._asdict(),
        "strictest": found.strictest,
        "strictest_null": control.another(found.strictest, SHARE)._asdict(),
    }
