"""Order the rows and columns of a matrix so that its structure shows. A basis has no order of its own: any will do."""

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import connected_components

# Two pairs belong together where both entries between them are above this share of the larger of their own two.
COUPLED = 0.5


def diagonal_order(a: Float[np.ndarray, "m n"]) -> tuple[Int[np.ndarray, "m"], Int[np.ndarray, "n"]]:
    """Orders `rows`, `columns` that bring the large entries of the non-negative `a` near the diagonal of
    `a[rows][:, columns]`.

    Every row is paired with a column so that the sum of the paired entries is largest (Hungarian algorithm); pairs that
    large entries connect are put together, and groups, as well as pairs in a group, are sorted by their paired entry,
    largest first. A row (column) that is left without a partner follows the pair where its largest entry is. Cost
    O(min(m, n)² max(m, n)).
    """
    rows, columns = linear_sum_assignment(a, maximize=True)
    strength = a[rows, columns]
    coupling = a[np.ix_(rows, columns)]
    coupled = np.minimum(coupling, coupling.T) > COUPLED * np.maximum.outer(strength, strength)
    group = connected_components(coupled, directed=False)[1]
    group_strength = np.zeros(group.max() + 1)
    np.maximum.at(group_strength, group, strength)
    # The group itself is a key too, so that groups of equal strength do not mix.
    order = np.lexsort((-strength, group, -group_strength[group]))
    rows, columns = rows[order], columns[order]
    return _with_unpaired(rows, columns, a), _with_unpaired(columns, rows, a.T)


def _with_unpaired(paired, partners, a):
    """`paired` rows of `a` with the others put behind those whose partner is the column of their largest entry."""
    unpaired = np.setdiff1d(np.arange(len(a)), paired)
    position = np.full(a.shape[1], len(partners))
    position[partners] = np.arange(len(partners))
    largest = a[unpaired].max(axis=1, initial=0)
    follows = np.where(largest > 0, position[a[unpaired].argmax(axis=1)], len(partners))
    place = np.concatenate([np.arange(len(paired)), follows + 0.5])
    size = np.concatenate([np.zeros(len(paired)), -largest])
    return np.concatenate([paired, unpaired])[np.lexsort((size, place))]
