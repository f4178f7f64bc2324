"""What the evidence amounts to, in words: every verdict, and every threshold of one.

- `structure`: is a layer sparser than its nulls, and which is the strictest?
- `verdict`: that, and all that `finding` and `remarks` say of a fit.
- `against_baselines`: on which metrics is the learned basis ahead?
- `finding`, `remarks`: what a fit found, in one sentence with the sizes; the remarks without which it would mislead.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rotsparse._core.intervals import Interval
from rotsparse.engine.solution import SAME, Solution
from rotsparse.evaluation.agreement import Agreement
from rotsparse.evaluation.compare import Comparison
from rotsparse.evaluation.control import Control
from rotsparse.evaluation.names import LABELS, basis_name
from rotsparse.layers.base import ClosedForm, Layer

GAIN = 1.3
"""A layer whose odds of a small entry beat those of its controls by less than this factor has no structure worth the
name, however sure. Odds, because shares of nearly one (of directions that hardly vary) leave no room for factors.
Chosen by `benchmarks/constructed.py`: with 1.1, four of 180 layers of noise, all of rank 4, passed."""

# What a layer is judged by against its nulls: the share of small entries, of all and without the strongest directions.
SHARE, WITHOUT_TOP, EDGES = "fraction_below_0.1_rms", "small_without_top", "edges_99"
JUDGED = (SHARE, WITHOUT_TOP)

# A single row or column of the mean squared Jacobian that holds more than this share of its sum is the first thing to
# say: shares of small entries are then about the others being smaller than it.
CONCENTRATED = 0.5


@dataclass(frozen=True)
class Structure:
    """Whether a layer is sparser than its nulls: a null is beaten where every metric of `JUDGED` is above the range of
    one more draw and the odds are larger by the factor `GAIN`. `strictest`: the null that leaves the smallest factor,
    of those that are missed if there are any."""

    control: Control
    beaten: tuple[str, ...]
    missed: tuple[str, ...]
    strictest: str

    @property
    def learned(self) -> bool:
        """Whether every null is beaten, but for those that only wire the same neurons otherwise: a layer may be sparse
        because each of its matrices is, in one basis, whichever neuron goes with which."""
        return all(null in REWIRED for null in self.missed)

    def headline(self) -> str:
        """The conclusion in one sentence or two, with the strictest null."""
        ours, null = self.control.learned[SHARE].value, self.control.another(self.strictest, SHARE).value
        shares = f"{ours:.1%} of the entries are practically zero, {null:.1%} in the null model {self.strictest!r}"
        if not self.missed:
            which = "the strictest" if len(self.control.nulls) > 1 else "the only one tried"
            return f"Sparse structure that was learned: {shares}, {which}."
        why = f"{_EXPLAINS.get(self.strictest, 'What this null keeps')} may explain it."
        if self.learned:
            return f"Sparse structure in the learned weights, but not in how neurons are wired: {shares}. {why}"
        if self.beaten:
            return (
                f"Sparser than with {_listed(self.beaten)}, but not than with {_listed(self.missed)}: {shares}. {why}"
            )
        return f"No sparse basis here beyond chance: {shares}."

    def evidence(self) -> str:
        """The figures of all nulls."""
        shares = ", ".join(f"{null} {self.control.another(null, SHARE).value:.3f}" for null in self.control.nulls)
        edges = ", ".join(f"{null} {self.control.another(null, EDGES).value:,.0f}" for null in self.control.nulls)
        made = f" ({self.control.made})" if self.control.made else ""
        return (
            f"The same fit{made} leaves {self.control.learned[SHARE].value:.3f} small entries here, and in the nulls: "
            f"{shares}. {self.control.learned[EDGES].value:,.0f} entries hold 99% of the mean squared Jacobian, and "
            f"in the nulls: {edges}."
        )

    def sentence(self) -> str:
        """Both."""
        return f"{self.headline()} {self.evidence()}"


# Nulls that keep every neuron of every matrix.
REWIRED = ("neurons re-paired", "gates unpaired")

# What a null keeps, and may therefore explain.
_EXPLAINS = {
    "random weights": "The size of the weights",
    "rates matched": "How often each neuron is active",
    "same spectrum": "The singular values of the weights",
    "weights shuffled": "The sizes of each neuron's weights",
    "neurons re-paired": "Each weight matrix by itself, whichever neuron feeds which output,",
    "gates unpaired": "Each weight matrix by itself, whichever gate goes with which neuron,",
}

# What may help where there is no structure beyond the nulls.
ADVICE = (
    "What to try: a whole block in place of a single layer, the layer with its skip connection, the other "
    "--input-scale or --output-scale, --active-subspace 0.999, more steps, more examples."
)


def structure(control: Control) -> Structure:
    """Judge a layer by its control."""
    judged = [metric for metric in JUDGED if metric in control.learned]

    def factor(null: str) -> float:
        return min(_odds(control.learned[m].value, control.another(null, m).value) for m in judged)

    beaten = [n for n in control.nulls if all(_beyond(control.learned[m], control.another(n, m)) for m in judged)]
    missed = [null for null in control.nulls if null not in beaten]
    strictest = min(missed or beaten, key=factor)
    return Structure(control, tuple(beaten), tuple(missed), strictest)


def _beyond(learned: Interval, null: Interval) -> bool:
    return learned.low > null.high and _odds(learned.value, null.value) > GAIN


def _odds(learned: float, null: float) -> float:
    """The odds of a small entry, relative to those in a null model."""
    few = 1e-12
    return learned * (1 - null) / max(null * (1 - learned), few)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def against_baselines(comparison: Comparison, learned: str = "learned") -> str:
    """One sentence: on which metrics the learned basis beats every other one, and on which it does not.

    Raises `ValueError` where there is no basis of that name, or nothing to compare it with.
    """
    rivals = [basis for basis in comparison.metrics if basis != learned]
    if learned not in comparison.metrics or not rivals:
        raise ValueError(f"expected {learned!r} and at least one other basis, got {', '.join(comparison.metrics)}")
    clear, close, behind = [], defaultdict(list), defaultdict(list)
    for name in comparison.names:
        rival = comparison.best_of(name, rivals)
        ours, theirs = comparison.metrics[learned][name], comparison.metrics[rival][name]
        if comparison.best_of(name, [rival, learned]) == rival:
            behind[rival].append(LABELS[name])
        elif ours.overlaps(theirs):
            close[rival].append(LABELS[name])
        else:
            clear.append(LABELS[name])
    total = len(comparison.names)
    if len(clear) == total:
        return (
            f"On held-out examples {learned} is sparser than every baseline on all {total} metrics, "
            "beyond the 95% intervals."
        )
    parts = [f"sparser than every baseline on {len(clear)} of {total} metrics"]
    parts[0] += f" ({', '.join(clear)})" if clear else ""
    parts += [f"ahead of {rival} within the 95% intervals on {', '.join(names)}" for rival, names in close.items()]
    parts += [f"not ahead of {rival} on {', '.join(names)}" for rival, names in behind.items()]
    return f"On held-out examples {learned} is {'; '.join(parts)}".rstrip(".") + "."


# Objectives of restarts that differ by less than this share count as equally good.
ABOUT_AS_SPARSE = 0.02


def verdict(
    comparison: Comparison,
    layer: Layer,
    solution: Solution,
    control: Control | None,
    agreement: Mapping[str, Agreement],
) -> list[str]:
    """What a fit found: the conclusion in a sentence or two, and the sentences that it rests on.

    The first says whether a few directions hold most of the energy, if they do, and whether the layer is sparser than
    its nulls; without a control, how many entries are left.
    """
    concentrated = concentration(comparison)
    if control is None:
        first, *rest = [finding(comparison, layer), *remarks(comparison, layer, solution, agreement)]
    else:
        judged = structure(control)
        first, *rest = [judged.headline(), judged.evidence(), finding(comparison, layer)]
        rest += remarks(comparison, layer, solution, agreement)
        rest += [] if judged.learned else [ADVICE]
    return [f"{concentrated} {first}" if concentrated else first, *rest]


def concentration(comparison: Comparison, basis: str = "learned") -> str:
    """A sentence if one row, column or example holds more than half of the mean squared Jacobian in a basis."""
    found = comparison.concentration.get(basis)
    if found is None:
        return ""
    held = {
        "a single output direction": found.row,
        "a single input direction": found.column,
        "a single example": found.example,
    }
    where, share = max(held.items(), key=lambda item: item[1])
    if share <= CONCENTRATED:
        return ""
    of = comparison.metrics[basis]
    return (
        f"Concentrated: {where} holds {share:.0%} of the mean squared Jacobian, so nearly all other entries count as "
        f"small; in units of their own row {of['small_by_row'].value:.0%} are, and {of[WITHOUT_TOP].value:.0%} without "
        "the strongest rows and columns."
    )


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


def remarks(comparison: Comparison, layer: Layer, solution: Solution, agreement: Mapping[str, Agreement]) -> list[str]:
    """Where the learned basis is ahead and where not; which directions other starts find again, and what influence they
    carry (by `agreements`); and what is no news."""
    said = [against_baselines(comparison)]
    if {comparison.best("participation_ratio"), comparison.best("top_1_percent_energy")} != {"learned"}:
        said.append(
            "Participation ratio and top-1% energy look only at the few largest entries, which an SVD makes as large "
            "as can be; the objective asks for zeros elsewhere."
        )
    if isinstance(layer, ClosedForm) and layer.left is None:
        # An elementwise φ pins the outputs of a single layer to its neurons.
        found = int(np.sum(np.max(np.abs(np.asarray(solution.rotations.r_out)), axis=1) > SAME))
        said.append(
            f"{found} of the {layer.d_out} output directions are single neurons (|cos| > {SAME}). That is no "
            "discovery: the nonlinearity pins the outputs of a single layer to its neurons, and finding them again is "
            "a check of the method."
        )
    if agreement:
        said.append(" ".join(of.sentence() for of in agreement.values()))
        undetermined = [of.side for of in agreement.values() if of.carried < 0.5]
        least = float(np.min(solution.candidate_values))
        behind = (float(np.max(solution.candidate_values)) - least) / max(abs(least), 1e-12)
        if undetermined and behind < ABOUT_AS_SPARSE:
            said.append(
                f"The {' and '.join(undetermined)} directions with most of the influence are not determined by these "
                f"data: other starts give other ones that are as sparse (objectives within {behind:.1%}): do not read "
                "meaning into single ones."
            )
        elif undetermined:
            said.append(
                f"Whether these data determine the {' and '.join(undetermined)} directions is open: not all starts "
                f"came as low as the best (up to {behind:.0%} above it). Take more steps, and meanwhile do not read "
                "meaning into single ones."
            )
    return said
