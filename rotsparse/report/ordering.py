"""Order the rows and columns of a matrix so that its structure is visible. The order of a basis is arbitrary."""

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import connected_components

# Two pairs belong together if both entries between them exceed this share of the larger of their own two.
COUPLED = 0.5


def diagonal_order(a: Float[np.ndarray, "m n"]) -> tuple[Int[np.ndarray, "m"], Int[np.ndarray, "n"]]:
    """Orders `rows` and `columns` that put the large entries of the non-negative `a` near the diagonal of
    `a[rows][:, columns]`.

    Rows are paired with columns so that the sum of the paired entries is largest (Hungarian algorithm). Pairs that
    large entries connect form a group. Groups, and pairs within a group, are sorted by their paired entry, largest
    first. A row (column) without a partner follows the pair at its largest entry. Cost O(min(m, n)² max(m, n)).
    """
    rows, columns = linear_sum_assignment(a, maximize=True)
    strength = a[rows, columns]
    coupling = a[np.ix_(rows, columns)]
    coupled = np.minimum(coupling, coupling.T) > COUPLED * np.maximum.outer(strength, strength)
    group = connected_components(coupled, directed=False)[1]
    group_strength = np.zeros(group.max() + 1)
    np.maximum.at(group_strength, group, strength)
    # The group is a sort key, too, so that groups of equal strength stay separate.
    order = np.lexsort((-strength, group, -group_strength[group]))
    rows, columns = rows[order], columns[order]
    return _with_unpaired(rows, columns, a), _with_unpaired(columns, rows, a.T)


def _with_unpaired(paired, partners, a):
    """`paired` rows of `a`, with each other row after the pair whose column holds its largest entry."""
    unpaired = np.setdiff1d(np.arange(len(a)), paired)
    position = np.full(a.shape[1], len(partners))
    position[partners] = np.arange(len(partners))
    largest = a[unpaired].max(axis=1, initial=0)
    follows = np.where(largest > 0, position[a[unpaired].argmax(axis=1)], len(partners))
    place = np.concatenate([np.arange(len(paired)), follows + 0.5])
    size = np.concatenate([np.zeros(len(paired)), -largest])
    return np.concatenate([paired, unpaired])[np.lexsort((size, place))]
