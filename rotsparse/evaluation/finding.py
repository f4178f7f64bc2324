"""What a fit found, in words: one sentence with the sizes, and the remarks without which it would mislead."""

import numpy as np

from rotsparse.engine.solution import SAME, Solution
from rotsparse.evaluation.compare import Comparison
from rotsparse.evaluation.names import basis_name
from rotsparse.layers.base import ClosedForm, Layer

# Objectives of restarts that differ by less than this share count as equally good.
ABOUT_AS_SPARSE = 0.02


def finding(comparison: Comparison, layer: Layer) -> str:
    """One sentence: how many entries are left, and how many are practically zero."""
    rivals = Comparison({basis: of for basis, of in comparison.metrics.items() if basis != "learned"})

    def sizes(metric: str, form: str) -> str:
        rival = rivals.best(metric)
        of = comparison.metrics
        return (
            f"(neurons {of['neurons'][metric].value:{form}}; best baseline, {basis_name(rival)}, "
            f"{of[rival][metric].value:{form}})"
        )

    learned = comparison.metrics["learned"]
    return (
        f"In the learned basis {learned['edges_99'].value:,.0f} of {layer.d_in * layer.d_out:,} entries hold 99% "
        f"of the mean squared Jacobian of held-out examples {sizes('edges_99', ',.0f')}, and "
        f"{learned['fraction_below_0.1_rms'].value:.0%} of all entries are below a tenth of their rms "
        f"{sizes('fraction_below_0.1_rms', '.0%')}."
    )


def remarks(comparison: Comparison, layer: Layer, solution: Solution) -> list[str]:
    """Where the learned basis is ahead and where not; which directions other starts find again; and what is no news."""
    said = [comparison.verdict()]
    if {comparison.best("participation_ratio"), comparison.best("top_1_percent_energy")} != {"learned"}:
        said.append(
            "Participation ratio and top-1% energy look only at the few largest entries, which an SVD makes as large "
            "as can be; the objective asks for zeros elsewhere."
        )
    reproduced = solution.reproduced()
    if isinstance(layer, ClosedForm) and layer.left is None:
        # An elementwise φ pins the outputs of a single layer to its neurons.
        found = int(np.sum(np.max(np.abs(np.asarray(solution.rotations.r_out)), axis=1) > SAME))
        said.append(
            f"{found} of the {layer.d_out} output directions are single neurons (|cos| > {SAME}). That is no "
            "discovery: the nonlinearity pins the outputs of a single layer to its neurons, and finding them again is "
            "a check of the method."
        )
    if reproduced:
        parts = [
            f"{int(again.sum())} of the {len(again)} {_side(space)} directions" for space, again in reproduced.items()
        ]
        said.append(f"Other restarts find {' and '.join(parts)} again (|cos| > {SAME}).")
        undetermined = [_side(space) for space, again in reproduced.items() if again.mean() < 0.5]
        least = float(np.min(solution.candidate_values))
        behind = (float(np.max(solution.candidate_values)) - least) / max(abs(least), 1e-12)
        if undetermined and behind < ABOUT_AS_SPARSE:
            said.append(
                f"Most {' and '.join(undetermined)} directions are not determined by these data: other starts give "
                f"other ones that are as sparse (objectives within {behind:.1%}): do not read meaning into single ones."
            )
        elif undetermined:
            said.append(
                f"Whether these data determine the {' and '.join(undetermined)} directions is open: not all starts "
                f"came as low as the best (up to {behind:.0%} above it). Take more steps, and meanwhile do not read "
                "meaning into single ones."
            )
    return said


def _side(space: str) -> str:
    return {"in": "input", "out": "output"}.get(space, space)
