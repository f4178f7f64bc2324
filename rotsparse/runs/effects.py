"""What the directions of a run are worth to its model: `rs.effects(run)`."""

import jax
import numpy as np
from jaxtyping import Int, PRNGKeyArray

from rotsparse.explain.ablations import Cost, Metric, costs, rise
from rotsparse.explain.directions import IN, SIDES
from rotsparse.runs.opened import LayerRun


def effects(
    run: LayerRun,
    metric: Metric = rise,
    *,
    tokens: int = 4096,
    exact: int | None = 20,
    controls: int = 1,
    key: PRNGKeyArray | None = None,
) -> list[Cost]:
    """The cost of holding each direction of a run at its mean, the most expensive first, on held-out text: about
    `tokens` tokens of the last fifth of the run's store.

    Every direction has an estimate to first order. `exact` directions of each side are measured, each with `controls`
    random directions of the same norm (`explain.ablations`): half of them the most influential ones, the rest those
    with the largest estimates. First order misses large costs (correlation with the cost .5 for inputs and .9 for
    outputs of stories260K). `None` measures all.

    Raises `ValueError` for a run of no model, of a model without a next-token head, or whose store lacks its tokens.
    """
    text = held_out(run, tokens)
    key = jax.random.key(0) if key is None else key
    found: list[Cost] = []
    for at, side in enumerate(SIDES):
        r = run.rotations.r_in if side == IN else run.rotations.r_out
        point = run.point(side)
        if point is None:
            continue
        ask = {"side": side, "controls": controls, "key": jax.random.fold_in(key, at)}
        estimated = costs(run.model, point, r, text, metric, numbers=(), **ask)
        largest = np.argsort([-abs(of.estimate) for of in estimated], kind="stable").tolist()
        first = range(len(r) if exact is None else exact // 2)  # directions are numbered by influence
        numbers = list(dict.fromkeys([*first, *largest]))[:exact]
        found += costs(run.model, point, r, text, metric, numbers=numbers, **ask)
    return sorted(found, key=lambda of: -(of.estimate if of.cost is None else of.cost))


def held_out(run: LayerRun, tokens: int) -> Int[np.ndarray, "sequences positions"]:
    """The last fifth of the whole sequences of a run's store, evenly spaced, about so many tokens. Raises `ValueError`
    if there is none."""
    whole = run.whole_sequences()
    length = whole.shape[1]
    if not len(whole):
        raise ValueError(f"{run.store} has no whole sequence of {length} tokens")
    last = whole[len(whole) - max(1, len(whole) // 5) :]
    count = max(1, min(len(last), tokens // length))
    return last[np.linspace(0, len(last) - 1, count).round().astype(int)]
